"""Multi-head attention: torch's parameters, numbers and gradients over its options, and what differs from it."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import s2s_kernels as s2s
from s2s_kernels.testing import Draw

NAN = float("nan")


def pair(*args, **kwargs):
    """torch's layer and ours with the same numbers in them."""
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(*args, **kwargs)
    torch.manual_seed(0)
    ours = s2s.nn.MultiheadAttention(*args, **kwargs)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.1)  # the biases start at 0, which hides mistakes
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs.double(), ours.double()


def run(layer, inputs, **options):
    leaves = {}  # one leaf an input, however often it is given
    for x in inputs:
        leaves.setdefault(id(x), x.detach().clone().requires_grad_())
    out, weights = layer(*(leaves[id(x)] for x in inputs), **options)
    total = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()
    if weights is not None:
        total = total + (weights * torch.linspace(1, -1, weights.numel(), dtype=out.dtype).view_as(weights)).sum()
    grads = torch.autograd.grad(total, [*leaves.values(), *layer.parameters()])
    return [out, weights], grads


def assert_same(theirs, ours, inputs, **options):
    (expected, expected_grads), (found, found_grads) = run(theirs, inputs, **options), run(ours, inputs, **options)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b)
    for a, b in zip(found_grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b)


def draw_inputs(layer, batch, time, source, kind="different"):
    draw = Draw(torch.float64)
    leading = (lambda n: (n,)) if batch is None else (lambda n: (batch, n) if layer.batch_first else (n, batch))
    query = draw(*leading(time), layer.embed_dim)
    if kind == "self":
        return query, query, query
    key = draw(*leading(source), layer.kdim)
    return query, key, key if kind == "memory" else draw(*leading(source), layer.vdim)


def draw_mask(kind, *shape):
    draw = Draw(torch.float64, seed=1)
    if kind == "float":
        return draw(*shape)
    mask = draw.mask(*shape, p=0.4)
    mask[..., 0] = False  # no row without a key: there torch gives NaN
    return mask if kind == "bool" else torch.zeros(shape, dtype=torch.float64).masked_fill_(mask, -torch.inf)


