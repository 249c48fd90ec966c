"""The Triton kernels of causal convolution without a GPU: their values by Triton's interpreter, and what they compile
to."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreting import emulating, interpreted, judging, needs_extension, needs_triton

import s2s_kernels as s2s
from s2s_kernels import dispatch
from s2s_kernels.nn import ConvState
from s2s_kernels.ops.convolution import conditioned_conv1d
from s2s_kernels.ops.convolution.autograd import ACTIVATIONS, GATES
from s2s_kernels.testing import CASES, Draw, evaluate, noise_like, prepare, to_device
from s2s_kernels.testing.layouts import noise_sliced, noise_transposed, ones_expanded, sliced, transposed

CASE = CASES["causal_conv1d"]
by_name = {sample.name: sample for sample in CASE.samples}
pytestmark = emulating()
judge = judging(s2s.causal_conv1d)
NAN, INF = float("nan"), float("inf")


@interpreted
def test_the_kernels_of_triton_run(monkeypatch):
    from s2s_kernels.ops.convolution import triton_kernels

    called = []
    original = triton_kernels.causal_conv1d_forward
    monkeypatch.setattr(triton_kernels, "causal_conv1d_forward", lambda *a: called.append(1) or original(*a))
    s2s.causal_conv1d(torch.randn(1, 2, 3), torch.randn(2, 2, 2))
    assert called == [1]


HALVES = ("plain", "depthwise", "everything", "gate across groups", "lengths", "tails, gated", "many channels")


@interpreted
@pytest.mark.parametrize("name", HALVES)
def test_values_and_gradients_in_16_bits(name):
    judge(by_name[name].build(Draw(torch.float16)))


def channels_last(value):
    return value.transpose(1, 2).contiguous().transpose(1, 2) if value.dim() == 3 else value


STRIDED = ("plain", "depthwise", "everything", "gate across groups", "lengths")


LAYOUTS = [(name, channels_last) for name in STRIDED] + [
    (name, layout) for name in ("depthwise", "gate across groups", "lengths") for layout in (transposed, sliced)
]


@interpreted
@pytest.mark.parametrize("name, layout", LAYOUTS)
def test_any_strides(name, layout):
    args, kwargs = by_name[name].build(Draw())
    kwargs = {n: layout(v) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in kwargs.items()}
    judge((tuple(layout(v) for v in args if v is not None), kwargs))


@interpreted
@pytest.mark.parametrize("upstream", [ones_expanded, noise_transposed, noise_sliced])
def test_any_strides_of_the_incoming_gradient_of_depthwise_channels(upstream):
    judge(by_name["depthwise"].build(Draw()), upstream=upstream)


@interpreted
def test_any_subset_of_inputs_of_depthwise_channels_wanting_a_gradient():
    arguments = by_name["depthwise"].build(Draw())
    for chosen in range(3):
        judge(arguments, wanted=lambda index, chosen=chosen: index == chosen)
        judge(arguments, wanted=lambda index, chosen=chosen: index != chosen)


@interpreted
def test_channels_side_by_side_and_many_products():
    """Sizes at which the launcher lays the channels of 16-bit inputs side by side, and several tiles of each kind."""
    draw = Draw(torch.float16)
    x, weight = draw(1, 64, 150), draw(130, 64, 4, scale=1 / 16)
    options = {"dilation": 3, "activation": "silu", "residual": draw(1, 130, 150)}
    judge(((x, weight, draw(130)), options))
    judge(((channels_last(x), weight, None), {"lengths": torch.tensor([140])}))
    judge(((x, weight, draw(130)), {"dilation": 30, "initial_state": draw(1, 64, 90), "activation": "glu"}))


@interpreted
def test_depthwise_channels_last_of_several_tiles():
    draw = Draw(torch.float16)
    x, weight = channels_last(draw(2, 72, 70)), draw(72, 1, 4)
    judge(((x, weight, draw(72)), {"groups": 72, "activation": "silu", "lengths": torch.tensor([70, 33])}))


LINES = [(4, 1, 1304), (64, 1, 1032), (30, 3, 257), (12, 10, 304)]
FEW_TAPS = [(1, 1, 1032), (4, 64, 2056), (8, 7, 1301), (3, 130, 264), (2, 1500, 2048)]


def judge_lines(dtype, taps, dilation, time):
    draw = Draw(dtype)
    x, weight, options = draw(2, 3, time), draw(3, 1, taps, scale=taps**-0.5), {"groups": 3, "dilation": dilation}
    judge(((x, weight, draw(3)), options))
    full = {**options, "activation": "relu", "initial_state": draw(2, 3, (taps - 1) * dilation)}
    judge(((x, weight, draw(3)), {**full, "residual": draw(2, 3, time), "lengths": torch.tensor([time - 9, 5])}))
    judge(((sliced(x), weight, None), {**options, "causal": False, "lengths": torch.tensor([0, time - 3])}))
    judge(((channels_last(x), weight, draw(3)), options))


@interpreted
@pytest.mark.parametrize("taps, dilation, time", LINES)
def test_depthwise_lines_long_enough_for_products(taps, dilation, time):
    judge_lines(torch.float16, taps, dilation, time)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("taps, dilation, time", FEW_TAPS)
def test_depthwise_lines_of_few_taps(taps, dilation, time, dtype):
    judge_lines(dtype, taps, dilation, time)


@interpreted
@pytest.mark.parametrize("dilation", [3, 64])  # products, and few taps
@pytest.mark.parametrize("place", ["input", "weight", "gradient"])
def test_what_is_not_finite_stays_where_it_is_seen_in_depthwise_lines(place, dilation):
    draw = Draw(torch.float16)
    x, weight, upstream = draw(1, 2, 1104), draw(2, 1, 4), draw(1, 2, 1104)
    {"input": x, "weight": weight, "gradient": upstream}[place][0, 0, 0] = INF
    if place == "input":
        x[0, 1, 700] = NAN
    leaves = [t.requires_grad_() for t in (x, weight, draw(2))]
    found, expected = [], []
    for backend, results in (("cpu", found), ("reference", expected)):
        with s2s.use_backend(backend):
            y = s2s.causal_conv1d(*leaves, groups=2, dilation=dilation)
            results += [y, *torch.autograd.grad(y, leaves, upstream)]
    for ours, right in zip(found, expected, strict=True):
        assert torch.equal(ours.isnan(), right.isnan()) and torch.equal(ours.isinf(), right.isinf())
        assert torch.allclose(ours, right, rtol=0.02, atol=0.05, equal_nan=True)


@interpreted
@pytest.mark.parametrize("frames", [1, 20])
@pytest.mark.parametrize("activation", ["tanh", "gated_tanh"])
def test_condition(activation, frames):
    draw = Draw()

    def function(x, weight, bias, condition):
        return conditioned_conv1d(x, weight, bias, condition, dilation=2, activation=activation)

    judge(((draw(2, 3, 20), draw(6, 3, 2), draw(6), draw(2, 6, frames)), {}), function)


@interpreted
@pytest.mark.parametrize("groups", [1, 2])
def test_a_tap_before_the_start_contributes_nothing(groups):
    """No 0 times infinity: neither before the first position nor past the last."""
    x = torch.ones(1, 2, 20)
    weight = torch.ones(4, 2 // groups, 3)
    weight[:, :, 0] = float("inf")
    each = 2 // groups
    y = s2s.causal_conv1d(x, weight, dilation=4, groups=groups)
    assert y[:, :, :4].eq(each).all() and y[:, :, 4:8].eq(2 * each).all() and y[:, :, 8:].isinf().all()
    lengths = torch.tensor([11])
    y = s2s.causal_conv1d(x, weight.flip(2), dilation=4, groups=groups, causal=False, lengths=lengths)
    assert y[:, :, :7].isinf().all() and y[:, :, 7:11].eq(2 * each).all() and y[:, :, 11:].eq(0).all()


@st.composite
def calls(draw):
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    each = draw(st.sampled_from([(1, 1), (1, 2), (2, 4), (9, 14), (17, 3)]))
    activation = draw(st.sampled_from(ACTIVATIONS))
    outputs = groups * each[1] * (2 if activation in GATES else 1)
    batch, time = draw(st.integers(0, 3)), draw(st.integers(0, 150))
    taps, dilation = draw(st.integers(1, 9)), draw(st.sampled_from([1, 2, 3, 7, 64]))
    causal = draw(st.booleans())
    rows = st.lists(st.integers(0, time), min_size=batch, max_size=batch)
    noise = Draw(draw(st.sampled_from([torch.float32, torch.float16])), seed=draw(st.integers(0, 1000)))
    layout = draw(st.sampled_from([transposed, channels_last, sliced, lambda value: value]))
    x = noise(batch, groups * each[0], time)
    lengths = draw(st.none() | rows)
    for row, length in enumerate(lengths or ()):
        x[row, :, length:] = float("nan")
    results = outputs // 2 if activation in GATES else outputs
    options = {"dilation": dilation, "groups": groups, "activation": activation, "causal": causal}
    if lengths is not None:
        options["lengths"] = torch.tensor(lengths, dtype=torch.int64)
    if draw(st.booleans()):
        options["residual"] = layout(noise(batch, results, time))
    if causal and draw(st.booleans()):
        options["initial_state"] = layout(noise(batch, groups * each[0], (taps - 1) * dilation))
    weight = noise(outputs, each[0], taps, scale=(each[0] * taps) ** -0.5)
    return (layout(x), weight, noise(outputs) if draw(st.booleans()) else None), options


@interpreted
@settings(max_examples=settings().max_examples // 4)
@given(calls())
def test_any_call_equals_the_definition(arguments):
    judge(arguments)


@interpreted
@pytest.mark.parametrize("groups", [1, 6])
def test_the_same_bits_on_every_run(groups):
    draw = Draw(torch.float16)
    arguments = (draw(2, 6, 300), draw(6, 6 // groups, 3), draw(6)), {"groups": groups, "activation": "silu"}
    runs = [dict(evaluate(s2s.causal_conv1d, prepare(arguments), noise_like)) for _ in range(2)]
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


@interpreted
def test_lengths_out_of_range_are_clamped_in_the_kernel():
    """On a GPU nothing waits for the lengths, so the kernels take any."""
    draw = Draw()
    x, weight = draw(2, 3, 9), draw(4, 3, 2)
    none = None
    raw = torch.ops.s2s.causal_conv1d_forward
    y, _ = raw(x, weight, none, none, torch.tensor([99, -5]), none, none, 1, 1, 0, True, False)
    expected, _ = raw(x, weight, none, none, torch.tensor([9, 0], dtype=torch.int32), none, none, 1, 1, 0, True, False)
    assert torch.equal(y, expected) and y[1].eq(0).all()


@interpreted
def test_lengths_that_are_no_neighbours_in_memory():
    draw, lengths = Draw(), torch.tensor([9, 7, 3, 7, 0, 7])[::2]
    judge(((draw(3, 2, 9), draw(4, 2, 2), draw(4)), {"lengths": lengths}))
    judge(((draw(3, 4, 9), draw(4, 1, 2)), {"groups": 4, "lengths": lengths}))


@interpreted
def test_raw_calls_are_checked_and_keep_to_their_fakes():
    draw = Draw()
    good = (draw(2, 3, 9), draw(4, 3, 2), draw(4), None, None, draw(2, 3, 1), None, 1, 1, 1, True, True)
    torch.library.opcheck(torch.ops.s2s.causal_conv1d_forward, good, test_utils=("test_schema", "test_faketensor"))
    saved = torch.ops.s2s.causal_conv1d_forward(*good)[1]
    backward = (draw(2, 4, 9), draw(2, 3, 9), draw(4, 3, 2), saved, None, draw(2, 3, 1), 1, 1, 1, True, False)
    backward = (*backward, True, True, True, True, True)
    torch.library.opcheck(torch.ops.s2s.causal_conv1d_backward, backward, test_utils=("test_schema", "test_faketensor"))
    wrong = {0: draw(2, 2, 9), 1: draw(4, 3), 5: draw(2, 3, 2), 7: 0, 8: 2, 9: 7}
    wrong |= {2: draw(3), 3: draw(2, 4, 8), 4: torch.tensor([9, 0, 9])[::2], 6: draw(2, 4, 2)}
    wrong |= {1: draw(4, 3, 2).double(), 2: draw(4).double()}
    for place, value in wrong.items():
        with pytest.raises(RuntimeError, match="causal_conv1d_forward: "):
            torch.ops.s2s.causal_conv1d_forward(*good[:place], value, *good[place + 1 :])


@needs_extension
@needs_triton
def test_tensors_on_a_gpu_are_served_by_triton():
    """As far as fake ones show it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), dispatch.use_backend("triton"):
        x, weight = torch.randn(2, 8, 50, device="cuda"), torch.randn(16, 8, 3, device="cuda")
        assert s2s.explain(s2s.causal_conv1d, x, weight).backend == "triton"
        with pytest.raises(NotImplementedError, match="float32, bfloat16 and float16"):
            s2s.causal_conv1d(x.double(), weight.double())
        y = s2s.causal_conv1d(x, weight, activation="glu", lengths=torch.tensor([1, 2]))
        assert y.shape == (2, 8, 50) and y.device.type == "cuda"


