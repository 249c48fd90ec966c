"""Bahdanau's and Luong's attention and the pooling, as layers, against the plain formulas of their papers."""

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import s2s_kernels as s2s
from s2s_kernels.ops.random import draw_seed, keep_mask
from s2s_kernels.testing import Draw

NAN = float("nan")


def masked_softmax(scores, visible):
    weights = torch.where(visible, scores, -torch.inf).softmax(-1)
    return torch.where(visible, weights, 0).nan_to_num(0.0)


def visible_of(query, key, mask, lengths):
    visible = torch.ones(query.shape[0], query.shape[1], key.shape[1], dtype=torch.bool)
    if mask is not None:
        visible = visible & mask
    if lengths is not None:
        visible = visible & (torch.arange(key.shape[1]) < lengths[:, None, None])
    return visible


def bahdanau(layer, query, key, value, visible):
    s, h = layer.query_projection(query), F.linear(key, layer.key_projection.weight)
    weights = masked_softmax((s[:, :, None] + h[:, None]).tanh() @ layer.weight, visible)
    return weights @ value, weights


def luong(layer, query, key, value, visible, lengths=None):
    if layer.score == "dot":
        scores = query @ key.mT
    elif layer.score == "general":
        scores = torch.einsum("btq,kq,bsk->bts", query, layer.projection.weight, key)
    elif layer.score == "location":
        scores = (query @ layer.projection.weight.mT)[..., : key.shape[1]]
    else:
        both = torch.cat([layer.query_projection.weight, layer.key_projection.weight], 1)  # W_a
        pairs = torch.cat(
            [query[:, :, None].expand(-1, -1, key.shape[1], -1), key[:, None].expand(-1, query.shape[1], -1, -1)], -1
        )
        scores = (pairs @ both.mT).tanh() @ layer.weight
    if layer.window is None:
        weights = masked_softmax(scores, visible)
    else:
        length = key.shape[1] if lengths is None else lengths[:, None]
        at = length * torch.sigmoid(layer.position_projection(query).tanh() @ layer.position_weight)
        distance = torch.arange(key.shape[1]) - at[..., None]
        sigma = layer.window / 2
        weights = masked_softmax(scores, visible & (distance.abs() <= layer.window))
        weights = weights * torch.exp(-(distance**2) / (2 * sigma**2))
    return weights @ value, weights


def compare(layer, formula, inputs, **options):
    """Outputs and all gradients of a layer and of its formula."""

    def run(function):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        outputs = function(*leaves)
        total = sum((o * torch.linspace(-1, 2, o.numel(), dtype=o.dtype).view_as(o)).sum() for o in outputs)
        wanted = [*leaves, *layer.parameters()]
        grads = torch.autograd.grad(total, wanted, allow_unused=True)
        return [*outputs, *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, wanted, strict=True))]

    for a, b in zip(run(lambda *x: layer(*x, return_weights=True, **options)), run(formula), strict=True):
        torch.testing.assert_close(a, b)
    context, _ = layer(*inputs, return_weights=True, **options)
    torch.testing.assert_close(layer(*inputs, **options), context)


@pytest.mark.parametrize("bias", [False, True])
def test_bahdanau(bias):
    draw = Draw(torch.float64)
    layer = s2s.nn.AdditiveAttention(4, 6, 5, bias=bias, dtype=torch.float64)
    names = {"weight", "query_projection.weight", "key_projection.weight"}
    assert set(layer.state_dict()) == names | ({"query_projection.bias"} if bias else set())
    inputs = draw(3, 4, 4), draw(3, 7, 6), draw(3, 7, 2)
    mask, lengths = draw.mask(4, 7, p=0.7), torch.tensor([7, 0, 3])

    def formula(q, k, v):
        return bahdanau(layer, q, k, v, visible_of(q, k, mask, lengths))

    compare(layer, formula, inputs, mask=mask, key_lengths=lengths)
    torch.testing.assert_close(layer(inputs[0], inputs[1]), layer(inputs[0], inputs[1], inputs[1]))


