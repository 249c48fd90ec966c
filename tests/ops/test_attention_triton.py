"""The Triton kernels of attention without a GPU: their values by Triton's interpreter, and what they compile to."""

import itertools

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
from s2s_kernels.testing.layouts import sliced, transposed

by_name = {sample.name: sample for sample in CASES["attention"].samples}
INF, NAN = float("inf"), float("nan")
pytestmark = emulating("real_tiles")
judge = judging(s2s.attention)


@interpreted
def test_the_kernels_of_triton_run(monkeypatch):
    from s2s_kernels.ops.attention import triton_kernels

    called = []
    original = triton_kernels.attention_forward
    monkeypatch.setattr(triton_kernels, "attention_forward", lambda *a: called.append(1) or original(*a))
    query = torch.randn(1, 2, 3, 4)
    s2s.attention(query, query, query)
    s2s.scaled_dot_product_attention(query, query, query)
    s2s.nn.MultiheadAttention(8, 2)(*[torch.randn(3, 1, 8)] * 3, need_weights=False)
    assert called == [1, 1, 1]


@interpreted
@pytest.mark.parametrize("name", ["everything", "tails", "tails, causal", "poisoned"])
def test_the_tiles_of_hopper(name, monkeypatch):
    """Those of compute capability 9 in 16 bits."""
    from s2s_kernels.ops.attention import triton_tiles

    monkeypatch.setattr(triton_tiles, "generation", lambda x: 9)
    judge(by_name[name].build(Draw(torch.float16)))