# On a GPU, beside what tests/test_operators.py runs there


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [transposed, sliced, channels_last])
@pytest.mark.parametrize("name", STRIDED)
def test_any_strides_on_a_gpu(name, layout, dtype):
    args, kwargs = to_device(by_name[name].build(Draw(dtype)), "cuda")
    kwargs = {n: layout(v) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in kwargs.items()}
    judge((tuple(layout(v) for v in args if v is not None), kwargs), backend="triton")


@pytest.mark.gpu
def test_a_gpu_compiles_once_for_all_lengths_takes_lengths_of_the_cpu_and_repeats_its_bits():
    from s2s_kernels.ops.convolution import triton_kernels

    draw = Draw(torch.bfloat16, "cuda")
    weight, bias = draw(192, 96, 3), draw(192)
    counts = []
    for batch, time in ((4, 700), (3, 1024), (9, 513), (1, 2048)):
        arguments = (draw(batch, 96, time), weight, bias), {"activation": "silu", "dilation": 2}
        arguments[1]["lengths"] = torch.arange(batch) * time // batch
        first, again = (dict(evaluate(s2s.causal_conv1d, prepare(arguments), noise_like)) for _ in range(2))
        assert all(torch.equal(value, again[name]) for name, value in first.items())
        counts.append(len(triton_kernels.dense_kernel.device_caches[torch.cuda.current_device()][0]))
    assert counts == counts[:1] * 4
    with torch.cuda.stream(torch.cuda.Stream()):
        whole = s2s.causal_conv1d(*arguments[0], **arguments[1])
    torch.cuda.synchronize()
    compiled_whole = torch.compile(s2s.causal_conv1d, fullgraph=True)(*arguments[0], **arguments[1])
    assert torch.equal(whole, compiled_whole)


