"""What the contract promises of every operator, on every backend, over the samples of s2s_kernels.testing."""

import copy

import pytest
import torch
from serving import (
    EMULATED,
    HALVES,
    ON_CPU,
    brief,
    covering,
    covers,
    every,
    first,
    forced,
    fullest,
    judge,
    over,
    refused,
    smooth,
)
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.checkpoint import checkpoint

from s2s_kernels import dispatch
from s2s_kernels.testing import (
    CASES,
    Draw,
    evaluate,
    excess,
    is_float,
    leaves_of,
    noise_like,
    outputs_of,
    prepare,
    to_device,
)
from s2s_kernels.testing.layouts import noise_sliced, noise_transposed, ones_expanded, sliced, transposed

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SAMPLES = [
    pytest.param(case, sample, id=f"{name}-{sample.name}") for name, case in CASES.items() for sample in case.samples
]
SMOOTH = [parameter for parameter in SAMPLES if parameter.values[1].smooth]
FIRST = [pytest.param(case, case.samples[0], id=name) for name, case in CASES.items()]
OPERATORS = [pytest.param(case, id=name) for name, case in CASES.items()]
needs_extension = pytest.mark.skipif(dispatch.extension_missing is not None, reason=str(dispatch.extension_missing))


@pytest.fixture
def backend(request):
    """Is forced for the whole test."""
    with forced(request.param):
        yield request.param


def served_by_reference(function, arguments):
    return dispatch.explain(function, *arguments[0], **arguments[1]).backend == "reference"


def relaid(arguments, layout):
    """The same call with every floating tensor laid out otherwise; `layout` gets a tensor and returns it."""
    return tree_map(lambda v: layout(v) if is_float(v) else v, arguments)


def absurd(value):
    """Strides that are never used, because their dimension has size 1."""
    strides = [10**9 + 7 if size == 1 else stride for size, stride in zip(value.shape, value.stride(), strict=True)]
    return value.as_strided(value.shape, strides)


def expanded(value):
    return value[:1].expand(value.shape) if value.dim() and value.shape[0] else value


def far_apart(value):
    """Neighbours along the first dimension 2^31 elements and more apart, in memory of which only the touched pages
    exist."""
    if value.dim() == 0 or value.shape[0] < 2:
        return value
    stride = 2**31 // (value.shape[0] - 1) + value.numel()
    buffer = torch.empty(stride * (value.shape[0] - 1) + value[0].numel(), dtype=value.dtype)
    far = buffer.as_strided(value.shape, (stride, *value[0].contiguous().stride()))
    return far.copy_(value)


# Equality with the definition


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over(*ON_CPU, samples=every)
def test_values_and_gradients(case, sample, backend, dtype):
    judge(case.function, sample.build(Draw(dtype)))


@over(None, *EMULATED, samples=every, emulated=brief)
def test_whichever_backend_serves(case, sample, backend):
    judge(case.function, sample.build(Draw()))


@over(*EMULATED, samples=first)
def test_emulated_backends_take_calls(case, sample, backend):
    """Without which the tests of them would ask nothing."""
    assert covers(case.function, sample.build(Draw()))


@over(*EMULATED, samples=every, emulated=covering)
def test_values_and_gradients_in_16_bits(case, sample, backend):
    for dtype in HALVES[backend]:
        judge(case.function, sample.build(Draw(dtype)))


@pytest.mark.parametrize("layout", [transposed, sliced, absurd, expanded])
@over(*ON_CPU, *EMULATED, samples=smooth, emulated=covering)
def test_any_strides(case, sample, backend, layout):
    """Rows 3, 4, 6 of the edge cases."""
    judge(case.function, relaid(sample.build(Draw()), layout))


