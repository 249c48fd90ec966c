"""The Triton kernels of additive attention and attention pooling without a GPU: their values by Triton's interpreter,
and what they compile to."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreting import emulating, interpreted, judging, needs_extension, needs_triton
from torch.profiler import ProfilerActivity, profile

import s2s_kernels as s2s
from s2s_kernels import dispatch
from s2s_kernels.testing import CASES, Draw, evaluate, noise_like, prepare
from s2s_kernels.testing.emulation import unavailable
from s2s_kernels.testing.layouts import sliced, transposed

pytestmark = emulating()
judge = judging(s2s.additive_attention)
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module", autouse=True)
def real_tiles(kernels):
    """Gradients are made with larger tiles, which the interpreter takes no longer for; yields the real ones."""
    if unavailable() is not None:
        yield
        return
    from s2s_kernels.ops.additive_attention import triton_kernels

    with pytest.MonkeyPatch.context() as patch:
        chosen = triton_kernels._gradient_tiles
        patch.setattr(triton_kernels, "_gradient_tiles", lambda dtype: {**chosen(dtype), "KEYS": 64})
        yield chosen


@interpreted
def test_prepared_keys_step_by_step():
    draw = Draw()
    query, key, value, weight = draw(3, 3, 7), draw(3, 50, 7), draw(3, 50, 4), draw(7)
    lengths = torch.tensor([50, 9, 0])
    keys = s2s.prepare_additive_keys(key, value, lengths)
    whole = s2s.additive_attention(query, key, value, weight, key_lengths=lengths)
    for t in range(3):
        step = s2s.additive_attention(query[:, t : t + 1], keys, None, weight)
        torch.testing.assert_close(step[:, 0], whole[:, t])
    order = torch.tensor([1, 1, 0])
    step = s2s.additive_attention(query[order][:, :1], keys.reorder(order), None, weight)
    torch.testing.assert_close(step[:, 0], whole[order, 0])


@interpreted
def test_several_tiles(monkeypatch, real_tiles):
    """The real tiles, a workspace of which a row of the batch takes several, and several shares of the gradients."""
    from s2s_kernels.ops.additive_attention import triton_kernels

    monkeypatch.setattr(triton_kernels, "PAIRS", 40 * 34)
    monkeypatch.setattr(triton_kernels, "_gradient_tiles", real_tiles)
    draw = Draw()
    query, key, value, weight = draw(2, 43, 40), draw(2, 34, 40), draw(2, 34, 35), draw(40, scale=0.2)
    parts = list(triton_kernels._parts(query, key, value, None, None))
    assert [(part.batch.start, part.rows.start, part.rows.stop) for part in parts][:3] == [
        (0, 0, 32),
        (0, 32, 43),
        (1, 0, 32),
    ]
    assert triton_kernels._shares(parts[0], 40) == 2
    options = {"mask": draw.mask(43, 34, p=0.8), "dropout_p": 0.3, "key_lengths": torch.tensor([34, 7])}
    judge(((query, key, value, weight), {**options, "return_weights": True}))


@interpreted
def test_no_buffer_of_the_size_of_the_scores(monkeypatch):
    """No allocation of B T S elements or more in either direction, let alone B T S A, but a workspace of PAIRS."""
    from s2s_kernels.ops.additive_attention import triton_kernels

    batch, rows, keys = 1, 80, 40
    monkeypatch.setattr(triton_kernels, "PAIRS", 16 * keys)
    draw = Draw()
    leaves = [draw(batch, rows, 8), draw(batch, keys, 8), draw(batch, keys, 5), draw(8)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    torch.use_deterministic_algorithms(False)  # filling buffers with NaN is no business of this test
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        s2s.additive_attention(*leaves, dropout_p=0.1).sum().backward()
    sizes = [event.nbytes() for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert sizes and max(sizes) < batch * rows * keys * 4 / 2


@interpreted
def test_lengths_that_are_no_neighbours_in_memory():
    draw, lengths = Draw(), torch.tensor([6, 7, 3, 7, 0, 7])[::2]
    judge(((draw(3, 2, 5), draw(3, 6, 5), draw(3, 6, 4), draw(5)), {"key_lengths": lengths}))
    judge(((draw(3, 6, 5), draw(4, 5), draw(4), draw(4)), {"lengths": lengths}), s2s.attention_pool)


def given_weights_alone(query, key, value, weight):
    return s2s.additive_attention(query, key, value, weight, return_weights=True)[1]


@interpreted
def test_a_gradient_of_the_weights_alone():
    draw = Draw()
    judge(((draw(2, 3, 5), draw(2, 6, 5), draw(2, 6, 4), draw(5)), {}), given_weights_alone)


@interpreted
@pytest.mark.parametrize(
    "scale, weight_scale", [(1e-4, 1e3), (15.0, 1.0), (1e3, 1.0)], ids=["small numbers, large weights", "15", "1000"]
)
def test_accurate_whatever_the_size_of_the_numbers(scale, weight_scale):
    """Row 22, and its other end."""
    draw = Draw()
    arguments = draw(1, 7, 64, scale=scale), draw(1, 30, 64, scale=scale), draw(1, 30, 3)
    judge(((*arguments, draw(64, scale=weight_scale / 8)), {"return_weights": True}))


@interpreted
def test_tanh_is_accurate_everywhere():
    """Row 22: the scores of one unit, from the smallest numbers to infinity, and where q + k is small between large
    ones."""
    from s2s_kernels.ops.additive_attention import triton_kernels

    steps = torch.cat([torch.logspace(-30, 0, 9), torch.linspace(1.5, 9.5, 9), torch.tensor([50.0, 1e30, INF, NAN])])
    query, key = torch.cat([steps, -steps]), torch.cat([-steps * 1.001, torch.tensor([0.0, 0.3])])
    part = next(triton_kernels._parts(query[None, :, None], key[None, :, None], key[None, :, None], None, None))
    scores = torch.empty(query.numel() * key.numel())
    triton_kernels._scores(part, torch.ones(1), scores)
    exact = (query[:, None] + key).double().tanh()
    error = (scores.view_as(exact) - exact).abs()
    assert (exact.isnan() == scores.view_as(exact).isnan()).all()
    assert (error <= 6 * torch.finfo(torch.float32).eps * exact.abs()).masked_fill(exact.isnan(), True).all()


@interpreted
def test_the_hardware_tanh_suffices_where_bfloat16_is_judged(monkeypatch):
    """In float16, since the interpreter knows no product of bfloat16, but by bfloat16's measure."""
    from s2s_kernels.ops.additive_attention import triton_kernels

    monkeypatch.setattr(triton_kernels, "hardware_tanh", lambda dtype: True)
    draw = Draw(torch.float16)
    arguments = draw(2, 9, 256), draw(2, 20, 256), draw(2, 20, 16), draw(256, scale=1 / 4)
    options = {"mask": draw.mask(9, 20, p=0.7)}
    ours = dict(evaluate(s2s.additive_attention, prepare((arguments, options)), noise_like))
    with s2s.use_backend("reference"):
        exact = dict(evaluate(s2s.additive_attention, prepare((arguments, options), torch.float64), noise_like))
    for (name, a), b in zip(ours.items(), exact.values(), strict=True):
        bound = 4 * torch.finfo(torch.bfloat16).eps * b.abs().max().clamp(min=1)
        assert 0 < (a - b).abs().max() <= bound, name