@pytest.mark.gpu
def test_a_gpu_replays_steps_from_a_graph():
    draw = Draw(torch.float32, "cuda")
    weight, bias, frames = draw(8, 4, 3, scale=0.3), draw(8), draw(9, 2, 4)
    options = {"dilation": 2, "activation": "glu"}
    state, plain = (ConvState.zeros(2, 4, 3, 2, device="cuda") for _ in range(2))
    x_t, graph = frames[0].clone(), torch.cuda.CUDAGraph()
    with torch.no_grad():
        s2s.causal_conv1d_step(x_t, ConvState.zeros(2, 4, 3, 2, device="cuda"), weight, bias, **options)  # compiles
        with torch.cuda.graph(graph):
            y_t = s2s.causal_conv1d_step(x_t, state, weight, bias, **options)
        for frame in frames:
            x_t.copy_(frame)
            graph.replay()
            assert torch.equal(y_t, s2s.causal_conv1d_step(frame, plain, weight, bias, **options))
    assert torch.equal(state.ordered(), plain.ordered())


STEPS = CASES["causal_conv1d_step"]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("sample", [pytest.param(sample, id=sample.name) for sample in STEPS.samples])
def test_step_values(sample, dtype):
    args, kwargs = sample.build(Draw(dtype))
    with torch.no_grad():
        judge((args, kwargs), STEPS.function, wanted=lambda index: False)