OPTIONS = [
    {},
    {"bias": False},
    {"batch_first": True},
    {"add_bias_kv": True},
    {"add_zero_attn": True, "batch_first": True},
    {"add_bias_kv": True, "add_zero_attn": True, "bias": False},
    {"kdim": 5, "vdim": 7},
    {"kdim": 5, "bias": False, "add_bias_kv": True, "batch_first": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_same_initial_numbers_and_state(options):
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(8, 2, **options)
    torch.manual_seed(0)
    ours = s2s.nn.MultiheadAttention(8, 2, **options)
    expected, found = theirs.state_dict(), ours.state_dict()
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)
    theirs.load_state_dict(found, strict=True)
    assert dict(ours.named_parameters()).keys() == dict(theirs.named_parameters()).keys()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch", [None, 3])
def test_equals_torch(options, need_weights, batch):
    theirs, ours = pair(8, 2, **options)
    same_width = "kdim" not in options
    kinds = ["different", *(["self", "memory"] if same_width else [])]
    for kind, attn, padding in itertools.product(kinds, [None, "bool", "float"], [None, "same"]):
        inputs = draw_inputs(ours, batch, 5, 5 if kind == "self" else 6, kind)
        source = 5 if kind == "self" else 6
        masks = {
            "attn_mask": None if attn is None else draw_mask(attn, 5, source),
            "key_padding_mask": None
            if padding is None
            else draw_mask(attn or "bool", *([source] if batch is None else [batch, source])),
        }
        if attn == "bool" and padding:  # together they may leave a row nothing
            masks["attn_mask"][:, 0] = masks["key_padding_mask"][..., 0] = False
        assert_same(theirs, ours, inputs, need_weights=need_weights, **masks)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("mask", ["bool", "float", "infinite"])
def test_a_mask_a_head_and_weights_a_head(mask, average):
    theirs, ours = pair(8, 2, batch_first=True)
    attn_mask = draw_mask(mask, 6, 4, 7)
    assert_same(theirs, ours, draw_inputs(ours, 3, 4, 7), attn_mask=attn_mask, average_attn_weights=average)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padding", [False, True])
def test_the_causal_hint(need_weights, padding):
    theirs, ours = pair(8, 2, batch_first=True)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    options = {"attn_mask": mask, "is_causal": True, "need_weights": need_weights}
    if padding:
        options["key_padding_mask"] = torch.tensor([[0.0, 0, 0, 0, -torch.inf]] * 3, dtype=torch.float64)
    assert_same(theirs, ours, draw_inputs(ours, 3, 5, 5, "self"), **options)
    with pytest.raises(ValueError, match="attn_mask"):
        ours(*draw_inputs(ours, 3, 5, 5, "self"), is_causal=True)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kind", ["bool", "infinite"])
def test_a_row_without_keys_is_zero(need_weights, kind):
    """Row 15: torch gives NaN here."""
    _, layer = pair(8, 2, batch_first=True)
    padding = torch.tensor([[False] * 5, [True] * 5])
    if kind == "infinite":
        padding = torch.zeros(2, 5, dtype=torch.float64).masked_fill_(padding, -torch.inf)
    (out, weights), grads = run(layer, draw_inputs(layer, 2, 3, 5), key_padding_mask=padding, need_weights=need_weights)
    torch.testing.assert_close(out[1], layer.out_proj.bias.expand(3, 8))
    assert out.isfinite().all() and all(g.isfinite().all() for g in grads)
    if need_weights:
        assert not weights[1].any() and weights.isfinite().all()


def test_the_weights_of_a_row_of_least_numbers():
    """Their lse has lost how many keys there are."""
    theirs, ours = pair(8, 2)
    attn_mask = torch.zeros(3, 5, dtype=torch.float64)
    attn_mask[1] = torch.finfo(torch.float64).min
    assert_same(theirs, ours, draw_inputs(ours, 2, 3, 5), attn_mask=attn_mask)


@pytest.mark.parametrize("need_weights", [False, True])
def test_hidden_keys_never_reach_the_result(need_weights):
    """Row 14."""
    _, layer = pair(8, 2, batch_first=True)
    query, key, value = draw_inputs(layer, 2, 4, 6)
    padding = torch.tensor([[False] * 4 + [True] * 2] * 2)
    attn_mask = torch.zeros(4, 6, dtype=torch.bool)
    attn_mask[1:, 0] = True  # row 0 alone sees key 0
    options = {"key_padding_mask": padding, "attn_mask": attn_mask, "need_weights": need_weights}
    clean = layer(query, key, value, **options)
    key[:, 4:], value[:, 4:], key[:, 0] = NAN, torch.inf, NAN
    query.requires_grad_()
    dirty = layer(query, key, value, **options)
    for a, b in zip(dirty, clean, strict=True):
        if b is not None:
            torch.testing.assert_close(a[:, 1:], b[:, 1:])
            assert a[:, 0].isnan().any()
    (grad,) = torch.autograd.grad(sum(o[:, 1:].sum() for o in dirty if o is not None), query)
    assert grad[:, 1:].isfinite().all()


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 6, "vdim": 5}])
@pytest.mark.parametrize("prepared", [False, True])
def test_hidden_keys_never_reach_a_gradient_of_the_weights(prepared, sizes, batch_first):
    draw = Draw(torch.float32)
    layer = s2s.nn.MultiheadAttention(8, 2, batch_first=batch_first, **sizes)
    query, key, value = draw(2, 3, 8), draw(2, 4, sizes.get("kdim", 8)), draw(2, 4, sizes.get("vdim", 8))
    hidden = torch.tensor([[False, False, False, True], [True, False, False, True]])
    if not sizes:
        value = key
    grads = []
    for filling in (0.0, float("nan")):
        memory = [x.masked_fill(hidden[..., None], filling) for x in (key, value)]
        given = [x if batch_first else x.transpose(0, 1) for x in (query, *(memory if sizes else memory[:1] * 2))]
        if prepared:
            result, _ = layer(given[0], layer.prepare(*given[1:], hidden), need_weights=False)
        else:
            result, _ = layer(*given, hidden, need_weights=False)
        grads.append(torch.autograd.grad(result.square().sum(), list(layer.parameters())))
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0)


def test_all_arguments_by_position():
    """As torch's exporters call a layer."""
    x = torch.randn(2, 3, 8)
    layer = s2s.nn.MultiheadAttention(8, 2, batch_first=True)
    expected = layer(x, x, x, need_weights=False)[0]
    assert torch.equal(layer(x, x, x, None, False, None, True, False, None, None)[0], expected)


def test_dropout_only_in_training():
    _, layer = pair(8, 2, 0.5, batch_first=True)
    inputs = draw_inputs(layer, 2, 4, 6)
    expected = layer.eval()(*inputs)[0]
    torch.testing.assert_close(layer(*inputs)[0], expected)
    torch.manual_seed(3)
    first = layer.train()(*inputs)[0]
    assert not torch.allclose(first, expected)
    torch.manual_seed(3)
    assert torch.equal(layer(*inputs)[0], first)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layer_type", [torch.nn.TransformerEncoderLayer, torch.nn.TransformerDecoderLayer])