@over(*ON_CPU, *EMULATED, samples=first)
def test_offsets_past_32_bits(case, sample, backend, monkeypatch):
    """Row 7."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    arguments = sample.build(Draw(HALVES.get(backend, (torch.bfloat16,))[0]))
    for chosen in range(len(leaves_of(prepare(arguments)))):
        seen = iter(range(99))
        judge(
            case.function,
            relaid(arguments, lambda v, seen=seen, chosen=chosen: far_apart(v) if next(seen) == chosen else v),
        )


@pytest.mark.parametrize("upstream", [ones_expanded, noise_transposed, noise_sliced])
@over(*ON_CPU, *EMULATED, samples=smooth, emulated=fullest)
def test_any_strides_of_the_incoming_gradient(case, sample, backend, upstream):
    """Rows 1 and 2."""
    judge(case.function, sample.build(Draw()), upstream=upstream)


@over(*ON_CPU, *EMULATED, samples=smooth, emulated=fullest)
def test_any_subset_of_inputs_wanting_a_gradient(case, sample, backend):
    """Row 13: each alone, and all but one."""
    arguments = sample.build(Draw())
    for chosen in range(len(leaves_of(prepare(arguments)))):
        judge(case.function, arguments, wanted=lambda index, chosen=chosen: index == chosen)
        judge(case.function, arguments, wanted=lambda index, chosen=chosen: index != chosen)


def one_output_only(which):
    def upstream(output, index):
        return noise_like(output, index) if index == which else torch.zeros_like(output)

    return upstream


@over(None, *EMULATED, samples=smooth, emulated=fullest)
def test_one_output_used_alone(case, sample, backend):
    """An output that nothing uses hands backward no gradient at all, not zeros."""
    arguments = sample.build(Draw())
    if not covers(case.function, arguments):
        return
    prepared = prepare(arguments)
    torch.manual_seed(0)
    count = sum(o.requires_grad for o in outputs_of(case.function(*prepared[0], **prepared[1])))
    for which in range(count if count > 1 else 0):
        expected = dict(evaluate(case.function, prepare(arguments), one_output_only(which)))
        torch.manual_seed(0)
        prepared = prepare(arguments)
        output = outputs_of(case.function(*prepared[0], **prepared[1]))[which]
        grads = torch.autograd.grad(output, leaves_of(prepared), noise_like(output, which), allow_unused=True)
        wanted = [value for name, value in expected.items() if name.startswith("gradient")]
        for grad, want in zip(grads, wanted, strict=True):
            torch.testing.assert_close(torch.zeros_like(want) if grad is None else grad, want)


def differentiated(case, sample):
    """A function of the floating tensors alone, for gradcheck, and those tensors."""
    arguments = prepare(sample.build(Draw(torch.float64)))
    flat, spec = tree_flatten(arguments)
    places = [i for i, v in enumerate(flat) if is_float(v)]

    def function(*tensors):
        values = list(flat)
        for place, tensor in zip(places, tensors, strict=True):
            values[place] = tensor
        args, kwargs = tree_unflatten(values, spec)
        torch.manual_seed(0)
        return tuple(o for o in outputs_of(case.function(*args, **kwargs)) if is_float(o))

    return function, tuple(flat[i] for i in places)


@over(*ON_CPU, samples=smooth)
def test_first_and_second_order(case, sample, backend):
    if covers(case.function, sample.build(Draw(torch.float64))):
        function, tensors = differentiated(case, sample)
        assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("case, sample", FIRST)
def test_third_order(case, sample):
    function, tensors = differentiated(case, sample)

    def third():
        value = sum(o.pow(3).sum() for o in function(*tensors))
        for _ in range(3):
            (value,) = torch.autograd.grad(value.sum(), tensors[0], create_graph=True)
        return value

    ours = third()
    with dispatch.use_backend("reference"):
        torch.testing.assert_close(ours, third())


# What torch's machinery sees


class Recorder(TorchDispatchMode):
    """Keeps each call of a raw operator of ours that passes."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "s2s":
            # Detached first: only a leaf can be copied deeply, and only a deep copy keeps every stride.
            leaves = tree_map(lambda v: v.detach() if isinstance(v, torch.Tensor) else v, (args, kwargs or {}))
            self.calls.append((function, *copy.deepcopy(leaves)))
        return function(*args, **(kwargs or {}))


OPCHECKS = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")


def raw_calls(case, sample, dtype=torch.float32):
    arguments = sample.build(Draw(dtype))
    if not covers(case.function, arguments):
        return []
    with Recorder() as recorder:
        list(evaluate(case.function, prepare(arguments), noise_like))
    return recorder.calls