@interpreted
def test_the_same_mask_of_dropout_bit_for_bit():
    seed = torch.tensor([-(2**62) - 12345, 2**61 + 7])
    draw = Draw()
    query, key, value, weight = draw(2, 5, 3), draw(2, 70, 3), torch.eye(70).expand(2, -1, -1), draw(3)
    shared = query, key, value, weight, None, None, seed, None, None, 0.4, False, False
    used = torch.ops.s2s.additive_attention_forward(*shared)[0]
    assert torch.equal(used != 0, s2s.ops.random.keep_mask(seed, (2, 5, 70), 0.4))


def with_gradients(query, key, value, weight, **options):
    leaves = [t.detach().clone().requires_grad_() for t in (query, key, value, weight)]
    context, weights = s2s.additive_attention(*leaves, return_weights=True, **options)
    upstream = [noise_like(context, 0), noise_like(weights, 1)]
    return [context, weights, *torch.autograd.grad([context, weights], leaves, upstream)]


@interpreted
@pytest.mark.parametrize("content", [NAN, INF])
def test_what_is_hidden_leaves_no_trace(content):
    """Rows 11 and 14, to the bit: beyond a length, and behind a mask that another row sees through."""
    draw = Draw()
    query, key, value, weight = draw(2, 4, 9), draw(2, 40, 9), draw(2, 40, 4), draw(9)
    lengths, mask = torch.tensor([38, 0]), torch.ones(4, 40, dtype=torch.bool)
    mask[1:, 3] = False  # only row 0 sees key 3
    clean = with_gradients(query, key, value, weight, key_lengths=lengths, mask=mask)
    key[0, 38:], value[0, 38:], key[1], value[1] = content, content, content, content
    dirty = with_gradients(query, key, value, weight, key_lengths=lengths, mask=mask)
    for a, b in zip(clean, dirty, strict=True):
        assert b.isfinite().all() and torch.equal(a, b)
    assert not dirty[3][0, 38:].any() and not dirty[4][1].any() and not dirty[0][1].any()
    for spoilt in ("key", "value", "query"):
        k, v, q = key.clone(), value.clone(), query.clone()
        {"key": k[0, 3], "value": v[0, 3], "query": q[0, 0]}[spoilt].fill_(content)
        dirty = with_gradients(q, k, v, weight, key_lengths=lengths, mask=mask)
        for place in range(3):
            assert torch.equal(clean[place][0, 1:], dirty[place][0, 1:]), spoilt


