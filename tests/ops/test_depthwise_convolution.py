"""The depthwise package's two functions: against a definition position by position, with states, rings and segments."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import s2s_kernels as s2s
from s2s_kernels.testing.rule import excess

B, C, T, K = 3, 5, 11, 4


def parameters(dtype=torch.float32, taps=K, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(C, taps, generator=generator), torch.randn(C, generator=generator)
    return weight.to(dtype), bias.to(dtype)


def defined(history, weight, bias, activation):
    """One position from its last K inputs (B, C, K), in float64."""
    u = (history.double() * weight.double()).sum(-1) + (0 if bias is None else bias.double())
    return F.silu(u) if activation else u


def whole(x, weight, bias, activation, before=None):
    before = x.new_zeros(*x.shape[:2], weight.shape[1] - 1) if before is None else before
    padded = torch.cat([before, x], 2)
    return torch.stack(
        [defined(padded[:, :, t : t + weight.shape[1]], weight, bias, activation) for t in range(x.shape[2])], 2
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("taps", [1, 2, 4])
def test_whole_sequences(dtype, activation, taps):
    x = torch.randn(B, T, C).to(dtype).mT  # channels-last
    weight, bias = parameters(dtype, taps)
    before = torch.randn(B, C, taps - 1).to(dtype)
    out = torch.empty(B, C, taps - 1, dtype=dtype)
    y, after = s2s.causal_conv1d_fn(x, weight, bias, None, before, True, out, activation)
    exact = whole(x, weight, bias, activation, before)
    assert excess(y, exact.to(dtype), exact) <= 0
    assert after is out and torch.equal(out, torch.cat([before, x], 2)[:, :, T:])
    plain, exact = s2s.causal_conv1d_fn(x, weight, activation=activation), whole(x, weight, None, activation)
    assert excess(plain, exact.to(dtype), exact) <= 0


def test_segments_see_only_themselves():
    x = torch.randn(2, C, 9, dtype=torch.float64, requires_grad=True)
    weight, bias = (v.requires_grad_() for v in parameters(torch.float64))
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0, 1, -1, -1]], dtype=torch.int32)
    y = s2s.causal_conv1d_fn(x, weight, bias, seq_idx, activation="silu")
    for b, bounds in enumerate(([0, 3, 5, 9], [0, 6, 7])):
        for begin, end in itertools.pairwise(bounds):
            alone = s2s.causal_conv1d_fn(x[b : b + 1, :, begin:end], weight, bias, activation="silu")
            torch.testing.assert_close(y[b : b + 1, :, begin:end], alone)
    assert (y[1, :, 7:] == 0).all()
    poisoned = x.detach().clone()
    poisoned[0, :, :3] = float("nan")
    assert torch.equal(s2s.causal_conv1d_fn(poisoned, weight, bias, seq_idx, activation="silu")[0, :, 3:], y[0, :, 3:])
    assert torch.autograd.gradcheck(lambda *v: s2s.causal_conv1d_fn(*v, seq_idx, activation="silu"), (x, weight, bias))


@pytest.mark.parametrize("length", [K - 1, K, 9])
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("chunk", [0, 1, 3])
def test_updates_are_the_whole_sequence(length, ring, chunk):
    """chunk 0: positions without a time dimension."""
    x = torch.randn(B, C, 12)
    weight, bias = parameters()
    state = torch.zeros(B, C, length)
    outputs = []
    for t in range(0, 12, max(chunk, 1)):
        seen = torch.full((B,), t, dtype=torch.int32) if ring else None
        part = x[:, :, t] if chunk == 0 else x[:, :, t : t + chunk]
        y = s2s.causal_conv1d_update(part, state, weight, bias, "silu", seen)
        assert y.shape == part.shape
        outputs.append(y.unsqueeze(2) if chunk == 0 else y)
    torch.testing.assert_close(torch.cat(outputs, 2), s2s.causal_conv1d_fn(x, weight, bias, activation="silu"))
    last = F.pad(x, (length, 0))[:, :, -length:]
    kept = state[:, :, (12 + torch.arange(length)) % length] if ring else state
    assert torch.equal(kept, last)


def test_rows_of_a_larger_state():
    x, (weight, bias) = torch.randn(2, C), parameters()
    states = torch.randn(6, C, K - 1)
    before, rows = states.clone(), torch.tensor([4, 1])
    y = s2s.causal_conv1d_update(x, states, weight, bias, conv_state_indices=rows)
    alone = before[rows].clone()
    assert torch.equal(y, s2s.causal_conv1d_update(x, alone, weight, bias))
    assert torch.equal(states[rows], alone)
    untouched = [0, 2, 3, 5]
    assert torch.equal(states[untouched], before[untouched])


def test_rings_at_different_lengths():
    weight, bias = parameters()
    lengths = torch.tensor([0, 2, 7])
    history = torch.randn(B, C, 8)
    ring = torch.zeros(B, C, 5)
    for b, seen in enumerate(lengths.tolist()):
        for i in range(seen):
            ring[b, :, i % 5] = history[b, :, i]
    new = torch.randn(B, C)
    y = s2s.causal_conv1d_update(new, ring, weight, bias, cache_seqlens=lengths)
    for b, seen in enumerate(lengths.tolist()):
        sequence = torch.cat([history[b : b + 1, :, :seen], new[b : b + 1, :, None]], 2)
        torch.testing.assert_close(y[b], s2s.causal_conv1d_fn(sequence, weight, bias)[0, :, -1])


def test_an_update_records_gradients_of_its_own_inputs():
    x, (weight, bias) = torch.randn(B, C, 3, requires_grad=True), parameters()
    weight.requires_grad_()
    state = torch.randn(B, C, K - 1)
    before = state.clone()
    grads = torch.autograd.grad(s2s.causal_conv1d_update(x, state, weight, bias).sum(), (x, weight))
    wanted = torch.autograd.grad(s2s.causal_conv1d_fn(x, weight, bias, initial_states=before).sum(), (x, weight))
    for found, expected in zip(grads, wanted, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("function", [s2s.causal_conv1d_fn, s2s.causal_conv1d_update])
def test_weights_of_another_dtype_are_taken_in_that_of_x(function):
    x, (weight, bias) = torch.randn(B, C, T).bfloat16(), parameters()
    states = () if function is s2s.causal_conv1d_fn else (torch.zeros(B, C, K - 1).bfloat16(),)
    again = tuple(state.clone() for state in states)
    assert torch.equal(function(x, *states, weight, bias), function(x, *again, weight.bfloat16(), bias.bfloat16()))


WEIGHT, BIAS = parameters()
X, STATE = torch.randn(B, C, T), torch.zeros(B, C, K - 1)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: s2s.causal_conv1d_fn(X[0], WEIGHT), ValueError, "x must be"),
        (lambda: s2s.causal_conv1d_fn(X, WEIGHT[:, None]), ValueError, "weight must be"),
        (lambda: s2s.causal_conv1d_fn(X, WEIGHT.int()), TypeError, "weight must be"),
        (lambda: s2s.causal_conv1d_fn(X, WEIGHT, BIAS[:-1]), ValueError, "bias must be"),
        (lambda: s2s.causal_conv1d_fn(X, WEIGHT, activation="relu"), ValueError, "activation must be"),
        (lambda: s2s.causal_conv1d_fn(X, WEIGHT, seq_idx=torch.zeros(B, T)), TypeError, "seq_idx must be"),
        (lambda: s2s.causal_conv1d_fn(X, WEIGHT, seq_idx=torch.zeros(B, 1).int()), ValueError, "seq_idx must be"),
        (
            lambda: s2s.causal_conv1d_fn(X, WEIGHT, seq_idx=torch.zeros(B, T).int(), initial_states=STATE),
            ValueError,
            "initial_states must be",
        ),
        (
            lambda: s2s.causal_conv1d_fn(X, WEIGHT, seq_idx=torch.zeros(B, T).int(), return_final_states=True),
            ValueError,
            "return_final_states must be",
        ),
        (lambda: s2s.causal_conv1d_fn(X, WEIGHT, final_states_out=STATE), ValueError, "final_states_out must be"),
        (lambda: s2s.causal_conv1d_fn(X, WEIGHT, initial_states=STATE[:, :, 1:]), ValueError, "initial_states must be"),
        (lambda: s2s.causal_conv1d_update(X, STATE[:, :, 1:], WEIGHT), ValueError, "conv_state must be"),
        (lambda: s2s.causal_conv1d_update(X, STATE.double(), WEIGHT), TypeError, "conv_state must be"),
        (lambda: s2s.causal_conv1d_update(X[:2], STATE, WEIGHT), ValueError, "conv_state must be"),
        (
            lambda: s2s.causal_conv1d_update(X, STATE, WEIGHT, cache_seqlens=torch.zeros(B).int()),
            ValueError,
            "x must be at most",
        ),
        (
            lambda: s2s.causal_conv1d_update(X, STATE, WEIGHT, conv_state_indices=torch.tensor([0, 1, 3])),
            ValueError,
            "conv_state_indices must be in",
        ),
    ],
)
def test_errors_name_the_argument(call, error, words):
    before = STATE.clone()
    with pytest.raises(error, match=words):
        call()
    assert torch.equal(STATE, before)
