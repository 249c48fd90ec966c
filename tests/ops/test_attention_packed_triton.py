"""The Triton kernels of attention on packed sequences without a GPU: their values by Triton's interpreter."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreting import emulating, interpreted, judging, needs_extension, needs_triton
from torch.utils._python_dispatch import TorchDispatchMode

import s2s_kernels as s2s
from s2s_kernels import dispatch
from s2s_kernels.ops.random import keep_mask
from s2s_kernels.testing import CASES, Draw, evaluate, noise_like, prepare, to_device
from s2s_kernels.testing.layouts import noise_sliced, noise_transposed, ones_expanded, sliced, transposed

by_name = {sample.name: sample for sample in CASES["attention_packed"].samples}
HALVES = ("plain", "empty sequences", "one query each", "slopes by sequence", "everything", "tails")
INF, NAN = float("inf"), float("nan")
pytestmark = emulating("real_tiles")
judge = judging(s2s.attention_packed)


def starts(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def packed(draw, times, sources, heads=4, kv_heads=2, width=16, value_width=20, **options):
    shapes = (sum(times), heads, width), (sum(sources), kv_heads, width), (sum(sources), kv_heads, value_width)
    options = {"enable_gqa": True, "return_lse": True, **options}
    return (*(draw(*shape, scale=0.5) for shape in shapes), starts(times), starts(sources)), options


@interpreted
def test_the_kernels_of_triton_run(monkeypatch):
    from s2s_kernels.ops.attention import triton_kernels

    called = []
    for name in ("attention_packed_forward", "attention_packed_backward"):
        original = getattr(triton_kernels, name)
        monkeypatch.setattr(triton_kernels, name, lambda *a, f=original, n=name: called.append(n) or f(*a))
    query = torch.randn(5, 2, 4, requires_grad=True)
    s2s.attention_packed(query, query, query, starts([2, 3]), starts([4, 1])).sum().backward()
    assert called == ["attention_packed_forward", "attention_packed_backward"]


@interpreted
@pytest.mark.parametrize("name", HALVES)
def test_values_and_gradients_in_16_bits(name):
    judge(by_name[name].build(Draw(torch.float16)))


LAYOUTS = [transposed, sliced]


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("upstream", [noise_transposed, noise_sliced, ones_expanded])
def test_any_strides(layout, upstream):
    draw = Draw()
    args, options = packed(draw, (33, 0, 20), (35, 4, 17), causal="bottom-right", alibi_slopes=draw(3, 4).abs())
    options["alibi_slopes"] = layout(options["alibi_slopes"])
    judge(((*(layout(x) for x in args[:3]), *args[3:]), options), upstream=upstream)


@interpreted
@pytest.mark.parametrize("width, value_width, dtype", [(130, 70, torch.float16), (16, 300, torch.float32)])
def test_wide_heads(width, value_width, dtype):
    judge(packed(Draw(dtype), (19, 2), (35, 1), 2, 1, width, value_width, causal=True))


@interpreted
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_many_sequences(kv_heads):
    """Some tiles begin and end within a sequence, some hold a whole one, some nothing."""
    times = [(7 * b) % 23 * (b % 5 != 0) for b in range(40)] + [130]
    sources = [(11 * b) % 29 * (b % 7 != 0) for b in range(40)] + [70]
    judge(packed(Draw(torch.float16), times, sources, kv_heads=kv_heads, causal="bottom-right", window=(60, None)))


@st.composite
def calls(draw):
    length = st.sampled_from([0, 0, 1, 2, 15, 16, 17, 40, 65, 100])
    pairs = draw(st.lists(st.tuples(length, length), min_size=0, max_size=5))
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]))
    noise = Draw(draw(st.sampled_from([torch.float32, torch.float16])), seed=draw(st.integers(0, 1000)))
    widths = draw(st.sampled_from([(1, 1), (8, 8), (16, 5), (33, 64)]))
    side = st.none() | st.integers(0, 160)
    options = {
        "causal": draw(st.sampled_from([False, True, "bottom-right"])),
        "window": draw(st.none() | st.tuples(side, side)),
        "softcap": draw(st.sampled_from([None, None, 3.0])),
        "scale": draw(st.sampled_from([None, 0.2, 0.0, -0.3])),
        "dropout_p": draw(st.sampled_from([0.0, 0.0, 0.25])),
        "return_lse": draw(st.booleans()),
    }
    if (shape := draw(st.sampled_from([None, (heads,), (len(pairs), heads)]))) is not None:
        options["alibi_slopes"] = noise(*shape).abs() * 0.1
    times, sources = [t for t, _ in pairs], [s for _, s in pairs]
    args, options = packed(noise, times, sources, heads, kv_heads, *widths, **options)
    layout = draw(st.sampled_from([transposed, sliced, lambda value: value]))
    return (*(layout(x) for x in args[:3]), *args[3:]), options


@interpreted
@settings(max_examples=settings().max_examples // 3)
@given(calls())
def test_any_call_equals_the_definition(arguments):
    judge(arguments)


@interpreted
@pytest.mark.parametrize("width, left", [(4, None), (300, None), (4, 62)])
def test_dropout_drops_what_the_definition_drops(width, left):
    """To the bit: rows are counted over all sequences, keys within each."""
    draw, times, sources = Draw(torch.float16), [50, 1, 3], [200, 33, 70]
    query, key = draw(54, 2, width), draw(303, 1, width)
    value = torch.cat([torch.eye(n, 200, dtype=torch.float16) for n in sources])[:, None]
    cu = starts(times), starts(sources)
    options = {"dropout_p": 0.3, "enable_gqa": True, "causal": "bottom-right", "window": (left, None)}
    torch.manual_seed(3)
    ours = s2s.attention_packed(query, key, value, *cu, **options)
    torch.manual_seed(3)
    keep = keep_mask(torch.randint(0, 2**63 - 1, (2,)), (2, 54, 303), 0.3)[:, :, :200].transpose(0, 1)
    for part, kept, t, n in zip(ours.split(times), keep.split(times), times, sources, strict=True):
        distance = torch.arange(200) - torch.arange(n - t, n)[:, None]
        seen = (distance <= 0) & (distance >= -(200 if left is None else left))
        assert torch.equal(part != 0, kept & seen[:, None])


@interpreted
@pytest.mark.parametrize("options", [{}, {"causal": "bottom-right", "window": (300, None), "dropout_p": 0.2}])
def test_few_queries_split_the_keys(options, monkeypatch):
    """Some of the splits may have none; sequences that need no split are split as well."""
    from s2s_kernels.ops.attention import triton_kernels

    found = []
    splits = triton_kernels._splits
    monkeypatch.setattr(triton_kernels, "_splits", lambda *a: found.append(splits(*a)) or found[-1])
    judge(packed(Draw(), (1, 1, 0, 2), (700, 0, 9, 150), 6, 2, 40, 24, **options), upstream=None)
    assert found[0] > 1


@interpreted
@pytest.mark.parametrize(
    "times, sources, heads", [([], [], 2), ([0, 0], [3, 0], 2), ([2, 1], [0, 0], 2), ([2], [3], 0)]
)
def test_empty(times, sources, heads):
    shapes = [(sum(n), heads, 4) for n in (times, sources, sources)]
    leaves = [torch.ones(*shape, requires_grad=True) for shape in shapes]
    out, lse = s2s.attention_packed(*leaves, starts(times), starts(sources), causal="bottom-right", return_lse=True)
    grads = torch.autograd.grad([out, lse], leaves, [torch.full_like(out, NAN), torch.full_like(lse, NAN)])
    assert out.shape == shapes[0] and out.eq(0).all() and lse.shape == (heads, sum(times)) and lse.eq(-INF).all()
    assert all(grad.eq(0).all() for grad in grads)


@interpreted
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_nan_stays_in_its_sequence(dropout_p):
    times, sources, results = [9, 40, 8], [11, 50, 36], []
    for poison in (False, True):
        (*tensors, query_starts, key_starts), options = packed(Draw(), times, sources, dropout_p=dropout_p)
        if poison:
            tensors[0][9:49], tensors[1][11:61:3], tensors[2][12:61] = NAN, NAN, INF
        leaves = [x.requires_grad_() for x in tensors]
        torch.manual_seed(5)
        out, lse = s2s.attention_packed(*leaves, query_starts, key_starts, **options)
        grads = torch.autograd.grad([out, lse], leaves, [torch.ones_like(out), torch.ones_like(lse)])
        assert bool(out[9:49].isnan().any()) is poison
        results.append([out, lse.T, *grads])
    for clean, poisoned, lengths in zip(*results, [times, times, times, sources, sources], strict=True):
        for part, other in list(zip(clean.split(lengths), poisoned.split(lengths), strict=True))[::2]:
            assert part.isfinite().all() and torch.equal(part, other)


@interpreted
def test_the_same_bits_on_every_run():
    draw = Draw(torch.float16)
    arguments = packed(draw, (33, 1, 50), (70, 3, 9), dropout_p=0.2, alibi_slopes=draw(3, 4).abs())
    runs = [dict(evaluate(s2s.attention_packed, prepare(arguments), noise_like)) for _ in range(2)]
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


@interpreted
def test_no_work_between_sequences(products):
    """Counted by the elements of products, against a single sequence of that length."""

    def elements(lengths):
        products.clear()
        (*leaves, query_starts, key_starts), _ = packed(Draw(), lengths, lengths, 1, 1, 8, 8)
        leaves = [x.requires_grad_() for x in leaves]
        s2s.attention_packed(*leaves, query_starts, key_starts).sum().backward()
        return sum(products)

    assert elements([64] * 4) < 0.3 * elements([256])


@needs_triton
def test_no_buffer_of_the_size_of_all_pairs_or_of_padded_rows(monkeypatch):
    """Launches do nothing; their grid is made of what the host knows."""
    from s2s_kernels.ops import triton_common
    from s2s_kernels.ops.attention import triton_kernels

    grids = []

    class Nothing:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    for module in (triton_kernels, triton_common):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Nothing())
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                made.append(result.untyped_storage().nbytes() // result.element_size())
            return result

    tensors, _ = packed(Draw(), (900, *[20] * 40), (900, *[20] * 40), 4, 4, 8, 8)
    rest = (torch.ones(4), torch.tensor([1, 2]), None, 0, True, 0.1, None, None)
    with Watch():
        out, _, softmax, _ = triton_kernels.attention_packed_forward(*tensors, *rest, True)
        triton_kernels.attention_packed_backward(out, None, out, softmax, *tensors, *rest, True, True, True, True)
    assert max(made) <= max(tensors[0].numel(), softmax.numel())
    assert len(grids) >= 4 and max(programs for (programs,) in grids) <= 4 * (1700 // 16 + 41)


@interpreted
@pytest.mark.parametrize("query_starts, key_starts", [([0, 4, 99], [0, 2, 99]), ([0, 4, 9], [-9, 2, 12])])
def test_starts_out_of_range_are_clamped_in_the_kernel(query_starts, key_starts):
    """On a GPU nothing waits for them, so the kernels take any."""
    raw, rest = torch.ops.s2s.attention_packed_forward, (None, None, None, None, False, 0.0, None, None, False)
    tensors = packed(Draw(), (4, 5), (2, 10))[0][:3]
    out = raw(*tensors, torch.tensor(query_starts), torch.tensor(key_starts), *rest)[0]
    assert torch.equal(out, raw(*tensors, starts([4, 5]), starts([2, 10]), *rest)[0])


@interpreted
@pytest.mark.parametrize("values", [[0, 40, 42, 90], [50, 3, 90, 7], [-80, 2**40, 1, 0], [32000] * 4])
def test_whatever_the_starts_nothing_outside_is_read_or_written(values, monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    from s2s_kernels.ops.attention import triton_kernels

    draw, spaces = Draw(torch.float16), []

    def known(tensor):
        storage = tensor.untyped_storage()
        spaces.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                known(result)
            return result

    def guarded(name, mask_place):
        original = getattr(InterpreterBuilder, name)

        def access(self, pointers, *rest):
            touched = pointers.data[rest[mask_place].data]
            inside = np.zeros(touched.shape, dtype=bool)
            for begin, end in set(spaces):
                inside |= (touched >= begin) & (touched < end)
            assert inside.all()
            return original(self, pointers, *rest)

        monkeypatch.setattr(InterpreterBuilder, name, access)

    tensors = packed(draw, (40, 2, 48), (2, 78, 10))[0][:3]
    starts_of = torch.tensor(values)
    arguments = (*tensors, starts_of, starts_of, draw(3, 4).abs(), None, None, 0, True, 0.0, None, None)
    for tensor in (*arguments[:6], starts_of):
        known(tensor)
    guarded("create_masked_load", 0)
    guarded("create_masked_store", 1)
    with Watch():
        out, _, softmax, _ = triton_kernels.attention_packed_forward(*arguments, True)
        out.zero_(), softmax.zero_()  # rows that no sequence holds
        triton_kernels.attention_packed_backward(out, None, out, softmax, *arguments, True, True, True, True)


@interpreted
def test_raw_calls_are_checked_and_keep_to_their_fakes():
    draw = Draw(torch.float16)
    tensors = (draw(5, 4, 3), draw(7, 2, 3), draw(7, 2, 6), starts([2, 3]), starts([7, 0]))
    rest = (draw(2, 4), torch.tensor([1, 2]), 2, 0, True, 0.1, None, 3.0)
    good = (*tensors, *rest, True)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.s2s.attention_packed_forward, good, test_utils=tests)
    out, lse, softmax, _ = torch.ops.s2s.attention_packed_forward(*good)
    backward = (draw(5, 4, 6), torch.ones_like(lse), out, softmax, *tensors, *rest, True, True, True, True)
    torch.library.opcheck(torch.ops.s2s.attention_packed_backward, backward, test_utils=tests)
    wrong = {
        0: draw(5, 4), 1: draw(7, 3, 3), 2: draw(6, 2, 6), 3: torch.tensor([0, 5]), 4: starts([7, 0]).int(),
        5: draw(3, 4), 6: None, 7: -1, 10: 1.5, 12: 0.0,
    }  # fmt: skip
    for place, value in wrong.items():
        with pytest.raises(RuntimeError, match="attention_packed_forward: "):
            torch.ops.s2s.attention_packed_forward(*good[:place], value, *good[place + 1 :])
    none = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="attention_packed_forward: "):
        torch.ops.s2s.attention_packed_forward(*tensors[:3], none, none, *rest, True)
    with pytest.raises(RuntimeError, match="attention_packed_backward: "):
        torch.ops.s2s.attention_packed_backward(draw(5, 4, 5), *backward[1:])


@needs_extension
@needs_triton
def test_tensors_on_a_gpu_are_served_by_triton():
    """As far as fake ones show it; nothing asks for a value of cu_seqlens."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), dispatch.use_backend("triton"):
        query = torch.randn(50, 4, 8, device="cuda")
        cu = torch.zeros(4, dtype=torch.int32, device="cuda")
        assert s2s.explain(s2s.attention_packed, query, query, query, cu, cu).backend == "triton"
        with pytest.raises(NotImplementedError, match="float32, bfloat16 and float16"):
            s2s.attention_packed(*[query.double()] * 3, cu, cu)
        with pytest.raises(NotImplementedError, match=r"2\^29"):
            s2s.attention_packed(query, *[torch.empty(2**29, 4, 8, device="cuda")] * 2, cu, cu)
        out, lse = s2s.attention_packed(query, query, query, cu, cu.cpu(), return_lse=True)
        assert out.shape == (50, 4, 8) and lse.shape == (4, 50) and out.device.type == "cuda"