@interpreted
def test_the_incoming_gradient_of_one_row_stays_with_it():
    draw = Draw()
    leaves = [t.requires_grad_() for t in (draw(1, 3, 5), draw(1, 8, 5), draw(1, 8, 4), draw(5))]
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[1, 4:] = False
    upstream = draw(1, 3, 4)
    upstream[0, 1] = NAN
    grads = torch.autograd.grad(s2s.additive_attention(*leaves, mask=mask), leaves, upstream)
    assert grads[0][0, [0, 2]].isfinite().all() and grads[0][0, 1].isnan().all()
    assert grads[1][0, 4:].isfinite().all() and grads[2][0, 4:].isfinite().all()


@st.composite
def calls(draw):
    batch, rows, keys = (
        draw(st.integers(0, 2)),
        draw(st.sampled_from([0, 1, 2, 9])),
        draw(st.sampled_from([0, 1, 5, 40])),
    )
    width, values = draw(st.sampled_from([0, 1, 33])), draw(st.sampled_from([0, 5, 33]))
    noise = Draw(draw(st.sampled_from([torch.float32, torch.float16])), seed=draw(st.integers(0, 1000)))
    scale, layout = draw(st.sampled_from([0.01, 1.0, 50.0])), draw(st.sampled_from([transposed, sliced, lambda v: v]))
    options = {"return_weights": draw(st.booleans()), "dropout_p": draw(st.sampled_from([0.0, 0.0, 0.5]))}
    if draw(st.booleans()):
        options["mask"] = noise.mask(rows, keys, p=0.7)
    if draw(st.booleans()):
        options["key_lengths"] = noise.integers(0, keys + 1, batch)
    query, key, value = noise(batch, rows, width, scale=scale), noise(batch, keys, width), noise(batch, keys, values)
    return (layout(query), layout(key), layout(value), noise(width, scale=max(width, 1) ** -0.5)), options


