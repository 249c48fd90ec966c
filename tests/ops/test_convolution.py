"""Causal convolution: torch's own numbers, chunks and steps bit for bit, beams, and what is special to its kernels."""

import copy
import ctypes
import mmap
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import s2s_kernels as s2s
from s2s_kernels import dispatch
from s2s_kernels.nn import ConvState
from s2s_kernels.ops.convolution.autograd import ACTIVATIONS, GATES
from s2s_kernels.testing import Draw, compare
from s2s_kernels.testing.convolution import convolution_sample

NAN = float("nan")
needs_extension = pytest.mark.skipif(dispatch.extension_missing is not None, reason=str(dispatch.extension_missing))
BACKENDS = ["reference", pytest.param("cpu", marks=needs_extension)]


def torch_activation(u, activation):
    a, b = u.chunk(2, 1) if activation in GATES else (u, u)
    return {
        None: lambda: u,
        "relu": lambda: u.relu(),
        "silu": lambda: F.silu(u),
        "gelu": lambda: F.gelu(u),
        "tanh": lambda: u.tanh(),
        "glu": lambda: F.glu(u, 1),
        "gated_tanh": lambda: a.tanh() * b.sigmoid(),
    }[activation]()


@pytest.mark.parametrize("backend", BACKENDS)
def test_literal_values(backend):
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    weight = torch.tensor([[[10.0, 1.0]]])
    with s2s.use_backend(backend):
        assert s2s.causal_conv1d(x, weight).tolist() == [[[1.0, 12.0, 23.0, 34.0]]]
        assert s2s.causal_conv1d(x, weight, dilation=2).tolist() == [[[1.0, 2.0, 13.0, 24.0]]]
        state = torch.tensor([[[5.0, 6.0]]])
        y, after = s2s.causal_conv1d(x, weight, dilation=2, initial_state=state, return_state=True)
        assert y.tolist() == [[[51.0, 62.0, 13.0, 24.0]]]
        assert after.tolist() == [[[3.0, 4.0]]]
        lengths = torch.tensor([1])
        y, after = s2s.causal_conv1d(x, weight, dilation=2, lengths=lengths, initial_state=state, return_state=True)
        assert y.tolist() == [[[51.0, 0.0, 0.0, 0.0]]]
        assert after.tolist() == [[[6.0, 1.0]]]
        three = torch.tensor([[[100.0, 10.0, 1.0]]])
        assert s2s.causal_conv1d(x, three, causal=False).tolist() == [[[12.0, 123.0, 234.0, 340.0]]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_equals_torch(backend, activation, groups):
    draw = Draw(torch.float64)
    x, weight, bias = draw(3, 6, 40), draw(12, 6 // groups, 3, scale=0.3), draw(12)
    expected = torch_activation(F.conv1d(F.pad(x, (8, 0)), weight, bias, dilation=4, groups=groups), activation)
    with s2s.use_backend(backend):
        ours = s2s.causal_conv1d(x, weight, bias, dilation=4, groups=groups, activation=activation)
    torch.testing.assert_close(ours, expected)


SIZES = [(1, 1), (1, 1), (2, 4), (5, 2), (9, 14)]  # channels and outputs of a group
IN_STAGES = (140, 52)  # more than the first-level cache holds, and than a chain is of


@st.composite
def calls(draw, sizes=SIZES):
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    per_group = draw(st.sampled_from(sizes))
    activation = draw(st.sampled_from(ACTIVATIONS))
    outputs = groups * per_group[1] * (2 if activation in GATES else 1)
    return {
        "batch": draw(st.integers(1, 3)),
        "channels": groups * per_group[0],
        "outputs": outputs,
        "groups": groups,
        "activation": activation,
        "taps": draw(st.integers(1, 9)),
        "dilation": draw(st.sampled_from([1, 2, 3, 7, 16, 64])),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64])),
        "bias": draw(st.booleans()),
        "residual": draw(st.booleans()),
        "channels_last": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }


def tensors_of(made, time):
    draw = Draw(made["dtype"], seed=made["seed"])
    x = draw(made["batch"], made["channels"], time)
    if made["channels_last"]:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    weight = draw(made["outputs"], made["channels"] // made["groups"], made["taps"], scale=0.4)
    bias = draw(made["outputs"]) if made["bias"] else None
    results = made["outputs"] // 2 if made["activation"] in GATES else made["outputs"]
    residual = draw(made["batch"], results, time) if made["residual"] else None
    options = {name: made[name] for name in ("dilation", "groups", "activation")}
    return x, weight, bias, residual, options


@needs_extension
@given(
    calls([*SIZES, IN_STAGES]),
    st.lists(st.sampled_from([1, 2, 3, 5, 7, 11, 16, 31, 64, 70, 130]), min_size=1, max_size=5),
)
def test_any_chunks_give_the_bits_of_the_whole(made, chunks):
    """Row 39."""
    x, weight, bias, residual, options = tensors_of(made, sum(chunks))
    with s2s.use_backend("cpu"):
        whole, last = s2s.causal_conv1d(x, weight, bias, residual=residual, return_state=True, **options)
        state, at = None, 0
        for size in chunks:
            here = slice(at, at + size)
            after = None if residual is None else residual[:, :, here]
            y, state = s2s.causal_conv1d(
                x[:, :, here], weight, bias, residual=after, initial_state=state, return_state=True, **options
            )
            assert torch.equal(y, whole[:, :, here])
            at += size
        assert torch.equal(state, last)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("batch, channels, outputs, groups", [(1, 2, 2, 2), (1, 1, 2, 1), (2, 3, 32, 1), (1, 4, 32, 1)])
def test_chains_of_many_taps_give_the_bits_of_the_whole(batch, channels, outputs, groups, dtype):
    """Of a sum of several chains a tile takes what is in time for it, a step all of it."""
    made = {"batch": batch, "channels": channels, "outputs": outputs, "groups": groups, "taps": 150, "dilation": 3}
    made |= {"dtype": dtype, "bias": True, "residual": False, "activation": None, "channels_last": False, "seed": 0}
    x, weight, bias, _, options = tensors_of(made, 700)
    with s2s.use_backend("cpu"):
        whole, last = s2s.causal_conv1d(x, weight, bias, return_state=True, **options)
        y, state = s2s.causal_conv1d(x[:, :, :650], weight, bias, return_state=True, **options)
        assert torch.equal(y, whole[:, :, :650])
        state = ConvState(state)
        for t in range(650, 700):
            assert torch.equal(s2s.causal_conv1d_step(x[:, :, t], state, weight, bias, **options), whole[:, :, t])
        assert torch.equal(state.ordered(), last)


@needs_extension
@given(calls([*SIZES, IN_STAGES]), st.integers(1, 40), st.integers(0, 20))
def test_steps_give_the_bits_of_the_whole(made, steps, before):
    x, weight, bias, residual, options = tensors_of(made, before + steps)
    with s2s.use_backend("cpu"):
        whole, last = s2s.causal_conv1d(x, weight, bias, residual=residual, return_state=True, **options)
        state = ConvState(s2s.causal_conv1d(x[:, :, :before], weight, bias, return_state=True, **options)[1])
        for t in range(before, before + steps):
            after = None if residual is None else residual[:, :, t]
            y_t = s2s.causal_conv1d_step(x[:, :, t], state, weight, bias, residual=after, **options)
            assert torch.equal(y_t, whole[:, :, t])
        assert torch.equal(state.ordered(), last)


@given(calls(), st.integers(0, 150), st.booleans(), st.data())
def test_any_call_equals_the_definition(made, time, causal, data):
    x, weight, bias, residual, options = tensors_of({**made, "dtype": torch.float32}, time)
    lengths = data.draw(st.lists(st.integers(0, time), min_size=x.shape[0], max_size=x.shape[0]))
    for row, length in enumerate(lengths):
        x[row, :, length:] = float("nan")
    arguments = (
        (x, weight, bias),
        {**options, "residual": residual, "lengths": torch.tensor(lengths), "causal": causal},
    )
    assert all(by <= 0 for by in compare(s2s.causal_conv1d, arguments).values())


@needs_extension
@pytest.mark.parametrize("channels, outputs, groups", [(25, 25, 1), (17, 33, 1), (40, 22, 2), (64, 32, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_channels_that_fill_vectors_or_not(channels, outputs, groups, dtype):
    """The weights' is made of products of panels, or of rows: from before the first position to past the last present
    one, over several stretches of time."""
    sample = convolution_sample(
        "",
        3,
        channels,
        outputs,
        700,
        4,
        groups=groups,
        dilation=45,
        lengths=(600, 700, 3),
        poison=True,
        initial_state=True,
    )
    assert all(by <= 0 for by in compare(s2s.causal_conv1d, sample.build(Draw(dtype)), "cpu").values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tap_before_the_start_contributes_nothing(backend):
    """No 0 times infinity: neither before the first position nor past the last."""
    x = torch.ones(1, 2, 20)
    weight = torch.ones(3, 2, 3)
    weight[:, :, 0] = float("inf")
    with s2s.use_backend(backend):
        y = s2s.causal_conv1d(x, weight, dilation=4)
        assert y[:, :, :4].eq(2).all() and y[:, :, 4:8].eq(4).all() and y[:, :, 8:].isinf().all()
        y = s2s.causal_conv1d(x, weight.flip(2), dilation=4, causal=False, lengths=torch.tensor([11]))
        assert y[:, :, :7].isinf().all() and y[:, :, 7:11].eq(4).all() and y[:, :, 11:].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_beams(backend):
    """Row 40: reordered, duplicated and shrunk states go on as each would alone."""
    draw = Draw()
    weight, bias, prefix, rest = draw(4, 4, 3, scale=0.3), draw(4), draw(3, 4, 5), draw(4, 4, 6)
    index = torch.tensor([2, 0, 2, 1])
    with s2s.use_backend(backend):
        state = ConvState.zeros(3, 4, 3, 2)
        for t in range(5):
            s2s.causal_conv1d_step(prefix[:, :, t], state, weight, bias, dilation=2)
        chosen = state.reorder(index)
        assert torch.equal(chosen.ordered(), state.ordered()[index])
        steps = [s2s.causal_conv1d_step(rest[:, :, t], chosen, weight, bias, dilation=2) for t in range(6)]
        alone = s2s.causal_conv1d(torch.cat([prefix[index], rest], 2), weight, bias, dilation=2)[:, :, 5:]
    torch.testing.assert_close(torch.stack(steps, 2), alone)
    assert torch.equal(state.ordered(), prefix[:, :, 1:])


def test_state_copies_and_pickles():
    draw = Draw()
    state = ConvState(draw(2, 3, 4))
    s2s.causal_conv1d_step(draw(2, 3), state, draw(3, 3, 3), dilation=2)
    for other in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert torch.equal(other.ordered(), state.ordered())
        s2s.causal_conv1d_step(draw(2, 3), other, draw(3, 3, 3), dilation=2)
        assert not torch.equal(other.ordered(), state.ordered())


def test_the_ring_is_updated_in_place_unless_a_gradient_is_recorded():
    draw = Draw()
    weight, state = draw(3, 3, 2), ConvState(draw(2, 3, 1))
    ring = state.ring
    s2s.causal_conv1d_step(draw(2, 3), state, weight)
    assert state.ring is ring
    inputs = draw(2, 3, 3).requires_grad_()
    steps = [s2s.causal_conv1d_step(inputs[:, :, t], state, weight) for t in range(3)]
    assert state.ring is not ring
    (ours,) = torch.autograd.grad(torch.stack(steps, 2).square().sum(), inputs)
    before = ring.transpose(1, 2)
    whole = s2s.causal_conv1d(inputs, weight, initial_state=before)
    torch.testing.assert_close(ours, torch.autograd.grad(whole.square().sum(), inputs)[0])


@needs_extension
def test_raw_steps_pass_opcheck():
    draw = Draw()
    ring, position = draw(2, 4, 3), torch.tensor(1)
    arguments = (draw(2, 3), ring, position, draw(4, 3, 3), draw(4), draw(2, 2), 2, 1, ACTIVATIONS.index("glu"))
    torch.library.opcheck(torch.ops.s2s.causal_conv1d_step, arguments)
    parameters = [draw(6, 3, 2), draw(8, 3, 1)] * 2, [draw(6), draw(8)] * 2
    torch.library.opcheck(torch.ops.s2s.conv_stack_pack, parameters)
    packed = ([], [], torch.ops.s2s.conv_stack_pack(*parameters))
    for held in ((*parameters, None), packed):
        stack = (draw(2, 3), draw(2, 12), position, *held, draw(2, 12), [1, 3], 2, 5)
        torch.library.opcheck(torch.ops.s2s.wavenet_step, stack)
    weights = [draw(4, 3, 2), draw(4, 3, 1), draw(4, 4, 2), draw(4, 4, 2), draw(4, 4, 2)]
    tcn = (draw(2, 3), draw(2, 31), position, weights, [draw(4)] * 5, None, [1, 3], 2, [3, 4, 4])
    torch.library.opcheck(torch.ops.s2s.tcn_step, tcn)


@needs_extension
def test_raw_steps_check_again():
    draw = Draw()
    good = (draw(2, 3), draw(2, 4, 3), torch.tensor(0), draw(4, 3, 3), draw(4), None, 2, 1, 0)
    wrong = {
        0: draw(2, 2), 1: draw(2, 3, 3), 2: torch.tensor(4), 3: draw(4, 2, 3), 4: draw(3), 5: draw(2, 3), 6: 0, 7: 2,
        8: 9,
    }  # fmt: skip
    for place, value in wrong.items():
        with pytest.raises(RuntimeError, match="causal_conv1d_step: "):
            torch.ops.s2s.causal_conv1d_step(*good[:place], value, *good[place + 1 :])
    weights, biases = [draw(6, 3, 2), draw(8, 3, 1)], [draw(6), draw(8)]
    good = (draw(2, 3), draw(2, 12), torch.tensor(0), weights, biases, None, None, [4], 2, 5)
    wrong = {
        0: draw(2, 2), 1: draw(2, 15), 2: torch.tensor(-1), 3: [draw(6, 2, 2), weights[1]], 4: [],
        5: draw(9), 6: draw(2, 5), 7: [4, 4], 8: 3, 9: 4,
    }  # fmt: skip
    for place, value in wrong.items():
        with pytest.raises(RuntimeError, match="wavenet_step: "):
            torch.ops.s2s.wavenet_step(*good[:place], value, *good[place + 1 :])
    weights, biases = [draw(4, 3, 2), draw(4, 3, 1), draw(4, 4, 2)], [draw(4)] * 3
    good = (draw(2, 3), draw(2, 21), torch.tensor(0), weights, biases, None, [3], 2, [3, 4])
    torch.ops.s2s.tcn_step(*good)
    wrong = {
        0: draw(2, 4), 1: draw(2, 20), 2: torch.tensor(-1), 3: weights[:2], 4: [draw(4), draw(4), draw(3)], 5: draw(9),
        6: [0], 7: 1, 8: [3, 3],
    }  # fmt: skip
    for place, value in wrong.items():
        with pytest.raises(RuntimeError, match="tcn_step: "):
            torch.ops.s2s.tcn_step(*good[:place], value, *good[place + 1 :])
    with pytest.raises(RuntimeError, match="packed must have shape"):
        torch.ops.s2s.tcn_step(*good[:3], [], [], draw(9), *good[6:])
    for wrong in ((weights, biases[:1]), (weights, [draw(4), draw(4), draw(7)]), ([draw(6, 3), *weights[1:]], biases)):
        with pytest.raises(RuntimeError, match="conv_stack_pack: "):
            torch.ops.s2s.conv_stack_pack(*wrong)


@needs_extension
@pytest.mark.parametrize("groups", [1, 12])
def test_the_same_bits_on_any_number_of_threads(groups):
    draw = Draw()
    x, weight, bias = draw(5, 12, 700), draw(12, 12 // groups, 3), draw(12)
    lengths = torch.tensor([700, 3, 0, 512, 99])

    def run():
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = s2s.causal_conv1d(*leaves, dilation=5, groups=groups, activation="silu", lengths=lengths)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="forbids pages by Linux' mprotect")
def test_whole_lines_are_read_within_their_page():
    """Depthwise convolution reads cache lines of which it needs a part: the pages around the tensor can't be read."""
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 3 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    forbid = ctypes.CDLL(None).mprotect
    assert forbid(ctypes.c_void_p(address), page, 0) == 0 and forbid(ctypes.c_void_p(address + 2 * page), page, 0) == 0
    whole = torch.frombuffer(memory, dtype=torch.float32, offset=page, count=page // 4)
    whole.copy_(torch.randn(page // 4))
    for part in (whole, whole[5:], whole[:-3], whole[7:-9]):
        for channels, taps, dilation in ((1, 4, 1), (2, 3, 5), (1, 9, 3)):
            x = part[: len(part) // channels * channels].view(1, channels, -1)
            weight = torch.randn(channels, 1, taps)
            results = [
                s2s.causal_conv1d(v, weight, dilation=dilation, groups=channels, causal=causal)
                for v in (x, x.clone())
                for causal in (True, False)
            ]
            assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])
    assert forbid(ctypes.c_void_p(address), 3 * page, mmap.PROT_READ | mmap.PROT_WRITE) == 0


@needs_extension
def test_results_that_no_cache_holds():
    """They are written past the caches: the same bits as those of parts that are not, and their gradients."""
    time = (1 << 21) + 5
    x, weight, bias = torch.randn(1, 5, time), torch.randn(5, 1, 3), torch.randn(5)
    x.requires_grad_()
    y = s2s.causal_conv1d(x, weight, bias, dilation=3, groups=5)
    part = slice(time - 1000, time)
    before = x[..., part.start - 6 : part.start].detach()
    assert y.nbytes > 2**25
    assert torch.equal(
        y[..., part], s2s.causal_conv1d(x[..., part], weight, bias, dilation=3, groups=5, initial_state=before)
    )
    upstream = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, upstream)
    piece = x[..., part].detach().requires_grad_()
    y_piece = s2s.causal_conv1d(piece, weight, bias, dilation=3, groups=5, initial_state=before)
    assert torch.equal(grad[..., part], torch.autograd.grad(y_piece, piece, upstream[..., part])[0])


@needs_extension
def test_step_compiles_whole():
    draw = Draw()
    weight, frames = draw(4, 4, 3, scale=0.3), draw(6, 2, 4)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x_t, state):
        return s2s.causal_conv1d_step(x_t, state, weight, dilation=2, activation="tanh")

    ours, plain = ConvState.zeros(2, 4, 3, 2), ConvState.zeros(2, 4, 3, 2)
    for x_t in frames:
        expected = s2s.causal_conv1d_step(x_t, plain, weight, dilation=2, activation="tanh")
        assert torch.equal(compiled(x_t, ours), expected)
    assert torch.equal(ours.ordered(), plain.ordered())


def test_explains_its_choice():
    draw = Draw()
    explanation = s2s.explain(s2s.causal_conv1d, draw(2, 3, 4), draw(4, 3, 2))
    assert explanation.backend == ("cpu" if dispatch.extension_missing is None else "reference")
    assert "take CUDA tensors" in explanation.reasons["triton"]


# More than one block of every kind that the tile unit takes: 96 rows, 256 channels, 256 positions.
WIDE = (
    convolution_sample(
        "groups", 2, 140, 200, 531, 2, groups=2, dilation=256, lengths=(531, 290), initial_state=True, poison=True
    ),
    convolution_sample("more outputs", 1, 48, 290, 257, 3, dilation=2, activation="silu"),
    convolution_sample("more channels", 2, 290, 48, 300, 2, causal=False, lengths=(300, 299)),
)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sample", WIDE, ids=lambda sample: sample.name)
def test_wide_gradients(sample, dtype):
    """Float64 sums of so many terms are right in any order, but the rule knows the reference's only."""
    excess = compare(s2s.causal_conv1d, sample.build(Draw(dtype)), "cpu")
    assert all(value <= 0 for value in excess.values()), excess


@needs_extension
@pytest.mark.parametrize("poisoned", [False, True])
def test_wide_gradients_of_infinities_on_any_number_of_threads(poisoned):
    draw = Draw(torch.float32)
    x, weight, grad = draw(2, 96, 600), draw(160, 96, 2, scale=0.1), draw(2, 160, 600)
    if poisoned:
        grad[0, 5, 300], grad[1, 9, 3], x[1, 7, 20], weight[3, 4, 0] = float("inf"), NAN, NAN, float("inf")
    found = {}
    before = torch.get_num_threads()
    try:
        for backend, threads in (("reference", 1), ("cpu", 1), ("cpu", 2), ("cpu", 3)):
            torch.set_num_threads(threads)
            leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
            with s2s.use_backend(backend):
                y = s2s.causal_conv1d(*leaves, dilation=3)
                found[backend, threads] = torch.autograd.grad(y, leaves, grad)
    finally:
        torch.set_num_threads(before)
    for place in range(2):
        expected, *others = (grads[place] for grads in found.values())
        for other in others:
            assert torch.equal(other.isnan(), expected.isnan()) and torch.equal(other.isinf(), expected.isinf())
            torch.testing.assert_close(other, others[0], rtol=0, atol=0, equal_nan=True)