@interpreted
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_laid_out_in_vectors(dtype, packed):
    """Products of what is loaded element by element were wrong on a GPU, by triton 3.6 in 16 bits."""
    from s2s_kernels.ops.attention.triton_call import laid_out

    storage, vector = torch.randn(5 * 7 * 40 + 1).to(dtype), 16 // dtype.itemsize
    assert storage.data_ptr() % 16 == 0
    dense, shape = storage[:-1], (5, 7, 40) if packed else (1, 5, 7, 40)
    whole = dense.view(shape)
    short = dense[: 5 * 7 * 3].view(*shape[:-1], 3)
    late = storage[1:].view(shape)
    turned = dense.view(*shape[:-2], 40, 7).transpose(-1, -2)
    part, odd = whole[..., : 3 * vector], whole[..., :-1]
    for x, copied in ((whole, 0), (part, 0), (short, 1), (late, 1), (turned, 1), (odd, 1)):
        rows, width = laid_out(x, packed), x.shape[-1]
        wanted = x.transpose(0, 1)[None] if packed else x
        assert rows.shape[:3] == wanted.shape[:3] and rows.shape[3] == -(-width // vector) * vector
        assert torch.equal(rows[..., :width], wanted) and not rows[..., width:].any()
        assert rows.stride(3) == 1 and rows.data_ptr() % 16 == 0
        assert not any(rows.stride(d) % vector for d in range(3) if rows.shape[d] > 1)
        assert (rows.data_ptr() != x.data_ptr()) == copied
    if not packed:
        spread = laid_out(short[:, :1].expand(6, 5, 7, 3), packed)
        assert spread.shape[:3] == (6, 5, 7) and spread.stride()[:2] == (0, 0)
        one = laid_out(storage.new_ones(()).expand(2, 3, 4, 5), packed)
        assert one.untyped_storage().nbytes() <= 16 * 2 and one[..., :5].eq(1).all()
        for row, copied in ((2**24 - 8, False), (2**24, True)):  # 32 bits hold what a tile spans
            far = torch.empty_strided((1, 1, 3, 8), (0, 0, row, 1), dtype=dtype, device="meta")
            assert laid_out(far, packed).stride(2) == (8 if copied else row)


HALVES = (
    "plain", "one query", "bias over heads", "both lengths, bottom right", "everything", "large scores",
    "tails, causal", "one query, many keys", "softcap, scale", "bias that hides",
)  # fmt: skip


@interpreted
@pytest.mark.parametrize("name", HALVES)
def test_values_and_gradients_in_16_bits(name):
    judge(by_name[name].build(Draw(torch.float16)))


@interpreted
def test_a_bias_of_more_bits_than_the_rest():
    (query, key, value), options = by_name["bias over heads"].build(Draw(torch.float16))
    judge(((query, key, value), {**options, "bias": Draw(torch.float32)(*options["bias"].shape)}))


def heads_inside(value):
    return value.transpose(1, 2).contiguous().transpose(1, 2) if value.dim() == 4 else value


LAYOUTS = [transposed, sliced, heads_inside]


def everything(draw, batch=2, heads=2, kv_heads=1, time=37, source=48, width=16, value_width=20, **options):
    shapes = ((batch, heads, time, width), (batch, kv_heads, source, width), (batch, kv_heads, source, value_width))
    given = {
        "mask": draw.mask(batch, 1, time, source, p=0.8), "bias": draw(heads, time, source),
        "alibi_slopes": draw(heads).abs() * 0.1, "causal": "bottom-right", "softcap": 4.0, "enable_gqa": True,
        "key_lengths": draw.tensor([source, source // 2]), "return_lse": True, **options,
    }  # fmt: skip
    return tuple(draw(*shape) for shape in shapes), given


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout):
    args, kwargs = everything(Draw())
    floating = {n: layout(v) for n, v in kwargs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    kwargs |= {**floating, "mask": transposed(kwargs["mask"])}
    judge((tuple(layout(v) for v in args), kwargs))


@interpreted
def test_a_broadcast_is_not_copied():
    draw = Draw()
    query = draw(1, 1, 8, 4).expand(3, 4, 8, 4)
    key = draw(1, 1, 16, 4).expand(3, 4, 16, 4)
    mask, bias = draw.mask(1, 1, 1, 16).expand(3, 4, 8, 16), draw(1, 1, 8, 1).expand(3, 4, 8, 16)
    judge(((query, key, key), {"mask": mask, "bias": bias}))


@interpreted
@pytest.mark.parametrize(
    "width, value_width, dtype",
    [(130, 70, torch.float32), (130, 70, torch.float16), (16, 300, torch.float16), (600, 1024, torch.float32)],
)
def test_wide_heads(width, value_width, dtype):
    """Of more than one tile, or tiles of their own."""
    draw = Draw(dtype)
    tensors = (draw(1, 2, 19, width), draw(1, 1, 35, width), draw(1, 1, 35, value_width))
    judge((tensors, {"causal": True, "enable_gqa": True, "bias": draw(19, 35), "key_lengths": torch.tensor([34])}))


@interpreted
@pytest.mark.parametrize("width", [70, 520])
def test_small_tiles_of_wide_heads(width, monkeypatch, real_tiles):
    """Those of float32 on a GPU, down to eight queries and keys, and dropout's mask in them."""
    from s2s_kernels.ops.attention import triton_kernels

    for name, tiles in real_tiles.items():
        monkeypatch.setattr(triton_kernels, name, tiles)
    draw = Draw()
    tensors = (draw(1, 2, 9, width), draw(1, 1, 43, width), draw(1, 1, 43, width))
    judge((tensors, {"dropout_p": 0.3, "alibi_slopes": draw(2).abs(), "causal": "bottom-right", "enable_gqa": True}))


@interpreted
@pytest.mark.parametrize("major", [8, 9, 10])
@pytest.mark.parametrize("width", [16, 64, 128, 256, 512, 1024])
def test_products_of_weights_under_a_mask_and_dropout_have_32_terms(width, major, real_tiles, monkeypatch):
    """Those of 16 were wrong on a GPU: half of the terms were taken twice."""
    from s2s_kernels.ops.attention import triton_kernels, triton_tiles

    monkeypatch.setattr(triton_tiles, "generation", lambda x: major)
    for dtype, time, heads in itertools.product((torch.bfloat16, torch.float32), (1, 9, 300), (1, 4)):
        draw = Draw(dtype)
        tensors = draw(1, heads, time, width), draw(1, 1, 40, width), draw(1, 1, 40, width)
        mask, seed = draw.mask(1, 1, time, 40), torch.tensor([1, 2])
        rest = None, None, None, None, seed, None, None, False, 0.1, None, None
        call = triton_kernels._checked("attention_forward", *tensors, mask, *rest)
        for tiles in (
            real_tiles["forward_tiles"](call, False), real_tiles["backward_tiles"](call, "query"),
        ):  # fmt: skip
            assert min(tiles["KEYS"], tiles["EDGE"]) >= 32 and tiles["KEYS"] % tiles["EDGE"] == 0
        tiles = real_tiles["backward_tiles"](call, "key")
        assert min(tiles["ROWS"], tiles["EDGE"]) >= 32 and tiles["ROWS"] % tiles["EDGE"] == 0


@interpreted
def test_what_is_hidden_never_leaks():
    """In a block of which others see a part, and in one that a mask hides; in results and in gradients."""
    time = 40
    keep = torch.ones(time, time, dtype=torch.bool)
    keep[:25, 25] = False
    for options in ({"causal": True}, {"mask": keep}, {"bias": torch.zeros(time, time).masked_fill(~keep, -INF)}):
        clean = [Draw(seed=i)(1, 2, time, 16).requires_grad_() for i in range(3)]
        expected = s2s.attention(*clean, **options)
        wanted = torch.autograd.grad(expected[:, :, :25].sum(), clean)
        for place, poison in itertools.product((1, 2), (NAN, -INF)):
            poisoned = [t.detach().clone() for t in clean]
            poisoned[place][0, 0, 25, 3] = poison
            poisoned = [t.requires_grad_() for t in poisoned]
            out = s2s.attention(*poisoned, **options)
            torch.testing.assert_close(out[:, :, :25], expected[:, :, :25])
            torch.testing.assert_close(out[:, 1], expected[:, 1])
            assert out[0, 0, 25:].isnan().all()
            grads = torch.autograd.grad(out[:, :, :25].sum(), poisoned)
            torch.testing.assert_close(grads[0][:, :, :25], wanted[0][:, :, :25])
            for grad, want in zip(grads, wanted, strict=True):
                torch.testing.assert_close(grad[:, 1], want[:, 1])


@interpreted
@pytest.mark.parametrize("poison", [NAN, INF])
def test_a_query_that_is_not_finite_spoils_its_own_row_alone(poison):
    leaves = [Draw(seed=i)(1, 1, 40, 8) for i in range(3)]
    leaves[0][0, 0, 20, 3] = poison
    leaves = [t.requires_grad_() for t in leaves]
    out, lse = s2s.attention(*leaves, causal=True, return_lse=True)
    rows = torch.arange(40) != 20
    assert out[0, 0, 20].isnan().all() and lse[0, 0, 20].isnan()
    assert out[:, :, rows].isfinite().all() and lse[:, :, rows].isfinite().all()
    grads = torch.autograd.grad(out[:, :, rows].sum(), leaves)
    assert grads[0][:, :, rows].isfinite().all()
    assert all(grad[:, :, 21:].isfinite().all() for grad in grads[1:])  # keys that it doesn't see


@interpreted
def test_rows_that_see_nothing():
    draw = Draw()
    leaves = [draw(3, 2, 5, 4), draw(3, 2, 6, 4), draw(3, 2, 6, 4), draw(3, 1, 5, 6)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    mask = torch.ones(3, 1, 5, 6, dtype=torch.bool)
    mask[0, :, 2] = False
    options = {"bias": leaves[3], "mask": mask, "key_lengths": torch.tensor([6, 0, 3])}
    out, lse = s2s.attention(*leaves[:3], **options, return_lse=True)
    assert out[0, :, 2].eq(0).all() and out[1].eq(0).all()
    assert lse[0, :, 2].eq(-INF).all() and lse[1].eq(-INF).all() and lse[2].isfinite().all()
    upstream = torch.ones_like(out)
    upstream[0, :, 2] = NAN
    upstream[1] = INF
    for grad in torch.autograd.grad([out, lse], leaves, [upstream, upstream[..., 0]]):
        assert grad.isfinite().all() and grad[1].eq(0).all()


@interpreted
def test_a_value_that_is_not_finite_takes_no_gradient():
    leaves = [Draw(seed=i)(1, 1, 5, 4).requires_grad_() for i in range(2)]
    value = Draw(seed=2)(1, 1, 5, 4)
    value[0, 0, 2, 1] = INF
    value.requires_grad_()
    results = []
    for backend in ("cpu", "reference"):
        with s2s.use_backend(backend):
            out = s2s.attention(*leaves, value)
            results.append(torch.autograd.grad(out, value, torch.ones_like(out))[0])
    torch.testing.assert_close(*results, equal_nan=True)
    assert results[0][0, 0, 2, 1] == 0


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bias_of_least_number_and_infinity(dtype):
    draw = Draw()
    query, key, value = draw(1, 1, 3, 4), draw(1, 1, 5, 4), draw(1, 1, 5, 4)
    bias = torch.zeros(3, 5, dtype=dtype)
    bias[0], bias[1], bias[2, 1:] = torch.finfo(dtype).min, -INF, torch.finfo(dtype).min
    for tensors in ((query, key, value), (query.half(), key.half(), value.half())):
        out = s2s.attention(*tensors, bias=bias).float()
        if dtype != torch.float16:  # so low that scores vanish beside it
            torch.testing.assert_close(out[0, 0, 0], tensors[2][0, 0].float().mean(0), atol=1e-3, rtol=1e-3)
        assert out[0, 0, 1].eq(0).all()
        torch.testing.assert_close(out[0, 0, 2], tensors[2][0, 0, 0].float())


@interpreted
@pytest.mark.parametrize(
    "shape",
    [(2, 2, 40, 48), (2, 1, 40, 48), (40, 48), (2, 1, 48), (2, 1, 40, 1), (1, 1), (2, 2, 1, 1)],
)
def test_the_gradient_of_a_bias_has_its_shape(shape):
    draw = Draw()
    query, key, value = draw(2, 2, 40, 8), draw(2, 1, 48, 8), draw(2, 1, 48, 8)
    options = {"bias": draw(*shape), "causal": "bottom-right", "enable_gqa": True, "return_lse": True}
    judge(((query, key, value), options))


@interpreted
@pytest.mark.parametrize("source, width", [(200, 4), (70, 300)])
@pytest.mark.parametrize("time, left", [(1, None), (50, None), (50, 49), (50, 62)])
def test_dropout_drops_what_the_definition_drops(time, left, source, width):
    """To the bit, in tiles of any width, from wherever a window or a share of the keys begins."""
    draw = Draw(torch.float16)
    query, key = draw(1, 3, time, width), draw(1, 3, source, width)
    identity = torch.eye(source, dtype=torch.float16).expand(1, 3, source, source)
    torch.manual_seed(3)
    ours = s2s.attention(query, key, identity, dropout_p=0.3, window=(left, None), causal="bottom-right")
    torch.manual_seed(3)
    keep = keep_mask(torch.randint(0, 2**63 - 1, (2,)), (1, 3, time, source), 0.3)
    distance = torch.arange(source) - torch.arange(source - time, source)[:, None]
    assert torch.equal(ours != 0, keep & (distance <= 0) & (distance >= -(source if left is None else left)))


@interpreted
@pytest.mark.parametrize("options", [{}, {"causal": "bottom-right", "window": (300, None)}, {"mask": True}])
def test_decoding_splits_the_keys(options):
    """Some of the splits may have none."""
    draw = Draw()
    query, key, value = draw(2, 6, 1, 40), draw(2, 2, 700, 40), draw(2, 2, 700, 24)
    options = dict(options)
    if "mask" in options:
        options["mask"] = draw.mask(2, 1, 1, 700)
    options |= {"key_lengths": torch.tensor([700, 150]), "enable_gqa": True, "return_lse": True}
    judge(((query, key, value), options), upstream=None)


@interpreted
@pytest.mark.parametrize("batch, heads, time, source", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_empty(batch, heads, time, source):
    leaves = [torch.ones(batch, heads, n, 4, requires_grad=True) for n in (time, source, source)]
    bias = torch.ones(1, 1, time, source, requires_grad=True)
    out, lse = s2s.attention(*leaves, bias=bias, causal="bottom-right", return_lse=True)
    grads = torch.autograd.grad(out.sum(), [*leaves, bias])
    assert out.shape == (batch, heads, time, 4) and out.eq(0).all() and lse.eq(-INF).all()
    assert all(grad.eq(0).all() for grad in grads)


@interpreted
def test_step_by_step_against_a_cache_equals_the_whole():
    draw = Draw()
    queries, keys, values = draw(2, 4, 5, 8), draw(2, 2, 5, 8), draw(2, 2, 5, 8)
    cache = [torch.full((2, 2, 40, 8), NAN) for _ in range(2)]
    steps = []
    for t in range(5):
        cache[0][:, :, t], cache[1][:, :, t] = keys[:, :, t], values[:, :, t]
        lengths = torch.full((2,), t + 1)
        steps.append(s2s.attention(queries[:, :, t : t + 1], *cache, key_lengths=lengths, enable_gqa=True))
    whole = s2s.attention(queries, keys, values, causal=True, enable_gqa=True)
    torch.testing.assert_close(torch.cat(steps, 2), whole)


@st.composite
def calls(draw):
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]))
    time, source = draw(st.integers(0, 50)), draw(st.integers(0, 90))
    batch = draw(st.integers(1, 2))
    noise = Draw(draw(st.sampled_from([torch.float32, torch.float16])), seed=draw(st.integers(0, 1000)))
    width, value_width = draw(st.sampled_from([(1, 1), (8, 8), (16, 5), (33, 64)]))
    shapes = ((batch, heads, time, width), (batch, kv_heads, source, width), (batch, kv_heads, source, value_width))
    layout = draw(st.sampled_from([transposed, heads_inside, sliced, lambda value: value]))
    pairs = st.none() | st.tuples(*(st.sampled_from([1, n]) for n in (batch, heads, time, source)))
    side = st.none() | st.integers(0, 160)
    options = {
        "causal": draw(st.sampled_from([False, True, "bottom-right"])),
        "window": draw(st.none() | st.tuples(side, side)),
        "softcap": draw(st.sampled_from([None, None, 3.0])),
        "scale": draw(st.sampled_from([None, 0.2, 0.0, -0.3])),
        "dropout_p": draw(st.sampled_from([0.0, 0.0, 0.25])),
        "return_lse": draw(st.booleans()),
        "enable_gqa": True,
    }
    if (shape := draw(pairs)) is not None:
        options["mask"] = noise.mask(*shape, p=0.7)
    if (shape := draw(pairs)) is not None:
        options["bias"] = noise(*shape, dtype=draw(st.sampled_from([None, torch.float32, torch.bfloat16])))
    if draw(st.booleans()):
        options["alibi_slopes"] = noise(heads).abs() * 0.1
    for name, most in (("query_lengths", time), ("key_lengths", source)):
        if (rows := draw(st.none() | st.lists(st.integers(0, most), min_size=batch, max_size=batch))) is not None:
            options[name] = torch.tensor(rows)
    return tuple(layout(noise(*shape)) for shape in shapes), options


@interpreted
@settings(max_examples=settings().max_examples // 4)
@given(calls())
def test_any_call_equals_the_definition(arguments):
    judge(arguments)


@interpreted
def test_the_same_bits_on_every_run():
    arguments = everything(Draw(torch.float16), dropout_p=0.2)
    runs = [dict(evaluate(s2s.attention, prepare(arguments), noise_like)) for _ in range(2)]
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


@interpreted
def test_blocks_that_a_restriction_empties_are_skipped(products):
    """Counted by the elements of their products."""

    def elements(**options):
        products.clear()
        leaves = [Draw()(1, 1, 160, 8).requires_grad_() for _ in range(3)]
        s2s.attention(*leaves, **options).sum().backward()
        return sum(products)

    whole = elements()
    assert elements(window=(32, 0)) < 0.5 * whole
    assert elements(key_lengths=torch.tensor([32]), query_lengths=torch.tensor([64])) < 0.2 * whole
    assert elements(key_lengths=torch.tensor([0])) == 0


@needs_triton
def test_no_buffer_of_the_size_of_all_pairs(monkeypatch):
    """Nor of a mask or a bias that is broadcast; launches do nothing."""
    from s2s_kernels.ops import triton_common
    from s2s_kernels.ops.attention import triton_kernels

    class Nothing:
        def __getitem__(self, grid):
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

    batch, heads, time = 4, 8, 1000
    draw = Draw()
    tensors = tuple(draw(batch, heads, time, 8) for _ in range(3))
    for bias in (draw(1, 1, 1, time), draw(1, heads, time, 1), draw(1, 1, time, time)):
        made.clear()
        rest = (draw.mask(1, 1, time, time), bias, None, None, draw(heads), torch.tensor([1, 2]))
        rest = (*rest, None, 0, False, 0.1, None, None)
        with Watch():
            out, _, softmax, _ = triton_kernels.attention_forward(*tensors, *rest, True, False)
            triton_kernels.attention_backward(out, None, out, softmax, *tensors, *rest, True, True, True, True, True)
        assert max(made) <= max(tensors[0].numel(), time * time)


@interpreted
def test_lengths_out_of_range_are_clamped_in_the_kernel():
    """On a GPU nothing waits for the lengths, so the kernels take any."""
    draw = Draw()
    tensors = (draw(2, 1, 3, 4), draw(2, 1, 9, 4), draw(2, 1, 9, 4))
    raw, rest = torch.ops.s2s.attention_forward, (None, None, None, None, False, 0.0, None, None, False, False)
    out = raw(*tensors, None, None, torch.tensor([7, 2]), torch.tensor([99, -5]), *rest)[0]
    expected = raw(*tensors, None, None, torch.tensor([3, 2]), torch.tensor([9, 0]), *rest)[0]
    assert torch.equal(out, expected) and out[1].eq(0).all()


@interpreted
def test_raw_calls_are_checked_and_keep_to_their_fakes():
    draw = Draw(torch.float16)
    tensors = (draw(2, 4, 3, 5), draw(2, 2, 6, 5), draw(2, 2, 6, 7), draw.mask(1, 1, 3, 6), draw(1, 4, 3, 6).float())
    rest = (None, torch.tensor([6, 2]), draw(4), torch.tensor([1, 2]), 2, 0, True, 0.1, None, 3.0)
    good = (*tensors, *rest, True, True)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.s2s.attention_forward, good, test_utils=tests)
    _, _, softmax, wide = torch.ops.s2s.attention_forward(*good)
    backward = (draw(2, 4, 3, 7), None, wide, softmax, *tensors, *rest, True, True, True, True, True)
    torch.library.opcheck(torch.ops.s2s.attention_backward, backward, test_utils=tests)
    wrong = {
        0: draw(2, 4, 3), 1: draw(2, 3, 6, 5), 2: draw(2, 2, 5, 7), 3: draw.mask(1, 1, 3, 5),
        4: draw(1, 4, 3, 6).double(), 6: torch.tensor([1]), 7: draw(3), 8: None, 9: -1, 12: 1.5, 14: 0.0,
    }  # fmt: skip
    for place, value in wrong.items():
        with pytest.raises(RuntimeError, match="attention_forward: "):
            torch.ops.s2s.attention_forward(*good[:place], value, *good[place + 1 :])
    with pytest.raises(RuntimeError, match="attention_backward: "):
        torch.ops.s2s.attention_backward(draw(2, 4, 3, 6), *backward[1:])


@needs_extension
@needs_triton
def test_tensors_on_a_gpu_are_served_by_triton():
    """As far as fake ones show it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), dispatch.use_backend("triton"):
        query = torch.randn(2, 4, 50, 8, device="cuda")
        assert s2s.explain(s2s.attention, query, query, query, causal=True).backend == "triton"
        with pytest.raises(NotImplementedError, match="float32, bfloat16 and float16"):
            s2s.attention(*[query.double()] * 3)
        with pytest.raises(NotImplementedError, match="float32, bfloat16 and float16"):
            s2s.attention(query, query, query, bias=torch.empty(2, 4, 50, 50, dtype=torch.float64, device="cuda"))
        with pytest.raises(NotImplementedError, match=r"2\^29"):
            s2s.attention(*[torch.empty(2, 4, n, 8, device="cuda") for n in (50, 2**29, 2**29)])
        out, lse = s2s.attention(query, query, query, key_lengths=torch.tensor([1, 2]), return_lse=True)
        assert out.shape == (2, 4, 50, 8) and lse.shape == (2, 4, 50) and out.device.type == "cuda"


# On a GPU, beside what tests/test_operators.py runs there


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_on_a_gpu(layout, dtype):
    args, kwargs = to_device(everything(Draw(dtype), time=300, source=400, width=64, value_width=64), "cuda")
    kwargs = {n: layout(v) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in kwargs.items()}
    judge((tuple(layout(v) for v in args), kwargs), backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [40, 64, 128, 256, 512, 1024])
def test_every_width_on_a_gpu(width, dtype):
    """Each has tiles of its own."""
    draw = Draw(dtype, "cuda")
    for time, options in (
        (300, {}),
        (1, {"key_lengths": torch.tensor([500, 77])}),
        (333, {"dropout_p": 0.1}),
        (9, {"dropout_p": 0.1, "mask": draw.mask(2, 1, 9, 500, p=0.8)}),
    ):
        tensors = (draw(2, 4, time, width), draw(2, 2, 500, width), draw(2, 2, 500, width))
        arguments = (tensors, {"causal": "bottom-right", "enable_gqa": True, "return_lse": True, **options})
        judge(arguments, backend="triton")


@pytest.mark.gpu
def test_a_gpu_compiles_once_for_all_lengths_takes_lengths_of_the_cpu_and_repeats_its_bits():
    from s2s_kernels.ops.attention import triton_backward, triton_forward

    draw = Draw(torch.bfloat16, "cuda")
    counts = []
    for batch, time in ((64, 700), (33, 1024), (90, 513), (10, 2048)):
        arguments = tuple(draw(batch, 8, time, 64) for _ in range(3)), {"causal": True, "dropout_p": 0.1}
        arguments[1]["key_lengths"] = torch.arange(batch) * time // batch
        first, again = (dict(evaluate(s2s.attention, prepare(arguments), noise_like)) for _ in range(2))
        assert all(torch.equal(value, again[name]) for name, value in first.items())
        kernels = (triton_forward.forward_kernel, triton_backward.query_kernel, triton_backward.key_value_kernel)
        counts.append([len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels])
    assert counts == counts[:1] * 4
    arguments[1]["dropout_p"] = 0.0
    with torch.cuda.stream(torch.cuda.Stream()):
        whole = s2s.attention(*arguments[0], **arguments[1])
    torch.cuda.synchronize()
    assert torch.equal(whole, torch.compile(s2s.attention, fullgraph=True)(*arguments[0], **arguments[1]))


@pytest.mark.gpu
def test_more_heads_than_a_grid_has_blocks_on_a_gpu():
    draw = Draw(device="cuda")
    leaves = [draw(600, 120, 2, 2).requires_grad_() for _ in range(3)]
    ours = s2s.attention(*leaves, causal=True)
    torch.testing.assert_close(ours, torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(ours.square().sum(), leaves))