@interpreted
@settings(max_examples=settings().max_examples // 4)
@given(calls())
def test_any_call_equals_the_definition(arguments):
    judge(arguments)


@interpreted
@pytest.mark.parametrize("operator", ["additive_attention", "attention_pool"])
def test_the_same_bits_on_every_run(operator):
    arguments = CASES[operator].samples[1].build(Draw(torch.float16))
    runs = [dict(evaluate(CASES[operator].function, prepare(arguments), noise_like)) for _ in range(2)]
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


@interpreted
def test_raw_calls_are_checked_clamped_and_keep_to_their_fakes():
    draw, none = Draw(), None
    query, key, value, weight = draw(2, 3, 5), draw(2, 7, 5), draw(2, 7, 4), draw(5)
    lengths = torch.tensor([99, -5])  # on a GPU nothing waits for the lengths, so the kernels take any
    good = (query, key, value, weight, none, lengths, none, none, none, 0.0, True, True)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.s2s.additive_attention_forward, good, test_utils=utils)
    context, weights, statistics = torch.ops.s2s.additive_attention_forward(*good)
    assert weights[0].sum(-1).allclose(torch.ones(3)) and not weights[1].any() and not context[1].any()
    backward = (context, weights, query, key, value, weight, statistics, none, lengths, none, none, none, 0.0)
    backward = (*backward, True, True, False, True)
    torch.library.opcheck(torch.ops.s2s.additive_attention_backward, backward, test_utils=utils)
    for place, wrong in {0: context[:1], 1: weights[:, :2], 6: statistics[:, :2], 2: draw(2, 3, 4)}.items():
        with pytest.raises(RuntimeError, match="additive_attention_backward: "):
            torch.ops.s2s.additive_attention_backward(*backward[:place], wrong, *backward[place + 1 :])
    for place, wrong in {0: draw(2, 3, 4), 1: draw(7, 5), 2: draw(2, 6, 4), 3: draw(4), 5: lengths[:1]}.items():
        with pytest.raises(RuntimeError, match="additive_attention_forward: "):
            torch.ops.s2s.additive_attention_forward(*good[:place], wrong, *good[place + 1 :])
    x, weight = draw(2, 7, 5), draw(3, 5)
    good = (x, weight, draw(3), draw(3), lengths)
    torch.library.opcheck(torch.ops.s2s.attention_pool_forward, good, test_utils=utils)
    pooled, weights = torch.ops.s2s.attention_pool_forward(*good)
    backward = (pooled, none, *good[:4], weights, lengths)
    torch.library.opcheck(torch.ops.s2s.attention_pool_backward, backward, test_utils=utils)
    for place, wrong in {0: draw(2, 7, 4), 1: draw(3), 2: draw(4), 4: lengths[:1]}.items():
        with pytest.raises(RuntimeError, match="attention_pool_forward: "):
            torch.ops.s2s.attention_pool_forward(*good[:place], wrong, *good[place + 1 :])


@needs_extension
@needs_triton
def test_tensors_on_a_gpu_are_served_by_triton():
    """As far as fake ones show it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), dispatch.use_backend("triton"):
        sizes = ((2, 3, 8), (2, 5, 8), (2, 5, 4), (8,))
        query, key, value, weight = (torch.randn(*size, device="cuda") for size in sizes)
        assert s2s.explain(s2s.additive_attention, query, key, value, weight).backend == "triton"
        prepared = s2s.prepare_additive_keys(key, value)
        assert prepared.table is None
        context = s2s.additive_attention(query, prepared, None, weight)
        assert context.shape == (2, 3, 4) and context.device.type == "cuda"
        of_pool = (torch.randn(*size, device="cuda") for size in ((4, 8), (4,), (4,)))
        assert s2s.explain(s2s.attention_pool, key, *of_pool).backend == "triton"
        with pytest.raises(NotImplementedError, match="float32, bfloat16 and float16"):
            s2s.additive_attention(*(t.double() for t in (query, key, value, weight)))


# On a GPU, beside what tests/test_operators.py runs there


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_gpu_compiles_once_for_all_lengths_and_keeps_within_its_memory(dtype):
    from s2s_kernels.ops.additive_attention import triton_kernels

    draw, counts = Draw(dtype, "cuda"), []
    weight = draw(256, scale=1 / 16)
    for batch, rows, keys in ((4, 70, 100), (3, 64, 128), (9, 33, 75), (1, 800, 2048)):
        leaves = [draw(batch, rows, 256), draw(batch, keys, 256), draw(batch, keys, 32), weight]
        arguments = tuple(leaves), {"key_lengths": torch.arange(batch) * keys // batch, "dropout_p": 0.1}
        first, again = (dict(evaluate(s2s.additive_attention, prepare(arguments), noise_like)) for _ in range(2))
        assert all(torch.equal(value, again[name]) for name, value in first.items())
        counts.append(len(triton_kernels.scores_kernel.device_caches[torch.cuda.current_device()][0]))
    assert counts == counts[:1] * 4
    torch.use_deterministic_algorithms(False)  # filling buffers with NaN is no business of what follows
    args, kwargs = prepare(((draw(2, 4000, 16), draw(2, 3000, 16), draw(2, 3000, 8), draw(16)), {"dropout_p": 0.1}))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    s2s.additive_attention(*args, **kwargs).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 2 * 4000 * 3000  # bytes: not even one for each score