@interpreted
@pytest.mark.parametrize(
    "groups, taps, dilation, activation",
    [
        (1, 2, 5, "silu"), (2, 3, 1, "gated_tanh"), (12, 4, 2, "silu"), (12, 4, 2, "gated_tanh"),
        (1, 1, 1, "gated_tanh"),
    ],
)  # fmt: skip
def test_steps_around_the_ring_equal_the_whole(groups, taps, dilation, activation):
    draw = Draw()
    x, weight, bias = draw(2, 12, 8), draw(24, 12 // groups, taps, scale=0.3), draw(24)
    options = {"dilation": dilation, "groups": groups, "activation": activation}
    state = ConvState.zeros(2, 12, taps, dilation)
    ring, position = state.ring, state.position
    with torch.no_grad():
        steps = [s2s.causal_conv1d_step(x[:, :, t], state, weight, bias, **options) for t in range(8)]
    assert state.ring is ring and state.position is position
    with s2s.use_backend("reference"):
        whole, last = s2s.causal_conv1d(x, weight, bias, return_state=True, **options)
    torch.testing.assert_close(torch.stack(steps, 2), whole)
    assert torch.equal(state.ordered(), last)


@interpreted
def test_the_step_of_triton_runs(monkeypatch):
    from s2s_kernels.ops.convolution import triton_step

    called = []
    original = triton_step.causal_conv1d_step
    monkeypatch.setattr(triton_step, "causal_conv1d_step", lambda *a: called.append(1) or original(*a))
    with torch.no_grad():
        s2s.causal_conv1d_step(torch.randn(1, 2), ConvState.zeros(1, 2, 2), torch.randn(2, 2, 2))
    assert called == [1]