# On a GPU, beside what tests/test_operators.py runs there


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [40, 64, 128, 256, 512, 1024])
def test_every_width_on_a_gpu(width, dtype):
    """Each has tiles of its own; starts on the CPU and on the GPU."""
    for times, options in (((300, 0, 17, 90), {}), ((1, 1, 0, 1), {}), ((333, 5, 64, 1), {"dropout_p": 0.1})):
        arguments = packed(Draw(dtype), times, (500, 40, 0, 133), 4, 2, width, width, causal="bottom-right", **options)
        (*tensors, query_starts, key_starts), options = arguments
        tensors = to_device((tuple(tensors), {}), "cuda")[0]
        judge(((*tensors, query_starts.int().cuda(), key_starts), options), backend="triton")


@pytest.mark.gpu
def test_a_gpu_compiles_once_for_all_lengths_repeats_its_bits_and_is_captured():
    from s2s_kernels.ops.attention import triton_backward, triton_forward

    draw, counts = Draw(torch.bfloat16, "cuda"), []
    for lengths in ((700, 1, 333), (1024, 1024), (3, *[90] * 40), (5000,)):
        cu = starts(lengths).cuda()
        tensors = tuple(draw(sum(lengths), 8, 64) for _ in range(3))
        arguments = (*tensors, cu, cu), {"causal": True, "dropout_p": 0.1}
        first, again = (dict(evaluate(s2s.attention_packed, prepare(arguments), noise_like)) for _ in range(2))
        assert all(torch.equal(value, again[name]) for name, value in first.items())
        kernels = (triton_forward.forward_kernel, triton_backward.query_kernel, triton_backward.key_value_kernel)
        counts.append([len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels])
    assert counts == counts[:1] * 4
    expected = s2s.attention_packed(*tensors, cu, cu, causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = s2s.attention_packed(*tensors, cu, cu, causal=True)
    graph.replay()
    assert torch.equal(captured, expected)
    compiled = torch.compile(s2s.attention_packed, fullgraph=True)
    assert torch.equal(compiled(*tensors, cu, cu, causal=True), expected)