@needs_extension
@over("cpu", *EMULATED, samples=every, emulated=covering)
def test_opcheck(case, sample, backend):
    """Row 31: the fake kernels give the very shapes, dtypes and strides of the kernels; nothing is aliased or mutated
    unsaid."""
    # On a GPU what is saved of absent positions is whatever memory held, here NaN, which opcheck's comparison of traced
    # results takes for unequal to itself.
    tests = OPCHECKS[:3] if backend in EMULATED else OPCHECKS
    for function, args, kwargs in raw_calls(case, sample):
        detached = tree_map(lambda v: v.detach() if isinstance(v, torch.Tensor) else v, args)
        torch.library.opcheck(function, detached, kwargs, test_utils=tests)


@needs_extension
@over("cpu", *EMULATED, samples=first, emulated=covering)
def test_raw_operators_check_again(case, sample, backend):
    """A raw operator called with arguments of another rank or shape raises or answers; it never crashes the process."""
    for function, args, kwargs in raw_calls(case, sample):
        refused = 0
        for place, value in enumerate(args):
            if not isinstance(value, torch.Tensor) or not value.dim():
                continue
            for spoilt in (
                value[None],
                value.flatten()[:-1],
                value.to(torch.complex64),
                value[..., :0],
                value.reshape(-1).repeat(2),
            ):
                changed = (*args[:place], spoilt, *args[place + 1 :])
                try:
                    function(*changed, **kwargs)
                except (RuntimeError, NotImplementedError):
                    refused += 1
        assert refused, f"{function} refused nothing"