def test_bahdanau_step_by_step():
    draw = Draw()
    layer = s2s.nn.AdditiveAttention(4, 6, 5)
    query, key, lengths = draw(2, 3, 4), draw(2, 7, 6), torch.tensor([7, 2])
    key[1, 2:] = NAN
    keys = layer.prepare(key, key_lengths=lengths)
    steps = [layer(query[:, t : t + 1], keys) for t in range(3)]
    torch.testing.assert_close(torch.cat(steps, 1), layer(query, key, key_lengths=lengths))


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_what_a_mask_hides_of_prepared_keys_reaches_no_gradient(bad):
    """And what it doesn't is NaN."""
    draw, layer = Draw(), s2s.nn.AdditiveAttention(4, 6, 5)
    query, key, mask = draw(2, 3, 4), draw(2, 7, 6), torch.ones(2, 3, 7, dtype=torch.bool)
    key[0, 2, 3], mask[0, :, 2] = bad, False
    value, leaves = draw(2, 7, 3), list(layer.parameters())
    ours, wanted = layer(query, layer.prepare(key, value), mask=mask), layer(query, key, value, mask=mask)
    torch.testing.assert_close(ours, wanted)
    for a, b in zip(*(torch.autograd.grad(out.sum(), leaves) for out in (ours, wanted)), strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b)
    seen = layer(query, layer.prepare(key, value))
    assert seen[0].isnan().all() and seen[1].isfinite().all()
    assert torch.autograd.grad(seen.sum(), layer.key_projection.weight)[0].isnan().any()


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("score", s2s.nn.LuongAttention.SCORES)
@pytest.mark.parametrize("restricted", [False, True])
def test_luong(score, window, restricted):
    draw = Draw(torch.float64)
    layer = s2s.nn.LuongAttention(
        6, 6, score, window=window, max_length=9 if score == "location" else None, dtype=torch.float64
    )
    inputs = draw(3, 4, 6), draw(3, 8, 6), draw(3, 8, 2)
    mask, lengths = (draw.mask(4, 8, p=0.8), torch.tensor([8, 0, 5])) if restricted else (None, None)

    def formula(q, k, v):
        return luong(layer, q, k, v, visible_of(q, k, mask, lengths), lengths)

    compare(layer, formula, inputs, mask=mask, key_lengths=lengths)


def test_luong_literal():
    layer = s2s.nn.LuongAttention(1, 1)
    three = torch.tensor([[[0.0], [1.0986123]]])
    assert not list(layer.parameters())
    torch.testing.assert_close(
        layer(torch.ones(1, 1, 1), three, torch.tensor([[[0.0], [4.0]]])), torch.full((1, 1, 1), 3.0)
    )
    local = s2s.nn.LuongAttention(1, 1, window=2)
    with torch.no_grad():
        local.position_weight.zero_()  # p = S / 2
    value = torch.eye(8)[None]
    # S = 8: p = 4, within 2 lie 2..6, uniform times exp(-d^2 / 2)
    expected = torch.tensor([0, 0, 4.0, 1, 0, 1, 4, 0]).neg().div(2).exp() / 5
    expected[[0, 1, 7]] = 0
    torch.testing.assert_close(local(torch.zeros(1, 1, 1), torch.zeros(1, 8, 1), value)[0, 0], expected)


@pytest.mark.parametrize("score", s2s.nn.LuongAttention.SCORES)
@pytest.mark.parametrize("window", [None, 1])
def test_a_value_that_a_row_does_not_see_never_touches_it(score, window):
    """Row 14: hidden by a mask, or by the window alone."""
    layer = s2s.nn.LuongAttention(6, 6, score, window=window, max_length=8 if score == "location" else None)
    draw = Draw()
    query, key, value = draw(1, 2, 6), draw(1, 7, 6), draw(1, 7, 3)
    if window is not None:
        with torch.no_grad():
            layer.position_weight.zero_()  # p = S / 2: positions 3 and 4
    mask = torch.ones(1, 2, 7, dtype=torch.bool)
    mask[0, 1, 3] = False
    clean = layer(query, key, value, mask=mask)
    value[0, 3, 0] = NAN
    dirty = layer(query, key, value, mask=mask)
    assert dirty[0, 0].isnan().any() and torch.equal(dirty[0, 1], clean[0, 1])
    if window is not None:
        value[0, 3], value[0, 0] = 0.0, NAN
        assert layer(query, key, value).isfinite().all()