def test_in_the_place_of_torchs_own(training, masked, layer_type):
    """Its class assigned to an instance of torch's, inside the layers that read its attributes."""
    torch.manual_seed(0)
    block = layer_type(8, 2, 16, dropout=0.0, batch_first=True).double().train(training)
    draw = Draw(torch.float64)
    x, memory = draw(3, 5, 8), draw(3, 6, 8)
    causal = torch.nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    padding = torch.zeros(3, 5, dtype=torch.float64)
    padding[1, 3:] = -torch.inf
    if layer_type is torch.nn.TransformerEncoderLayer:
        args, options = (x,), {"src_mask": causal, "src_key_padding_mask": padding}
    else:
        args, options = (x, memory), {"tgt_mask": causal, "tgt_key_padding_mask": padding}
    options = options if masked else {}

    def outputs():
        with torch.no_grad():  # lets the encoder layer's fast path in, which asks for merged masks
            fast = block(*args, **options)
        return fast, block(*args, **options)

    expected = outputs()
    for module in block.modules():
        if type(module) is torch.nn.MultiheadAttention:
            module.__class__ = s2s.nn.MultiheadAttention
    for a, b in zip(outputs(), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_attributes_that_old_pickles_lack():
    layer = torch.nn.MultiheadAttention(8, 2)
    del layer.__dict__["batch_first"], layer.__dict__["_qkv_same_embed_dim"]
    layer.__class__ = s2s.nn.MultiheadAttention
    x = Draw()(5, 3, 8)
    assert layer(x, x, x)[0].shape == (5, 3, 8)


@pytest.mark.parametrize(
    "change, error, argument",
    [
        ({"query": (5, 8, 2, 2)}, ValueError, "query"),
        ({"query": (2, 4, 7)}, ValueError, "query"),
        ({"key": (6, 8)}, ValueError, "key"),
        ({"key": (3, 6, 8)}, ValueError, "key"),
        ({"key": (2, 6, 9)}, ValueError, "key"),
        ({"value": (2, 5, 8)}, ValueError, "value"),
        ({"attn_mask": torch.zeros(4, 5)}, ValueError, "attn_mask"),
        ({"attn_mask": torch.zeros(2, 4, 6)}, ValueError, "attn_mask"),
        ({"query": torch.zeros(2, 4, 8, dtype=torch.int64)}, TypeError, "query"),
        ({"key": torch.zeros(2, 6, 8, dtype=torch.float64)}, TypeError, "key"),
        ({"value": torch.zeros(2, 6, 8, dtype=torch.bfloat16)}, TypeError, "value"),
        ({"attn_mask": torch.zeros(4, 6, dtype=torch.int64)}, TypeError, "attn_mask"),
        ({"attn_mask": [[0.0] * 6] * 4}, TypeError, "attn_mask"),
        ({"key_padding_mask": torch.zeros(6)}, ValueError, "key_padding_mask"),
        ({"key_padding_mask": torch.zeros(2, 6, dtype=torch.uint8)}, TypeError, "key_padding_mask"),
        ({"key_padding_mask": True}, TypeError, "key_padding_mask"),
    ],
    ids=str,
)
def test_bad_input_is_refused_by_name(change, error, argument):
    layer, draw = s2s.nn.MultiheadAttention(8, 2, batch_first=True), Draw()
    arguments = {"query": draw(2, 4, 8), "key": draw(2, 6, 8), "value": draw(2, 6, 8)}
    arguments.update({k: draw(*v) if isinstance(v, tuple) else v for k, v in change.items()})
    with pytest.raises(error, match=rf"\b{argument}\b"):
        layer(**arguments)


@pytest.mark.parametrize("sizes", [(0, 1), (8, 0), (8, 3)])
def test_bad_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match=r"embed_dim|num_heads"):
        s2s.nn.MultiheadAttention(*sizes)