@over(None, *EMULATED)
def test_compiles_whole_and_once_for_all_lengths(case, backend):
    """Row 26."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(case.function, fullgraph=True, dynamic=True, backend=counter)
    unrolled = case.loops and served_by_reference(case.function, case.by_length(Draw(), 5))
    lengths = (3, 4) if unrolled else (5, 9, 17)
    for length in lengths:
        arguments = case.by_length(Draw(seed=length), length)
        ours = dict(evaluate(compiled, prepare(arguments), noise_like))
        plain = dict(evaluate(case.function, prepare(arguments), noise_like))
        for name, value in plain.items():
            torch.testing.assert_close(ours[name], value, msg=lambda text, name=name: f"{name}: {text}")
    assert counter.frame_count == (len(lengths) if unrolled else 1)


@pytest.mark.parametrize("case", OPERATORS)
def test_forcing_a_backend_compiles_anew(case):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(case.function, fullgraph=True, dynamic=True, backend=counter)
    arguments = case.by_length(Draw(), 6)
    for backend in ("reference", "cpu") if dispatch.extension_missing is None else ("reference",):
        with dispatch.use_backend(backend):
            ours = outputs_of(compiled(*arguments[0], **arguments[1]))
            plain = outputs_of(case.function(*arguments[0], **arguments[1]))
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == (2 if dispatch.extension_missing is None else 1)


@pytest.mark.parametrize("case", OPERATORS)
def test_exports(case):
    class Wrapper(torch.nn.Module):
        def forward(self, args, kwargs):
            return case.function(*args, **kwargs)

    args, kwargs = case.by_length(Draw(), 6)
    exported = torch.export.export(Wrapper(), (args, kwargs)).module()
    for a, b in zip(outputs_of(exported(args, kwargs)), outputs_of(case.function(*args, **kwargs)), strict=True):
        torch.testing.assert_close(a, b)


@over(None, *EMULATED, samples=smooth, emulated=covering)
def test_activation_checkpointing(case, sample, backend):
    """The same masks are drawn when forward runs again inside backward."""
    arguments = sample.build(Draw())
    if not covers(case.function, arguments):
        return

    def function(*args, **kwargs):
        return checkpoint(case.function, *args, use_reentrant=False, **kwargs)

    plain = dict(evaluate(case.function, prepare(arguments), noise_like))
    for name, value in evaluate(function, prepare(arguments), noise_like):
        torch.testing.assert_close(value, plain[name], rtol=0, atol=0)


@pytest.mark.parametrize("case, sample", SMOOTH)
def test_forward_mode_and_function_transforms(case, sample):
    """Row 43: a raw kernel would drop the tangent in silence."""
    function, tensors = differentiated(case, sample)
    tensors = tuple(t.detach() for t in tensors)
    if not tensors[0].numel():
        return
    x, rest = tensors[0], tensors[1:]
    tangent = noise_like(x, 7)
    step = 1e-6
    above, below = function(x + step * tangent, *rest), function(x - step * tangent, *rest)
    numeric = [(a - b) / (2 * step) for a, b in zip(above, below, strict=True)]
    by_jvp = torch.func.jvp(lambda x: function(x, *rest), (x,), (tangent,))[1]
    with forward_ad.dual_level():
        duals = function(forward_ad.make_dual(x, tangent), *rest)
        by_dual = [forward_ad.unpack_dual(dual).tangent for dual in duals]
    for ours, dual, want in zip(by_jvp, by_dual, numeric, strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(torch.zeros_like(want) if dual is None else dual, ours)

    wanted = torch.autograd.grad(sum(o.sum() for o in function(x.requires_grad_(), *rest)), x, allow_unused=True)[0]
    ours = torch.func.grad(lambda x: sum(o.sum() for o in function(x, *rest)))(x.detach())
    torch.testing.assert_close(ours, torch.zeros_like(ours) if wanted is None else wanted)


@pytest.mark.parametrize("case, sample", FIRST)
def test_vmap(case, sample):
    function, tensors = differentiated(case, sample)
    x, rest = tensors[0].detach(), tuple(t.detach() for t in tensors[1:])
    both = torch.stack([x, 0.5 * x])
    ours = torch.vmap(lambda x: function(x, *rest), randomness="same")(both)
    for index in range(2):
        for a, b in zip(ours, function(both[index], *rest), strict=True):
            torch.testing.assert_close(a[index], b)


@over(None, *EMULATED, samples=smooth, emulated=fullest)
def test_autocast(case, sample, backend):
    """Row 29: floating arguments are cast first, gradients come back in the leaves' own dtype."""
    arguments = sample.build(Draw())
    if not covers(case.function, arguments):
        return
    flat, spec = tree_flatten(prepare(arguments))
    dtype = HALVES.get(backend, (torch.bfloat16,))[0]
    halved = prepare(arguments, dtype)
    plain = dict(evaluate(case.function, halved, noise_like))
    leaves = leaves_of(tree_unflatten(flat, spec))

    def cast(*args, **kwargs):
        with torch.autocast("cpu", dtype):
            return case.function(*args, **kwargs)

    ours = dict(evaluate(cast, tree_unflatten(flat, spec), noise_like))
    for name, value in plain.items():
        if name.startswith("output"):
            assert ours[name].dtype == value.dtype
            torch.testing.assert_close(ours[name], value, rtol=0, atol=0)
    grads = [value for name, value in ours.items() if name.startswith("gradient")]
    for leaf, grad, want in zip(
        leaves, grads, [value for name, value in plain.items() if name.startswith("gradient")], strict=True
    ):
        assert grad.dtype == leaf.dtype
        torch.testing.assert_close(grad, want.to(grad.dtype), rtol=0, atol=0)


@over(None, *EMULATED, samples=smooth, emulated=fullest)
def test_backward_inside_autocast(case, sample, backend):
    """Of a call made outside: its gradients are no less exact for it."""
    arguments = sample.build(Draw())
    if not covers(case.function, arguments):
        return
    if served_by_reference(case.function, arguments):  # its products in backward are torch's, which autocast rounds
        return
    plain = [value for name, value in evaluate(case.function, prepare(arguments), noise_like) if "gradient" in name]
    args, kwargs = prepared = prepare(arguments)
    torch.manual_seed(0)
    outputs = outputs_of(case.function(*args, **kwargs))
    upstream = [noise_like(output, index) for index, output in enumerate(outputs)]
    with torch.autocast("cpu", torch.bfloat16):
        grads = torch.autograd.grad(outputs, leaves_of(prepared), upstream, allow_unused=True)
    for grad, want in zip(grads, plain, strict=True):
        torch.testing.assert_close(torch.zeros_like(want) if grad is None else grad, want, rtol=0, atol=0)


@pytest.mark.parametrize("case, sample", SAMPLES)
def test_meta_tensors(case, sample):
    arguments = sample.build(Draw())
    torch.manual_seed(0)
    real = outputs_of(case.function(*arguments[0], **arguments[1]))
    meta = to_device(arguments, "meta")
    if not covers(case.function, meta):
        return
    for a, b in zip(real, outputs_of(case.function(*meta[0], **meta[1])), strict=True):
        assert b.device.type == "meta" and (a.shape, a.dtype) == (b.shape, b.dtype)