@pytest.mark.parametrize("score", s2s.nn.LuongAttention.SCORES)
@pytest.mark.parametrize("window", [None, 2])
def test_absent_positions_leave_no_trace(score, window):
    """Row 14, parameters' gradients included."""
    draw = Draw()
    layer = s2s.nn.LuongAttention(6, 6, score, window=window, max_length=8 if score == "location" else None)
    query, key, lengths = draw(2, 3, 6).requires_grad_(), draw(2, 8, 6), torch.tensor([5, 0])
    results = []
    for content in (0.0, NAN):
        key[0, 5:], key[1] = content, content
        layer.zero_grad()
        query.grad = None
        context, weights = layer(query, key, key_lengths=lengths, return_weights=True)
        (context.sum() + weights.square().sum()).backward()
        results.append([context, weights, query.grad, *(p.grad for p in layer.parameters() if p.grad is not None)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("score", s2s.nn.LuongAttention.SCORES)
@pytest.mark.parametrize("window", [None, 2])
def test_a_value_hidden_from_a_row_leaves_no_trace_in_it(score, window):
    """Another row sees it, which is NaN, gradient and all."""
    draw = Draw()
    layer = s2s.nn.LuongAttention(6, 6, score, window=window, max_length=8 if score == "location" else None)
    if window is not None:
        with torch.no_grad():
            layer.position_weight.zero_()  # p = S / 2: the window has the position
    query, key, value = draw(2, 3, 6).requires_grad_(), draw(2, 8, 6), draw(2, 8, 5)
    mask = torch.ones(2, 3, 8, dtype=torch.bool)
    mask[0, 1:, 4] = False
    results = []
    for content in (0.0, NAN):
        value[0, 4, 1] = content
        context = layer(query, key, value, mask=mask)
        (grad,) = torch.autograd.grad(context.square().sum(), query)
        results.append([context[0, 1:], context[1], grad[0, 1:], grad[1]])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert context[0, 0, 1].isnan()
    assert grad[0, 0].isnan().any()


def test_absent_keys_leave_no_trace_in_bahdanaus():
    draw = Draw()
    layer = s2s.nn.AdditiveAttention(4, 6, 5)
    query, key, lengths = draw(2, 3, 4), draw(2, 7, 6), torch.tensor([4, 0])
    key[0, 4:], key[1] = NAN, NAN
    mask = torch.ones(2, 1, 7, dtype=torch.bool)
    mask[0, 0, 2] = False
    key[0, 2] = NAN
    layer(query, key, key_lengths=lengths, mask=mask).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize(
    "build",
    [
        lambda: s2s.nn.AdditiveAttention(6, 6, 5, dropout=0.5),
        lambda: s2s.nn.LuongAttention(6, 6, dropout=0.5),
        lambda: s2s.nn.LuongAttention(6, 6, "concat", window=3, dropout=0.5),
    ],
)
def test_dropout_only_in_training(build):
    draw, layer = Draw(), build()
    query, key = draw(2, 3, 6), draw(2, 8, 6)
    expected = layer.eval()(query, key)
    assert torch.equal(layer(query, key), expected)
    assert not torch.allclose(layer.train()(query, key), expected)


def test_dropout_of_the_falloff_draws_the_mask_of_the_operators():
    draw, layer = Draw(), s2s.nn.LuongAttention(6, 6, "concat", window=3, dropout=0.5)
    query, key = draw(2, 3, 6), draw(2, 8, 6)
    torch.manual_seed(3)
    context, weights = layer(query, key, return_weights=True)
    torch.manual_seed(3)
    kept = keep_mask(draw_seed(query.device), (2, 3, 8), 0.5)
    torch.testing.assert_close(context, torch.where(kept, weights * 2, 0) @ key)


def test_the_pool():
    draw = Draw(torch.float64)
    layer = s2s.nn.AttentionPool(4, 5, dtype=torch.float64)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "weight": (5, 4),
        "bias": (5,),
        "context": (5,),
    }
    lengths = torch.tensor([6, 0, 2])

    def formula(x):
        scores = torch.tanh(x @ layer.weight.mT + layer.bias) @ layer.context
        weights = masked_softmax(scores, torch.arange(6) < lengths[:, None])
        return (weights[..., None] * x).sum(1), weights

    compare(layer, formula, (draw(3, 6, 4),), lengths=lengths)


@pytest.mark.parametrize(
    "arguments, argument",
    [
        (((6, 6), {"score": "cosine"}), "score"),
        (((6, 5), {}), "key_size"),
        (((6, 6), {"score": "location"}), "max_length"),
        (((6, 6), {"max_length": 3}), "max_length"),
        (((6, 6), {"window": 0}), "window"),
    ],
    ids=str,
)
def test_bad_constructors_are_refused(arguments, argument):
    with pytest.raises(ValueError, match=argument):
        s2s.nn.LuongAttention(*arguments[0], **arguments[1])


def test_bad_input_is_refused_by_name():
    draw = Draw()
    layers = s2s.nn.AdditiveAttention(4, 4, 5), s2s.nn.LuongAttention(4, 4), s2s.nn.LuongAttention(4, 4, "concat")
    for layer in layers:
        with pytest.raises(ValueError, match="mask"):
            layer(draw(2, 3, 4), draw(2, 5, 4), mask=torch.ones(4, 5, dtype=torch.bool))
        with pytest.raises(ValueError, match="key_lengths"):
            layer(draw(2, 3, 4), draw(2, 5, 4), key_lengths=torch.tensor([1, 6]))
        with pytest.raises(ValueError, match="key"):
            layer(draw(2, 3, 4), draw(5, 4))
    with pytest.raises(ValueError, match="max_length"):
        s2s.nn.LuongAttention(4, 4, "location", max_length=3)(draw(2, 3, 4), draw(2, 5, 4))


@given(
    st.sampled_from(s2s.nn.LuongAttention.SCORES),
    st.sampled_from([None, 1, 4]),
    st.integers(1, 4),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
    st.integers(0, 100),
)
def test_luong_on_any_shape(score, window, rows, keys, masked, with_lengths, seed):
    draw = Draw(torch.float64, seed=seed)
    torch.manual_seed(seed)
    size = 5 if score == "dot" else 3
    layer = s2s.nn.LuongAttention(
        5, size, score, window=window, max_length=9 if score == "location" else None, dtype=torch.float64
    )
    query, key, value = draw(2, rows, 5), draw(2, keys, size), draw(2, keys, 2)
    mask = draw.mask(2, rows, keys, p=0.7) if masked else None
    lengths = draw.integers(0, keys + 1, 2) if with_lengths else None
    ours = layer(query, key, value, mask=mask, key_lengths=lengths, return_weights=True)
    plain = luong(layer, query, key, value, visible_of(query, key, mask, lengths), lengths)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("change, error, argument", [
    ({"query": torch.randn(2, 3, 7)}, ValueError, "query"),
    ({"query": torch.randn(3)}, ValueError, "query"),
    ({"query": None}, TypeError, "query"),
    ({"query": torch.randn(2, 3, 6).double()}, TypeError, "query"),
    ({"key": torch.randn(2, 4, 5)}, ValueError, "key"),
    ({"key": [1.0]}, TypeError, "key"),
    ({"value": 3}, TypeError, "value"),
    ({"value": torch.randn(4, 6)}, ValueError, "value"),
])  # fmt: skip
@pytest.mark.parametrize("make", [
    lambda: s2s.nn.AdditiveAttention(6, 6, 4),
    lambda: s2s.nn.LuongAttention(6, 6, "dot"),
    lambda: s2s.nn.LuongAttention(6, 6, "general"),
    lambda: s2s.nn.LuongAttention(6, 6, "concat"),
])  # fmt: skip
def test_bad_input_is_refused_by_the_layers_name(make, change, error, argument):
    given = {"query": torch.randn(2, 3, 6), "key": torch.randn(2, 4, 6), "value": torch.randn(2, 4, 3)}
    layer = make()
    layer(**given)
    name, query = type(layer).__name__, change.get("query")
    if name == "AdditiveAttention" and argument == "value":
        name = "additive_attention"  # which takes it as it is
    if getattr(layer, "score", None) == "dot" and isinstance(query, torch.Tensor) and query.dim() == 3:
        argument = "key"  # there are no parameters, to which the query might be wrong
        name = "attention" if query.dtype == torch.float64 else name
    with pytest.raises(error, match=f"^{name}: {argument} must be"):
        layer(**given | change)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("score", s2s.nn.LuongAttention.SCORES)
def test_luong_under_autocast(score, window):
    layer = s2s.nn.LuongAttention(6, 6, score, window=window, max_length=4 if score == "location" else None)
    query, key = torch.randn(2, 3, 6), torch.randn(2, 4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        context, weights = layer(query, key, return_weights=True)
    assert context.dtype == weights.dtype == torch.bfloat16
    for ours, wanted in zip((context, weights), layer(query, key, return_weights=True), strict=True):
        torch.testing.assert_close(ours, wanted.bfloat16(), rtol=2**-6, atol=2**-6)  # of a few roundings by 2**-9


def test_what_pools_and_drops_is_checked():
    with pytest.raises(ValueError, match="AttentionPool: x must be of width 5"):
        s2s.nn.AttentionPool(5, 4)(torch.randn(2, 3, 6))
    for make in (s2s.nn.AdditiveAttention, functools.partial(s2s.nn.LuongAttention, score="concat", window=2)):
        with pytest.raises(ValueError, match="dropout must be"):
            make(6, 6, attention_size=4, dropout=2.0)