@pytest.mark.parametrize("options", [{"batch_first": True}, {}, {"kdim": 5, "vdim": 7}], ids=str)
@pytest.mark.parametrize("chunks", [[1] * 6, [4, 1, 1], [6]], ids=str)
@torch.no_grad()
def test_a_cache_equals_the_whole_sequence(options, chunks):
    _, layer = pair(8, 2, **options)
    inputs = draw_inputs(layer, 3, 6, 6, "different" if "kdim" in options else "self")
    causal = torch.ones(6, 6, dtype=torch.bool).triu(1)
    expected, expected_weights = layer(*inputs, attn_mask=causal, average_attn_weights=False)
    cache, start, time = s2s.nn.KVCache(3, 2, 9, 4, torch.float64), 0, 1 if layer.batch_first else 0
    for length in chunks:
        chunk = [x.narrow(time, start, length) for x in inputs]
        before = cache.reorder(torch.arange(3))
        out, weights = layer(*chunk, cache=cache, average_attn_weights=False)
        torch.testing.assert_close(out, expected.narrow(time, start, length))
        torch.testing.assert_close(weights[..., :6], expected_weights[:, :, start : start + length])
        assert not weights[..., 6:].any()
        assert layer(*chunk, cache=before, need_weights=False, is_causal=True)[1] is None
        start += length
    assert cache.lengths.tolist() == [6, 6, 6]


@torch.no_grad()
def test_a_cache_of_ragged_prompts():
    _, layer = pair(8, 2, batch_first=True)
    x, lengths = Draw(torch.float64)(2, 5, 8), torch.tensor([2, 4])
    cache = s2s.nn.KVCache(2, 2, 8, 4, torch.float64)
    prompt = x.masked_fill(torch.arange(5)[:, None] >= lengths[:, None, None], NAN)
    out, weights = layer(prompt, prompt, prompt, cache=cache, lengths=lengths)
    step = torch.stack([x[0, 2:3], x[1, 4:5]])
    after, after_weights = layer(step, step, step, cache=cache)
    for b, n in enumerate(lengths.tolist()):
        alone = x[b, : n + 1]
        mask = torch.ones(n + 1, n + 1, dtype=torch.bool).triu(1)
        expected, expected_weights = layer(alone, alone, alone, attn_mask=mask)
        torch.testing.assert_close(torch.cat([out[b, :n], after[b]]), expected)
        torch.testing.assert_close(torch.cat([weights[b, :n], after_weights[b]])[:, : n + 1], expected_weights)
        assert not weights[b, n:].any() and torch.equal(out[b, n:], layer.out_proj.bias.expand(5 - n, 8))
    alone = s2s.nn.KVCache(1, 2, 8, 4, torch.float64)
    torch.testing.assert_close(layer(x[0], x[0], x[0], cache=alone)[0][:2], out[0, :2])  # without a batch