@over(None, *EMULATED, samples=first)
def test_input_changed_before_backward_is_noticed(case, sample, backend):
    """Row 24. The definition may have kept a copy of its own, which the change doesn't reach."""

    def output_of(arguments):
        return outputs_of(case.function(*arguments[0], **arguments[1]))[0]

    arguments = prepare(sample.build(Draw()))
    leaves = leaves_of(arguments)
    expected = torch.autograd.grad(output_of(arguments).sum(), leaves, allow_unused=True)
    output = output_of(arguments)
    with torch.no_grad():
        leaves[0].add_(1.0)
    if not served_by_reference(case.function, arguments):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()
        return
    told = None
    try:
        grads = torch.autograd.grad(output.sum(), leaves, allow_unused=True)
    except RuntimeError as error:
        told = str(error)
    if told is not None:
        assert "modified by an inplace operation" in told
        return
    for grad, want in zip(grads, expected, strict=True):
        assert (grad is None and want is None) or torch.equal(grad, want)


@over(None, *EMULATED, samples=every, emulated=covering)
def test_inputs_are_left_alone_and_results_are_contiguous(case, sample, backend):
    arguments = sample.build(Draw())
    if not covers(case.function, arguments):
        return
    before = copy.deepcopy(arguments)
    for output in outputs_of(case.function(*arguments[0], **arguments[1])):
        assert output.is_contiguous()
    for a, b in zip(tree_flatten(arguments)[0], tree_flatten(before)[0], strict=True):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@needs_extension
@pytest.mark.parametrize("case, sample", SAMPLES)
def test_same_bits_on_any_number_of_threads(case, sample):
    arguments = sample.build(Draw())
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            runs.append(dict(evaluate(case.function, prepare(arguments), noise_like)))
    finally:
        torch.set_num_threads(threads)
    if served_by_reference(case.function, arguments):
        # The definition is made of torch's own products, which round by the number of threads: each is judged.
        exact = dict(evaluate(case.function, prepare(arguments, torch.float64), noise_like))
        for run in runs[1:]:
            broken = {name: by for name, value in run.items() if (by := excess(value, runs[0][name], exact[name])) > 0}
            assert not broken, broken
        return
    for run in runs[1:]:
        for name, value in run.items():
            assert torch.equal(value.nan_to_num(7), runs[0][name].nan_to_num(7)), name


# Bad input


@over("reference", "cpu", None, *EMULATED, samples=refused, emulated=refused)
def test_bad_input_is_refused_by_name(case, sample, backend):
    """Rows 34 and 35."""
    args, kwargs = sample.build(Draw())
    with pytest.raises(sample.error, match=rf"\b{sample.argument}\b"):
        case.function(*args, **kwargs)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("case", [parameter for parameter in OPERATORS if parameter.id != "recurrent layers"])
def test_nested_tensors_are_refused_by_name(case, layout):
    """What layers hand each other they have checked."""
    flat, spec = tree_flatten(prepare(case.samples[0].build(Draw())))
    for place, value in enumerate(flat):
        if is_float(value) and value.dim():
            nested = torch.nested.nested_tensor([value.detach(), value.detach()], layout=layout)
            args, kwargs = tree_unflatten([*flat[:place], nested, *flat[place + 1 :]], spec)
            with pytest.raises(TypeError, match=r"^\w+: \w+ must be a strided tensor, got a nested one"):
                case.function(*args, **kwargs)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["attention", "additive_attention", "attention_pool", "causal_conv1d"])
def test_calls_like_earlier_ones_on_a_gpu(name, dtype):
    """From the third call of a kind on, what was launched before is launched again."""
    case = CASES[name]
    for sample in case.samples[:6]:
        for seed in range(4):
            judge(case.function, to_device(sample.build(Draw(dtype, seed=seed)), "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case, sample", SAMPLES)
def test_values_and_gradients_on_a_gpu(case, sample, dtype):
    judge(case.function, to_device(sample.build(Draw(dtype)), "cuda"))
