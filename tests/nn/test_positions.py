"""Positions: known values, offsets, the property that makes rotations useful, dtypes, compilation, refusals."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from s2s_kernels.nn import LearnedPositions, RotaryPositions, SinusoidalPositions
from s2s_kernels.testing import Draw

ADDED = {"sinusoidal": lambda: SinusoidalPositions(6), "learned": lambda: LearnedPositions(20, 6)}


def rotate(x, offset=0, **options):
    return RotaryPositions(x.shape[-1], **options)(x, x, offset)[0]


def test_sinusoidal_values():
    encoded = SinusoidalPositions(4)(torch.zeros(1, 3, 4, dtype=torch.float64))
    expected = [[math.sin(t), math.cos(t), math.sin(t / 100), math.cos(t / 100)] for t in range(3)]
    torch.testing.assert_close(encoded[0], torch.tensor(expected, dtype=torch.float64))
    odd = SinusoidalPositions(3, base=8.0)(torch.ones(1, 2, 3, dtype=torch.float64))
    expected = [[1, 2, 1], [1 + math.sin(1), 1 + math.cos(1), 1 + math.sin(0.25)]]  # 8^(-2/3)
    torch.testing.assert_close(odd[0], torch.tensor(expected, dtype=torch.float64))


def test_learned_values_and_gradient():
    layer, x = LearnedPositions(5, 2), torch.zeros(2, 3, 2)
    torch.testing.assert_close(layer(x, 2), layer.weight[2:5].expand(2, 3, 2))
    layer(x, torch.tensor([0, 1])).sum().backward()
    assert layer.weight.grad[:, 0].tolist() == [1, 2, 2, 1, 0]
    assert set(layer.state_dict()) == {"weight"}


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_values(interleaved):
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64).expand(1, 1, 2, 4)
    found = rotate(x, 5, interleaved=interleaved)
    pairs = [(0, 1), (2, 3)] if interleaved else [(0, 2), (1, 3)]
    for t in range(2):
        for (i, j), rate in zip(pairs, (1, 0.01), strict=True):
            turned = complex(x[0, 0, t, i], x[0, 0, t, j]) * complex(math.cos(rate * (5 + t)), math.sin(rate * (5 + t)))
            assert abs(complex(found[0, 0, t, i], found[0, 0, t, j]) - turned) < 1e-12


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotated_scores_depend_on_differences_only(interleaved):
    layer, draw = RotaryPositions(8, 100.0, interleaved=interleaved), Draw(torch.float64)
    query, key = draw(2, 4, 1, 8).expand(2, 4, 7, 8), draw(2, 4, 1, 8).expand(2, 4, 7, 8)
    q, k = layer(query, key)
    scores = q @ k.mT  # (B, H, T, T), the same vectors at every position
    torch.testing.assert_close(scores[..., 1:, 1:], scores[..., :-1, :-1])
    torch.testing.assert_close(scores.diagonal(dim1=-2, dim2=-1), (query * key).sum(-1))
    assert not torch.allclose(scores[..., 1:], scores[..., :-1])
    q, k = layer(query, key, torch.tensor([90, 7]))
    torch.testing.assert_close(q @ k.mT, scores)


def test_the_pairings_differ_by_a_permutation():
    x, order = Draw(torch.float64)(2, 3, 5, 8), torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    torch.testing.assert_close(rotate(x[..., order]), rotate(x, interleaved=True)[..., order])


def test_grouped_heads_and_gradients():
    draw, layer = Draw(torch.float64), RotaryPositions(4)
    query, key = draw(2, 6, 3, 4).requires_grad_(), draw(2, 2, 3, 4).requires_grad_()
    q, k = layer(query, key, 3)
    assert q.shape == query.shape and k.shape == key.shape
    torch.testing.assert_close(k, rotate(key, 3))
    assert torch.autograd.gradcheck(lambda q, k: layer(q, k, torch.tensor([1, 9])), (query, key))


@pytest.mark.parametrize("kind", ["sinusoidal", "learned", "rotary", "interleaved"])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_an_offset_is_a_slice(kind, index):
    draw = Draw(torch.float64)
    if kind in ADDED:
        layer, x = ADDED[kind]().double(), draw(2, 9, 6)
    else:
        rotary, x = RotaryPositions(6, interleaved=kind == "interleaved"), draw(2, 9, 3, 6).transpose(1, 2)
        layer = lambda x, offset=0: rotary(x, x, offset)[1]  # noqa: E731
    time = x.dim() - 2
    whole = layer(x)
    torch.testing.assert_close(layer(x.narrow(time, 4, 3), 4), whole.narrow(time, 4, 3))
    ragged = torch.stack([x[0].narrow(time - 1, 2, 3), x[1].narrow(time - 1, 6, 3)])
    expected = torch.stack([whole[0].narrow(time - 1, 2, 3), whole[1].narrow(time - 1, 6, 3)])
    torch.testing.assert_close(layer(ragged, torch.tensor([2, 6], dtype=index)), expected)
    assert layer(x[:0]).shape == x[:0].shape and layer(x.narrow(time, 0, 0), 3).shape == x.narrow(time, 0, 0).shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_have_wide_angles(dtype):
    """Positions past those that the dtype can count."""
    x = Draw(dtype)(1, 2, 8, 6)
    # An angle is a position times a rate, each and the product rounded to float32.
    allowed = 2 * 3008 * torch.finfo(torch.float32).eps + 4 * torch.finfo(dtype).eps
    found, expected = rotate(x, 3000), rotate(x.double(), 3000)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=allowed)
    found, expected = SinusoidalPositions(6)(x[0], 3000), SinusoidalPositions(6)(x[0].double(), 3000)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=allowed)


def test_compiles_whole():
    """Once for all offsets in tensors; for ints at most once for the first and once for all others."""
    torch._dynamo.reset()
    rotary, sinusoidal, learned = RotaryPositions(6), SinusoidalPositions(6), LearnedPositions(20, 6)

    def all_three(x, heads, offset):
        return sinusoidal(x, offset), learned(x, offset), *rotary(heads, heads, offset)

    x, heads, counter = Draw()(2, 4, 6), Draw()(2, 3, 4, 6), CompileCounterWithBackend("eager")
    compiled = torch.compile(all_three, fullgraph=True, backend=counter)
    for offset, graphs in ((torch.tensor([0, 9]), 1), (torch.tensor([8, 1]), 1), (3, 3), (4, 3), (5, 3), (6, 3)):
        for a, b in zip(compiled(x, heads, offset), all_three(x, heads, offset), strict=True):
            torch.testing.assert_close(a, b)
        assert counter.frame_count <= graphs


@pytest.mark.parametrize(
    "call, error, argument",
    [
        (lambda: SinusoidalPositions(0), ValueError, "d_model"),
        (lambda: SinusoidalPositions(4, base=0.0), ValueError, "base"),
        (lambda: LearnedPositions(0, 4), ValueError, "max_length"),
        (lambda: LearnedPositions(4, 0), ValueError, "d_model"),
        (lambda: RotaryPositions(5), ValueError, "head_dim"),
        (lambda: RotaryPositions(0), ValueError, "head_dim"),
        (lambda: RotaryPositions(8.0), TypeError, "head_dim"),
        (lambda: SinusoidalPositions(8.0), TypeError, "d_model"),
        (lambda: RotaryPositions(4, -1.0), ValueError, "base"),
        (lambda: SinusoidalPositions(4)(torch.zeros(3, 4)), ValueError, "x"),
        (lambda: SinusoidalPositions(4)(torch.zeros(2, 3, 5)), ValueError, "x"),
        (lambda: SinusoidalPositions(4)(torch.zeros(2, 3, 4, dtype=torch.int64)), TypeError, "x"),
        (lambda: SinusoidalPositions(4)(torch.zeros(2, 3, 4), -1), ValueError, "offset"),
        (lambda: SinusoidalPositions(4)(torch.zeros(2, 3, 4), torch.tensor([0, -1])), ValueError, "offset"),
        (lambda: SinusoidalPositions(4)(torch.zeros(2, 3, 4), torch.tensor([0])), ValueError, "offset"),
        (lambda: SinusoidalPositions(4)(torch.zeros(2, 3, 4), torch.tensor([0.0, 1.0])), TypeError, "offset"),
        (lambda: SinusoidalPositions(4)(torch.zeros(2, 3, 4), 1.5), TypeError, "offset"),
        (lambda: SinusoidalPositions(4)(torch.zeros(2, 3, 4), True), TypeError, "offset"),
        (lambda: LearnedPositions(5, 4)(torch.zeros(2, 6, 4)), ValueError, "x"),
        (lambda: LearnedPositions(5, 4)(torch.zeros(2, 3, 4), 3), ValueError, "offset"),
        (lambda: LearnedPositions(5, 4)(torch.zeros(2, 3, 4), torch.tensor([0, 3])), ValueError, "offset"),
        (lambda: RotaryPositions(4)(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)), ValueError, "query"),
        (lambda: RotaryPositions(4)(torch.zeros(2, 1, 3, 6), torch.zeros(2, 1, 3, 4)), ValueError, "query"),
        (lambda: RotaryPositions(4)(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 2, 4)), ValueError, "key"),
        (
            lambda: RotaryPositions(4)(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4, device="meta")),
            ValueError,
            "key",
        ),
    ],
)
def test_bad_input_is_refused_by_name(call, error, argument):
    with pytest.raises(error, match=rf": {argument} must"):
        call()