@pytest.mark.parametrize(
    "options, arguments, error, argument",
    [
        ({}, {"cache": torch.zeros(2, 2, 8, 4)}, TypeError, "cache"),
        ({"add_bias_kv": True}, {}, ValueError, "cache"),
        ({"add_zero_attn": True}, {}, ValueError, "cache"),
        ({}, {"attn_mask": torch.zeros(4, 4)}, ValueError, "attn_mask"),
        ({}, {"key_padding_mask": torch.zeros(2, 4)}, ValueError, "key_padding_mask"),
        ({}, {"cache": None, "lengths": torch.tensor([1, 2])}, ValueError, "lengths"),
        ({}, {"lengths": torch.tensor([1, 5])}, ValueError, "lengths"),
        ({}, {"key": torch.zeros(2, 3, 8), "value": torch.zeros(2, 3, 8)}, ValueError, "key"),
        (
            {},
            {"query": torch.nested.as_nested_tensor([torch.zeros(4, 8)] * 2, layout=torch.jagged)},
            TypeError,
            "query",
        ),
        ({}, {"cache": s2s.nn.KVCache(2, 4, 8, 2)}, ValueError, "key"),
        ({}, {"cache": s2s.nn.KVCache(2, 2, 8, 4, torch.bfloat16)}, TypeError, "key"),
        ({}, {"cache": s2s.nn.KVCache(2, 2, 3, 4)}, ValueError, "key"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
@torch.no_grad()
def test_what_a_cache_refuses(options, arguments, error, argument):
    layer, cache = s2s.nn.MultiheadAttention(8, 2, batch_first=True, **options), s2s.nn.KVCache(2, 2, 8, 4)
    inputs = {name: torch.zeros(2, 4, 8) for name in ("query", "key", "value")}
    with pytest.raises(error, match=rf"\b{argument}\b"):
        layer(**({**inputs, "cache": cache} | arguments))
    assert not cache.lengths.any()
    with torch.enable_grad(), pytest.raises(NotImplementedError, match="no_grad"):
        s2s.nn.MultiheadAttention(8, 2, batch_first=True)(**inputs, cache=cache)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_first": True},
        {"kdim": 5, "vdim": 3, "bias": False},
        {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("padding", [None, "bool", "float"])
def test_prepared_keys_equal_the_keys_themselves(options, padding):
    layer = s2s.nn.MultiheadAttention(8, 2, **options, dtype=torch.float64)
    query, key, value = draw_inputs(layer, 3, 5, 6)
    mask = None if padding is None else draw_mask(padding, 3, 6)
    attn_mask = draw_mask("bool", 5, 6)
    leaves = [query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), *layer.parameters()]
    expected = layer(query, key, value, mask, attn_mask=attn_mask)
    memory = layer.prepare(key, value, mask)
    found = layer(query, memory, attn_mask=attn_mask)
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(x[0].square().sum(), leaves, allow_unused=True) for x in (found, expected)]
    torch.testing.assert_close(*grads)
    time = 1 if layer.batch_first else 0
    steps = [layer(step, memory, need_weights=False)[0] for step in query.split(1, time)]
    torch.testing.assert_close(torch.cat(steps, time), layer(query, key, value, mask)[0])
    beams = torch.tensor([2, 0, 0, 1])
    of_batch = 1 - time
    moved = layer(query.index_select(of_batch, beams), memory.reorder(beams))[0]
    torch.testing.assert_close(moved, layer(query, memory)[0].index_select(of_batch, beams))


def test_prepared_keys_of_a_single_sequence():
    layer = s2s.nn.MultiheadAttention(8, 2)
    query, key = torch.randn(5, 8), torch.randn(6, 8)
    hidden = torch.arange(6) > 3
    torch.testing.assert_close(
        layer(query, layer.prepare(key, key_padding_mask=hidden)), layer(query, key, key, hidden)
    )


def test_prepared_keys_compile_once_for_every_length():
    torch._dynamo.reset()
    layer = s2s.nn.MultiheadAttention(8, 2, batch_first=True)
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda x, memory: layer(x, memory, need_weights=False)[0], fullgraph=True, backend=counter)
    query, key = torch.randn(2, 1, 8), torch.randn(2, 9, 8)
    with torch.no_grad():
        for length in (9, 8, 5, 4):
            hidden = torch.arange(length).expand(2, length) > 2
            memory = layer.prepare(key[:, :length], key_padding_mask=hidden)
            torch.testing.assert_close(step(query, memory), layer(query, memory, need_weights=False)[0])
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    "arguments, argument",
    [
        ({"value": torch.zeros(2, 6, 8)}, "value"),
        ({"key_padding_mask": torch.zeros(2, 6, dtype=torch.bool)}, "key_padding_mask"),
        ({"cache": s2s.nn.KVCache(2, 2, 8, 4)}, "cache"),
        ({"lengths": torch.tensor([1, 1])}, "lengths"),
        ({"query": torch.zeros(3, 1, 8)}, "key"),
        ({"query": torch.zeros(1, 8)}, "key"),
        ({"query": torch.zeros(2, 1, 7)}, "query"),
        ({"attn_mask": torch.zeros(1, 7)}, "attn_mask"),
        ({"key": s2s.nn.MultiheadAttention(8, 4, batch_first=True).prepare(torch.zeros(2, 6, 8))}, "key"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_what_prepared_keys_refuse(arguments, argument):
    layer = s2s.nn.MultiheadAttention(8, 2, batch_first=True)
    with pytest.raises(ValueError, match=rf"\b{argument}\b"):
        layer(**({"query": torch.zeros(2, 1, 8), "key": layer.prepare(torch.zeros(2, 6, 8))} | arguments))
    with pytest.raises(ValueError, match=r"\bkey_padding_mask\b"):
        layer.prepare(torch.zeros(2, 6, 8), key_padding_mask=torch.zeros(2, 5, dtype=torch.bool))


@given(
    st.sampled_from([(4, 1), (6, 3), (8, 2), (10, 5)]),
    st.fixed_dictionaries({name: st.booleans() for name in ("bias", "add_bias_kv", "add_zero_attn", "batch_first")}),
    st.sampled_from([None, 1, 3]),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([None, "bool", "float", "infinite"]),
    st.sampled_from([None, "bool", "float"]),
    st.booleans(),
    st.booleans(),
)
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_any_options(sizes, options, batch, time, source, attn, padding, need_weights, average):
    theirs, ours = pair(*sizes, **options)
    masks = {
        "attn_mask": None if attn is None else draw_mask(attn, time, source),
        "key_padding_mask": None
        if padding is None
        else draw_mask(padding, *([source] if batch is None else [batch, source])),
    }
    inputs = draw_inputs(ours, batch, time, source)
    assert_same(theirs, ours, inputs, need_weights=need_weights, average_attn_weights=average, **masks)
