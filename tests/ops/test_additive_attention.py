"""Additive attention and attention pooling: literal values, hidden content, range, memory, prepared keys."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

import s2s_kernels as s2s
from s2s_kernels import dispatch
from s2s_kernels.testing import Draw, compare

needs_extension = pytest.mark.skipif(dispatch.extension_missing is not None, reason=str(dispatch.extension_missing))
BACKENDS = ["reference", pytest.param("cpu", marks=needs_extension)]
NAN, INF = float("nan"), float("inf")


def plain(query, key, value, weight):
    weights = (torch.tanh(query[:, :, None] + key[:, None]) @ weight).softmax(-1)
    return weights @ value, weights


def assert_right(function, arguments, backend="cpu"):
    broken = {name: by for name, by in compare(function, arguments, backend).items() if by > 0}
    assert not broken, broken


# Values


@pytest.mark.parametrize("backend", BACKENDS)
def test_literal_values(backend):
    query, key = torch.tensor([[[0.5], [-0.5]]]), torch.tensor([[[0.5], [-0.5], [-0.5]]])
    value = torch.tensor([[[0.0, 1.0], [4.0, 1.0], [4.0, 1.0]]])
    weight = torch.tensor([math.log(3) / math.tanh(1)])  # scores ln 3, 0, 0 and 0, -ln 3, -ln 3
    with s2s.use_backend(backend):
        context, weights = s2s.additive_attention(query, key, value, weight, return_weights=True)
        expected = torch.tensor([[[0.6, 0.2, 0.2], [0.6, 0.2, 0.2]]])
        torch.testing.assert_close(weights, expected)
        torch.testing.assert_close(context, torch.tensor([[[1.6, 1.0], [1.6, 1.0]]]))
        mask = torch.tensor([[True, True, False], [False, False, True]])
        context, weights = s2s.additive_attention(query, key, value, weight, mask=mask, return_weights=True)
        torch.testing.assert_close(weights, torch.tensor([[[0.75, 0.25, 0.0], [0.0, 0.0, 1.0]]]))
        torch.testing.assert_close(context, torch.tensor([[[1.0, 1.0], [4.0, 1.0]]]))
        # Row 18: both restrictions hold. Row 15: a row that sees nothing gives 0.
        lengths = torch.tensor([2], dtype=torch.int32)
        context = s2s.additive_attention(query, key, value, weight, mask=mask, key_lengths=lengths)
        torch.testing.assert_close(context, torch.tensor([[[1.0, 1.0], [0.0, 0.0]]]))
        dropped = s2s.additive_attention(query, key, value, weight, dropout_p=1.0)
        assert torch.equal(dropped, torch.zeros(1, 2, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_literal_values_of_the_pool(backend):
    x = torch.tensor([[[0.5, 0.0], [-0.5, 4.0], [NAN, INF]], [[NAN, NAN]] * 3])
    weight, bias = torch.tensor([[1.0, 0.0]]), torch.tensor([0.0])
    context = torch.tensor([math.log(3) / math.tanh(0.5) / 2])  # scores ln 3 / 2 and - ln 3 / 2
    with s2s.use_backend(backend):
        pooled, weights = s2s.attention_pool(
            x, weight, bias, context, lengths=torch.tensor([2, 0]), return_weights=True
        )
    torch.testing.assert_close(weights, torch.tensor([[0.75, 0.25, 0.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(pooled, torch.tensor([[0.25, 1.0], [0.0, 0.0]]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_plain_formula(backend):
    draw = Draw(torch.float64)
    query, key, value, weight = draw(3, 30, 17), draw(3, 140, 17), draw(3, 140, 5), draw(17)
    with s2s.use_backend(backend):
        ours = s2s.additive_attention(query, key, value, weight, return_weights=True)
    for a, b in zip(ours, plain(query, key, value, weight), strict=True):
        torch.testing.assert_close(a, b)
    x, weight, bias, context = draw(3, 200, 17), draw(6, 17), draw(6), draw(6)
    weights = ((x @ weight.mT + bias).tanh() @ context).softmax(1)
    with s2s.use_backend(backend):
        ours = s2s.attention_pool(x, weight, bias, context, return_weights=True)
    torch.testing.assert_close(ours[0], (weights[..., None] * x).sum(1))
    torch.testing.assert_close(ours[1], weights)


# Range and accuracy


@needs_extension
@pytest.mark.parametrize(
    "scale, weight_scale", [(1e-4, 1e3), (0.01, 30.0), (0.3, 1.0), (3.0, 3.0), (15.0, 1.0), (1e3, 1.0)]
)
@pytest.mark.parametrize("rows", [1, 7])
def test_accurate_whatever_the_size_of_the_numbers(scale, weight_scale, rows):
    """Row 22, and its other end: large weights on small numbers, where a sum around tanh = 1/2 would lose them."""
    draw = Draw()
    arguments = draw(2, rows, 64, scale=scale), draw(2, 90, 64, scale=scale), draw(2, 90, 3)
    assert_right(s2s.additive_attention, ((*arguments, draw(64, scale=weight_scale / 8)), {"return_weights": True}))


@needs_extension
@pytest.mark.parametrize("seed", range(3))
def test_sums_over_many_units(seed):
    """Of as many, sums of a stretch added to the whole one by one would lose digits."""
    draw = Draw(torch.float32, seed=seed)
    arguments = draw(2, 8, 1024), draw(2, 65, 1024), draw(2, 65, 64), draw(1024, scale=0.3)
    assert_right(s2s.additive_attention, (arguments, {}))


@needs_extension
@pytest.mark.parametrize("rows", [1, 2])
def test_gradients_of_a_few_rows(rows):
    """They take every key by tanh itself, and have no table of keys to be turned back."""
    draw = Draw(torch.float32)
    arguments = draw(2, rows, 100, scale=0.3), draw(2, 300, 100), draw(2, 300, 5), draw(100, scale=0.1)
    options = {"key_lengths": torch.tensor([300, 130]), "mask": draw(2, rows, 300) > -1}
    assert_right(s2s.additive_attention, (arguments, options))


@needs_extension
@pytest.mark.parametrize("seed", range(3))
def test_positions_that_are_alike_pool_to_one(seed):
    """Row 3: as if padded with the same; their scores have no gradient."""
    draw = Draw(torch.float32, seed=seed)
    x = draw(3, 1, 100).expand(3, 200, 100)
    assert_right(s2s.attention_pool, ((x, draw(100, 100, scale=0.1), draw(100, scale=0.1), draw(100)), {}))


@needs_extension
def test_queries_and_keys_that_cancel():
    """Row 22: q + k is small where q and k are +-50, or anything between."""
    steps = torch.linspace(-60, 60, 241)
    query = steps[None, :, None].expand(1, 241, 2).contiguous()
    key = (-steps + torch.linspace(-2, 2, 241))[None, :, None].expand(1, 241, 2).contiguous()
    value, weight = Draw()(1, 241, 3), torch.tensor([0.7, -0.4])
    assert_right(s2s.additive_attention, ((query, key, value, weight), {"return_weights": True}))


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_infinite_queries_keys_and_weights(dtype):
    draw = Draw(dtype)
    query, key, value, weight = draw(2, 4, 5), draw(2, 6, 5), draw(2, 6, 3), draw(5)
    for spoil in ("query", "key", "weight", "weight nan"):
        q, k, w = query.clone(), key.clone(), weight.clone()
        if spoil == "query":
            q[0, 1, 2], q[1, 0, 0], q[1, 2, 1] = INF, -INF, NAN
        elif spoil == "key":
            k[0, 1, 2], k[1, 0, 0], k[1, 0, 1] = INF, -INF, 1e30
        else:
            w[3] = NAN if spoil == "weight nan" else INF
        with s2s.use_backend("cpu"):
            ours = s2s.additive_attention(q, k, value, w, return_weights=True)
        with s2s.use_backend("reference"):
            expected = s2s.additive_attention(q, k, value, w, return_weights=True)
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-5, atol=1e-5, msg=spoil)


def test_very_large_and_very_small_weights():
    draw = Draw()
    query, key, value = draw(1, 3, 4), draw(1, 5, 4), draw(1, 5, 2)
    for size in (1e30, 1e-42, 0.0):
        weight = draw(4) * size
        ours = s2s.additive_attention(query, key, value, weight)
        with s2s.use_backend("reference"):
            torch.testing.assert_close(ours, s2s.additive_attention(query, key, value, weight))


# What is hidden


def with_gradients(query, key, value, weight, **options):
    leaves = [t.detach().clone().requires_grad_() for t in (query, key, value, weight)]
    context, weights = s2s.additive_attention(*leaves, return_weights=True, **options)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(o.shape, generator=generator) for o in (context, weights)]
    return [context, weights, *torch.autograd.grad([context, weights], leaves, upstream)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("content", [NAN, INF, -INF, 1e30, 30.0])
def test_absent_keys_leave_no_trace(backend, content):
    """Rows 11 and 14: to the bit, gradients included, and exact zeros where they are."""
    draw = Draw()
    query, key, value, weight = draw(3, 5, 9), draw(3, 140, 9), draw(3, 140, 4), draw(9)
    lengths = [130, 0, 7]
    with s2s.use_backend(backend):
        clean = with_gradients(query, key, value, weight, key_lengths=torch.tensor(lengths))
        for b, length in enumerate(lengths):
            key[b, length:], value[b, length:] = content, content
        dirty = with_gradients(query, key, value, weight, key_lengths=torch.tensor(lengths))
    for a, b in zip(clean, dirty, strict=True):
        assert b.isfinite().all() and torch.equal(a, b)
    for b, length in enumerate(lengths):
        for hidden in (dirty[1][b, :, length:], dirty[3][b, length:], dirty[4][b, length:]):
            assert not hidden.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("content", [NAN, INF, 1e30, 30.0])
def test_a_key_hidden_from_a_row_never_touches_it(backend, content):
    """Row 14: to the bit, even where another row sees it; nor does a row touch what is hidden from it."""
    draw = Draw()
    query, key, value, weight = draw(1, 4, 9), draw(1, 20, 9), draw(1, 20, 4), draw(9)
    mask = torch.ones(4, 20, dtype=torch.bool)
    mask[1:, 3] = False  # only row 0 sees key 3
    mask[0, 10:] = False
    with s2s.use_backend(backend):
        clean = with_gradients(query, key, value, weight, mask=mask)
        for spoilt in ("key", "value", "query"):
            k, v, q = key.clone(), value.clone(), query.clone()
            {"key": k[0, 3], "value": v[0, 3], "query": q[0, 0]}[spoilt].fill_(content)
            dirty = with_gradients(q, k, v, weight, mask=mask)
            assert torch.equal(clean[0][0, 1:], dirty[0][0, 1:]), spoilt
            assert torch.equal(clean[1][0, 1:], dirty[1][0, 1:]), spoilt
            assert torch.equal(clean[2][0, 1:], dirty[2][0, 1:]), spoilt
            # Keys that row 0 doesn't see get their gradient from the others alone.
            if spoilt == "query":
                for a, b in zip(clean[3:5], dirty[3:5], strict=True):
                    torch.testing.assert_close(a[0, 10:], b[0, 10:])


@needs_extension
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


# Memory


@needs_extension
def test_no_buffer_of_the_size_of_the_scores():
    """No allocation of B T S elements or more in either direction, let alone B T S A."""
    batch, rows, keys, width = 2, 700, 600, 8
    draw = Draw()
    leaves = [t.requires_grad_() for t in (draw(batch, rows, width), draw(batch, keys, width))]
    leaves += [draw(batch, keys, 5).requires_grad_(), draw(width).requires_grad_()]
    torch.use_deterministic_algorithms(False)  # filling buffers with NaN is no business of this test
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        s2s.additive_attention(*leaves, dropout_p=0.1).sum().backward()
    sizes = [e.nbytes() for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert sizes and max(sizes) < batch * rows * keys * 4 / 2


# Dropout


@needs_extension
@pytest.mark.parametrize("keys", [5, 33, 200])
def test_both_backends_drop_the_same(keys):
    draw = Draw()
    arguments = draw(2, 30, 4), draw(2, keys, 4), torch.eye(keys).expand(2, -1, -1), draw(4)
    used = {}
    for backend in ("cpu", "reference"):
        torch.manual_seed(5)
        with s2s.use_backend(backend):
            used[backend] = s2s.additive_attention(*arguments, dropout_p=0.3)
    assert torch.equal(used["cpu"] == 0, used["reference"] == 0)
    torch.testing.assert_close(used["cpu"], used["reference"])
    share = (used["cpu"] == 0).double().mean().item()
    assert abs(share - 0.3) < 5 * (0.21 / used["cpu"].numel()) ** 0.5


# Prepared keys


@pytest.mark.parametrize("backend", BACKENDS)
def test_prepared_keys_step_by_step(backend):
    draw = Draw()
    query, key, value, weight = draw(3, 6, 7), draw(3, 150, 7), draw(3, 150, 4), draw(7)
    key[1, 5] = 40.0  # out of the table's range
    lengths = torch.tensor([150, 9, 0])
    with s2s.use_backend(backend):
        keys = s2s.prepare_additive_keys(key, value, lengths)
        whole = s2s.additive_attention(query, key, value, weight, key_lengths=lengths)
        steps = [s2s.additive_attention(query[:, t : t + 1], keys, None, weight) for t in range(6)]
        torch.testing.assert_close(torch.cat(steps, 1), whole)
        order = torch.tensor([1, 1, 0])  # row 40: beams reordered and duplicated
        ours = s2s.additive_attention(query[order], keys.reorder(order), None, weight)
        torch.testing.assert_close(ours, whole[order])
        few = torch.tensor([2])
        torch.testing.assert_close(s2s.additive_attention(query[few], keys.reorder(few), None, weight), whole[few])


def test_prepared_keys_differentiate():
    draw = Draw(torch.float64)
    leaves = [t.requires_grad_() for t in (draw(2, 3, 5), draw(2, 9, 5), draw(2, 9, 4), draw(5))]
    query, key, value, weight = leaves
    expected = torch.autograd.grad(s2s.additive_attention(query, key, value, weight).sum(), leaves)
    keys = s2s.prepare_additive_keys(key, value)
    for a, b in zip(
        torch.autograd.grad(s2s.additive_attention(query, keys, None, weight).sum(), leaves), expected, strict=True
    ):
        torch.testing.assert_close(a, b)


def test_prepared_keys_under_autocast():
    draw = Draw()
    query, key, value, weight = draw(2, 3, 5), draw(2, 9, 5), draw(2, 9, 4), draw(5)
    keys = s2s.prepare_additive_keys(key, value)
    with torch.autocast("cpu", torch.bfloat16):
        ours = s2s.additive_attention(query, keys, None, weight)
        expected = s2s.additive_attention(query, key, value, weight)
        inside = s2s.additive_attention(query, s2s.prepare_additive_keys(key, value), None, weight)
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, expected) and torch.equal(inside, expected)


@pytest.mark.parametrize("argument", ["key", "value", "key_lengths"])
def test_preparing_refuses_by_name(argument):
    draw = Draw()
    wrong = {"key": draw(9, 5), "value": draw(2, 8, 4), "key_lengths": torch.tensor([10, 1])}
    arguments = {"key": draw(2, 9, 5), "value": draw(2, 9, 4), "key_lengths": None, argument: wrong[argument]}
    with pytest.raises(ValueError, match=rf"\b{argument}\b"):
        s2s.prepare_additive_keys(**arguments)


# Anything


@st.composite
def calls(draw):
    sizes = {
        "batch": draw(st.integers(0, 3)),
        "rows": draw(st.sampled_from([0, 1, 2, 3, 24, 25, 49])),
        "keys": draw(st.sampled_from([0, 1, 5, 17, 64, 127, 128, 129, 260])),
        "width": draw(st.sampled_from([0, 1, 2, 7, 16, 33])),
        "values": draw(st.sampled_from([0, 1, 5, 16, 33])),
    }
    return sizes, {
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        "scale": draw(st.sampled_from([0.01, 1.0, 8.0, 50.0])),
        "mask": draw(st.sampled_from([None, (0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 1, 0), (1, 1, 1)])),
        "lengths": draw(st.booleans()),
        "dropout": draw(st.sampled_from([0.0, 0.0, 0.5])),
        "weights": draw(st.booleans()),
        "layout": draw(st.sampled_from(["plain", "transposed", "expanded", "sliced"])),
        "seed": draw(st.integers(0, 1000)),
    }


def laid_out(x, layout):
    if layout == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "expanded":
        return x[:1].expand(x.shape) if x.shape[0] else x
    if layout == "sliced":
        return torch.cat([x, x], -1)[..., ::2] if x.shape[-1] else x
    return x


@needs_extension
@given(calls())
def test_any_call(made):
    sizes, options = made
    batch, rows, keys, width, values = sizes.values()
    draw = Draw(options["dtype"], seed=options["seed"])
    query, key = draw(batch, rows, width, scale=options["scale"]), draw(batch, keys, width, scale=options["scale"])
    value, weight = draw(batch, keys, values), draw(width, scale=max(width, 1) ** -0.5)
    arguments = {"return_weights": options["weights"], "dropout_p": options["dropout"]}
    if options["mask"] is not None:
        shape = [size if kept else 1 for size, kept in zip((batch, rows, keys), options["mask"], strict=True)]
        arguments["mask"] = draw.mask(*shape, p=0.7)
    if options["lengths"]:
        arguments["key_lengths"] = draw.integers(0, keys + 1, batch)
    query, key, value = (laid_out(x, options["layout"]) for x in (query, key, value))
    assert_right(s2s.additive_attention, ((query, key, value, weight), arguments))
