"""Attention: torch's own numbers, what hides what, gradients in every shape, and what is special to its kernels."""

import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from interpreting import needs_extension
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import s2s_kernels as s2s
from s2s_kernels import dispatch
from s2s_kernels.ops.random import keep_mask
from s2s_kernels.testing import Draw, compare

BACKENDS = ["reference", pytest.param("cpu", marks=needs_extension)]
INF, NAN = float("inf"), float("nan")


def gradients(function, *leaves):
    return torch.autograd.grad(function(*leaves).square().sum(), leaves)


def weights_of(query, key, **options):
    """What each query gives each key: the values are an identity."""
    batch, _, source, _ = key.shape
    identity = torch.eye(source, dtype=key.dtype).expand(batch, key.shape[1], source, source)
    return s2s.attention(query, key, identity, **options)


def seen(time, source, batch=1, **options):
    """Which query sees which key, as nested lists of 0 and 1."""
    weights = weights_of(torch.zeros(batch, 1, time, 1), torch.zeros(batch, 1, source, 1), **options)
    return weights.gt(0).int()[:, 0].tolist()


# Literal values


@pytest.mark.parametrize("backend", BACKENDS)
def test_literal_values(backend):
    query = torch.tensor([[[[0.0], [math.log(3.0)]]]])
    key = torch.tensor([[[[0.0], [1.0]]]])
    value = torch.tensor([[[[4.0, 0.0], [8.0, 1.0]]]])
    with s2s.use_backend(backend):
        out, lse = s2s.attention(query, key, value, return_lse=True)
        torch.testing.assert_close(out, torch.tensor([[[[6.0, 0.5], [7.0, 0.75]]]]))
        torch.testing.assert_close(lse, torch.tensor([[[math.log(2.0), math.log(4.0)]]]))
        out = s2s.attention(query, key, value, scale=0.0, bias=torch.tensor([0.0, math.log(3.0)]))
        torch.testing.assert_close(out, torch.tensor([[[[7.0, 0.75], [7.0, 0.75]]]]))
        out = s2s.attention(query, key, value, causal=True)
        torch.testing.assert_close(out, torch.tensor([[[[4.0, 0.0], [7.0, 0.75]]]]))
        slopes = torch.tensor([math.log(3.0)])
        out = s2s.attention(torch.zeros_like(query), key, value, alibi_slopes=slopes)
        torch.testing.assert_close(out, torch.tensor([[[[5.0, 0.25], [7.0, 0.75]]]]))
        weights = weights_of(torch.full((1, 1, 1, 1), 1e6), key, softcap=math.log(3.0))
        torch.testing.assert_close(weights, torch.tensor([[[[0.25, 0.75]]]]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_diagonals(backend):
    """Row 19: T < S, T > S with rows that see nothing, and lengths."""
    with s2s.use_backend(backend):
        assert seen(2, 4, causal=True) == [[[1, 0, 0, 0], [1, 1, 0, 0]]]
        assert seen(2, 4, causal="bottom-right") == [[[1, 1, 1, 0], [1, 1, 1, 1]]]
        assert seen(3, 2, causal=True) == [[[1, 0], [1, 1], [1, 1]]]
        assert seen(3, 2, causal="bottom-right") == [[[0, 0], [1, 0], [1, 1]]]
        lengths = {"query_lengths": torch.tensor([2, 3]), "key_lengths": torch.tensor([3, 1])}
        assert seen(3, 4, 2, causal="bottom-right", **lengths) == [
            [[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]],
            [[0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]],
        ]
        assert seen(2, 4, causal="bottom-right", key_lengths=torch.tensor([3])) == [[[1, 1, 0, 0], [1, 1, 1, 0]]]
        assert seen(3, 4, causal="bottom-right", query_lengths=torch.tensor([1])) == [
            [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
        ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_windows(backend):
    with s2s.use_backend(backend):
        assert seen(3, 4, window=(0, 1)) == [[[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]]
        assert seen(3, 4, window=(1, None)) == [[[1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]]
        assert seen(3, 4, window=(None, 0)) == seen(3, 4, causal=True)
        assert seen(3, 4, window=(1, 3), causal=True) == [[[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0]]]
        assert seen(2, 4, window=(1, 0), causal="bottom-right") == [[[0, 1, 1, 0], [0, 0, 1, 1]]]
        assert seen(2, 2, window=(2**63 - 1, 2**63 - 1)) == [[[1, 1], [1, 1]]]
        assert seen(2, 2, window=(np.int32(0), np.int64(1))) == [[[1, 1], [0, 1]]]


@needs_extension
@pytest.mark.parametrize("time, source", [(20, 33), (64, 64), (40, 50), (100, 130), (130, 70)])
@pytest.mark.parametrize("window", [(0, None), (5, None), (None, 5), (3, 17), (70, None), (None, 70), (66, 1)])
def test_windows_that_cross_vectors_and_blocks(time, source, window):
    draw = Draw()
    tensors = draw(2, 2, time, 16), draw(2, 2, source, 16), draw(2, 2, source, 24)
    for options in ({}, {"causal": "bottom-right"}, {"key_lengths": torch.tensor([source - 7, source])}):
        worst = compare(s2s.attention, (tensors, {"window": window, "return_lse": True, **options}), "cpu")
        assert all(excess <= 0 for excess in worst.values()), worst


@pytest.mark.parametrize("backend", BACKENDS)
def test_slopes_count_from_the_diagonal(backend):
    slopes = torch.tensor([math.log(2.0)])
    with s2s.use_backend(backend):
        weights = weights_of(
            torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 3, 1), alibi_slopes=slopes, causal="bottom-right"
        )
        torch.testing.assert_close(weights, torch.tensor([[[[1.0, 2.0, 4.0]]]]) / 7)


# Against torch


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("time, source", [(1, 7), (7, 1), (33, 65), (64, 64), (129, 70)])
@pytest.mark.parametrize("width", [1, 7, 65, 129])
def test_equals_torch(backend, time, source, width):
    """Row 12."""
    draw = Draw(torch.float64)
    leaves = [draw(2, 3, time, width), draw(2, 3, source, width), draw(2, 3, source, width)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    keep = draw.mask(2, 1, time, source, p=0.7) | (torch.arange(source) == 0)
    for options in ({}, {"attn_mask": keep}, {"attn_mask": draw(time, source)}, {"is_causal": True, "scale": 0.3}):
        with s2s.use_backend(backend):
            ours = s2s.scaled_dot_product_attention(*leaves, **options)
            grads = torch.autograd.grad(ours.square().sum(), leaves)
        theirs = F.scaled_dot_product_attention(*leaves, **options)
        torch.testing.assert_close(ours, theirs)
        for a, b in zip(grads, torch.autograd.grad(theirs.square().sum(), leaves), strict=True):
            torch.testing.assert_close(a, b)


def test_the_signature_is_torchs():
    ours = inspect.signature(s2s.scaled_dot_product_attention).parameters.values()
    assert [(p.name, p.default) for p in ours] == [
        ("query", inspect.Parameter.empty), ("key", inspect.Parameter.empty), ("value", inspect.Parameter.empty),
        ("attn_mask", None), ("dropout_p", 0.0), ("is_causal", False), ("scale", None), ("enable_gqa", False),
    ]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shapes, mask, gqa",
    [
        (((5, 4), (6, 4), (6, 3)), (5, 6), False),
        (((2, 5, 4), (6, 4), (1, 6, 3)), (6,), False),
        (((2, 1, 5, 4), (1, 3, 6, 4), (2, 3, 6, 3)), (2, 1, 1, 6), False),
        (((2, 1, 3, 5, 4), (4, 1, 6, 4), (1, 3, 6, 3)), (4, 1, 5, 6), False),
        (((4, 5, 4), (2, 6, 4), (2, 6, 3)), (4, 1, 6), True),
        (((2, 3, 4, 5, 4), (2, 3, 2, 6, 4), (2, 3, 2, 6, 3)), (3, 1, 5, 6), True),
    ],
)
def test_any_rank_broadcasts_as_torch(backend, shapes, mask, gqa):
    draw = Draw(torch.float64)
    query, key, value = (draw(*shape) for shape in shapes)
    for attn_mask in (None, draw.mask(*mask) | (torch.arange(6) == 0), draw(*mask)):
        expected = F.scaled_dot_product_attention(query, key, value, attn_mask, enable_gqa=gqa)
        with s2s.use_backend(backend):
            ours = s2s.scaled_dot_product_attention(query, key, value, attn_mask, enable_gqa=gqa)
        torch.testing.assert_close(ours, expected)
        assert ours.is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_beside_causal_is_anded(backend):
    """Row 18."""
    draw = Draw()
    query, key, value = draw(1, 2, 6, 4), draw(1, 2, 6, 4), draw(1, 2, 6, 4)
    keep = draw.mask(6, 6, p=0.8) | torch.eye(6, dtype=torch.bool)
    both = F.scaled_dot_product_attention(query, key, value, keep & torch.ones(6, 6).tril().bool())
    with s2s.use_backend(backend):
        torch.testing.assert_close(s2s.scaled_dot_product_attention(query, key, value, keep, is_causal=True), both)
        hides = torch.zeros(6, 6).masked_fill(~keep, -INF)
        torch.testing.assert_close(s2s.scaled_dot_product_attention(query, key, value, hides, is_causal=True), both)


# What hides never leaks


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_bias_of_least_number_and_infinity(backend, dtype):
    """Rows 16 and 17: of any dtype, whole rows included."""
    draw = Draw()
    query, key, value = draw(1, 1, 3, 4), draw(1, 1, 5, 4), draw(1, 1, 5, 4)
    bias = torch.zeros(3, 5, dtype=dtype)
    bias[0], bias[1], bias[2, 1:] = torch.finfo(dtype).min, -INF, torch.finfo(dtype).min
    with s2s.use_backend(backend):
        out = s2s.attention(query, key, value, bias=bias)
    if dtype in (torch.bfloat16, torch.float32, torch.float64):  # so low that scores vanish beside it
        torch.testing.assert_close(out[0, 0, 0], value[0, 0].mean(0))
    assert out[0, 0, 1].eq(0).all()
    torch.testing.assert_close(out[0, 0, 2], value[0, 0, 0])


# Gradients


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shape",
    [(2, 4, 70, 90), (1, 4, 70, 90), (2, 1, 70, 90), (70, 90), (4, 1, 90), (2, 1, 70, 1), (1, 1), (90,), (2, 4, 1, 1)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_of_a_bias_has_its_shape(backend, shape, dtype):
    draw = Draw(dtype)
    query, key, value, bias = draw(2, 4, 70, 8), draw(2, 2, 90, 8), draw(2, 2, 90, 8), draw(*shape)
    arguments = ((query, key, value), {"bias": bias, "causal": "bottom-right", "enable_gqa": True})
    broken = {name: by for name, by in compare(s2s.attention, arguments, backend).items() if by > 1e-14}
    assert not broken, broken


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_lse(backend):
    draw = Draw(torch.float64)
    query, key, value = draw(1, 2, 5, 4), draw(1, 2, 6, 4), draw(1, 2, 6, 4)
    leaves = [query.requires_grad_(), key.requires_grad_()]
    with s2s.use_backend(backend):
        _, lse = s2s.attention(query, key, value, causal=True, return_lse=True)
        ours = torch.autograd.grad(lse.square().sum(), leaves)
    scores = (query @ key.mT / 2).masked_fill(torch.ones(5, 6).triu(1).bool(), -INF)
    expected = torch.logsumexp(scores, -1)
    torch.testing.assert_close(lse, expected)
    for a, b in zip(ours, torch.autograd.grad(expected.square().sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)


@needs_extension
def test_strongly_negative_scores():
    """Row 20: S % 128 == 64."""
    query, key = torch.full((1, 1, 8, 4), 40.0), torch.full((1, 1, 192, 4), -40.0)
    leaves = [query.requires_grad_(), key.requires_grad_(), Draw()(1, 1, 192, 4).requires_grad_()]
    for grad in gradients(s2s.attention, *leaves):
        assert grad.isfinite().all()


# Dropout


@needs_extension
@pytest.mark.parametrize("time, source", [(3, 5), (1, 200), (70, 150)])
def test_dropout_drops_the_same_on_every_backend(time, source):
    draw = Draw()
    query, key = draw(2, 3, time, 4), draw(2, 3, source, 4)
    with s2s.use_backend("cpu"):
        torch.manual_seed(3)
        ours = weights_of(query, key, dropout_p=0.3)
    torch.manual_seed(3)
    keep = keep_mask(torch.randint(0, 2**63 - 1, (2,)), (2, 3, time, source), 0.3)
    torch.testing.assert_close(ours, torch.where(keep, weights_of(query, key) / 0.7, 0))
    assert 0.6 < keep.float().mean() < 0.8 or keep.numel() < 100


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_of_nothing_and_of_all(backend):
    """Row 23."""
    draw = Draw()
    leaves = [draw(1, 2, 5, 4).requires_grad_() for _ in range(3)]
    with s2s.use_backend(backend):
        torch.testing.assert_close(s2s.attention(*leaves, dropout_p=0.0), s2s.attention(*leaves), rtol=0, atol=0)
        assert s2s.attention(*leaves, dropout_p=1.0).eq(0).all()
        for grad in gradients(lambda *t: s2s.attention(*t, dropout_p=1.0), *leaves):
            assert grad.eq(0).all()


# Sizes


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch, heads, time, source", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_empty(backend, batch, heads, time, source):
    """Row 10."""
    leaves = [torch.ones(batch, heads, n, 4, requires_grad=True) for n in (time, source, source)]
    bias = torch.ones(1, 1, time, source, requires_grad=True)
    with s2s.use_backend(backend):
        out, lse = s2s.attention(*leaves, bias=bias, causal="bottom-right", return_lse=True)
        grads = torch.autograd.grad(out.sum(), [*leaves, bias])
    assert out.shape == (batch, heads, time, 4) and out.eq(0).all() and lse.eq(-INF).all()
    assert all(grad.eq(0).all() for grad in grads)


BLOCKS = {
    "plain": lambda draw: {},
    "causal": lambda draw: {"causal": True},
    "window": lambda draw: {"window": (50, 20), "scale": 0.3},
    "lengths": lambda draw: {"key_lengths": draw.tensor([300, 77]), "query_lengths": draw.tensor([31, 200])},
    "mask": lambda draw: {"mask": draw.mask(1, 4, 200, 300, p=0.8)},
    "bias": lambda draw: {"bias": draw(4, 200, 300)},
    "float32 bias": lambda draw: {"bias": draw(200, 300, dtype=torch.float32)},
    "capped, sloped, dropped": lambda draw: {
        "softcap": 5.0, "alibi_slopes": draw(4).abs() * 0.1, "dropout_p": 0.2, "causal": "bottom-right",
    },
}  # fmt: skip


@needs_extension
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("width, value_width", [(64, 64), (40, 72)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spoilt", [False, True])
def test_16_bits_in_whole_blocks(dtype, width, value_width, name, spoilt):
    """Where bfloat16 is multiplied as it is, if there is a tile unit; with something that isn't finite as well."""
    draw = Draw(dtype)
    tensors = draw(2, 4, 200, width), draw(2, 2, 300, width), draw(2, 2, 300, value_width)
    if spoilt:
        tensors[1][0, 0, 150, 3], tensors[2][1, 1, 70, 5] = INF, NAN
    judged = compare(s2s.attention, (tensors, {**BLOCKS[name](draw), "enable_gqa": True}), "cpu")
    assert all(by <= 0 for by in judged.values()), judged


@needs_extension
@pytest.mark.parametrize("time", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"window": (5, 20)}, {"causal": "bottom-right"}, {"query_lengths": [0, 1], "key_lengths": [150, 70]}],
)
@pytest.mark.parametrize("width, value_width, heads", [(24, 40, 2), (24, 40, 4), (5, 3, 4), (1, 1, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_keys_that_a_few_queries_do_not_see_have_no_gradient(dtype, width, value_width, heads, time, options):
    """Sums of a few queries aren't added to what was there, and each key's are written all the same: the rows of narrow
    heads by stores that reach into the next."""
    options = {name: torch.tensor(value) if "lengths" in name else value for name, value in options.items()}
    draw = Draw(dtype)
    tensors = draw(2, 4, time, width), draw(2, heads, 300, width), draw(2, heads, 300, value_width)
    judged = compare(s2s.attention, (tensors, {**options, "enable_gqa": True}), "cpu")
    assert all(by <= 0 for by in judged.values()), judged


@needs_extension
@pytest.mark.parametrize("options", [{}, {"causal": "bottom-right"}, {"key_lengths": [0, 2]}, {"softcap": 2.0}])
@pytest.mark.parametrize("time, source", [(4, 2), (5, 15), (8, 7)])
@pytest.mark.parametrize("width, value_width", [(130, 96), (512, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 4])
def test_few_queries_and_keys_of_wide_heads(heads, dtype, width, value_width, time, source, options):
    """Neither is turned around."""
    options = {name: torch.tensor(value) if "lengths" in name else value for name, value in options.items()}
    draw = Draw(dtype)
    tensors = draw(2, 4, time, width), draw(2, heads, source, width), draw(2, heads, source, value_width)
    tensors[1][1, 0, -1, 3] = tensors[2][0, 0, 0, 5] = NAN
    judged = compare(s2s.attention, (tensors, {**options, "enable_gqa": True}), "cpu")
    assert all(by <= 0 for by in judged.values()), judged


def _blocks(draw, rows, keys, size):
    """A mask (rows, keys) in which whole blocks are hidden, some of all keys, some from all queries."""
    blocks = draw.mask(-(-rows // size), -(-keys // size), p=0.35)
    blocks[2:4], blocks[:, 1] = False, False
    return blocks.repeat_interleave(size, 0).repeat_interleave(size, 1)[:rows, :keys]


@needs_extension
@pytest.mark.parametrize("as_bias", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("width", [64, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [6, 32, 96])
def test_blocks_that_a_mask_hides(size, dtype, width, heads, as_bias):
    """They are skipped, the ones between others too, and hold what isn't finite; an empty row is 0."""
    draw = Draw(dtype)
    mask = _blocks(draw, 200, 300, size)
    tensors = draw(2, 4, 200, width), draw(2, heads, 300, width), draw(2, heads, 300, width)
    tensors[1][:, :, ~mask.any(0)], tensors[2][:, :, ~mask.any(0)] = INF, NAN
    hides = {"mask": mask}
    if as_bias is not None:
        hides = {"bias": torch.randn(2, 1, 200, 300).to(as_bias).masked_fill(~mask, -INF)}
    judged = compare(s2s.attention, (tensors, {**hides, "enable_gqa": True, "return_lse": True}), "cpu")
    assert all(by <= 0 for by in judged.values()), judged


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_a_cache_that_a_mask_hides(dtype):
    draw = Draw(dtype)
    tensors = draw(2, 12, 1, 40), draw(2, 2, 1000, 40), draw(2, 2, 1000, 24)
    mask = draw.mask(2, 12, 1, 1000)
    mask[..., 100:300], mask[1, ..., 384:], mask[0, 5] = False, False, False
    tensors[1][:, :, 128:256], tensors[2][1, :, 500:] = NAN, INF
    judged = compare(s2s.attention, (tensors, {"mask": mask, "enable_gqa": True, "return_lse": True}), "cpu")
    assert all(by <= 0 for by in judged.values()), judged


def test_a_scale_of_another_library():
    query = torch.randn(1, 2, 3, 8)
    for scale in (np.float32(0.5), np.float64(0.5)):
        assert torch.equal(
            s2s.attention(query, query, query, scale=scale), s2s.attention(query, query, query, scale=0.5)
        )


@pytest.mark.parametrize("time, source", [(5, 5), (3, 6), (6, 3)])
@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])
@pytest.mark.filterwarnings("ignore:Lower right causal bias")
def test_torchs_causal_bias(make, time, source):
    """Nobody has set its elements: what it stands for is served, beside is_causal too, and it is refused elsewhere."""
    draw = Draw()
    query, key, value = draw(2, 2, time, 8), draw(2, 2, source, 8), draw(2, 2, source, 8)
    bias = make(time, source)
    keep = torch.ones(time, source).tril(0 if make is causal_upper_left else source - time).bool()
    for is_causal in (False, True):
        kept = keep & torch.ones(time, source).tril().bool() if is_causal else keep
        expected = s2s.attention(query, key, value, mask=kept)
        ours = s2s.scaled_dot_product_attention(query, key, value, bias, is_causal=is_causal)
        torch.testing.assert_close(ours, expected)
        assert type(ours) is torch.Tensor
    with pytest.raises(ValueError, match="attn_mask"):
        s2s.scaled_dot_product_attention(query, key[:, :, 1:], value[:, :, 1:], bias)
    for argument in ("mask", "bias"):
        with pytest.raises(TypeError, match=argument):
            s2s.attention(query, key, value, **{argument: bias})


@needs_extension
def test_more_heads_than_a_grid_has_blocks():
    """Row 8."""
    draw = Draw()
    leaves = [draw(600, 120, 2, 2).requires_grad_() for _ in range(3)]
    ours = s2s.attention(*leaves, causal=True)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(*leaves, is_causal=True))
    assert all(grad.isfinite().all() for grad in gradients(s2s.attention, *leaves))


@needs_extension
def test_a_long_cache_of_grouped_heads():
    draw = Draw()
    query, key, value = draw(2, 12, 1, 40), draw(2, 2, 3000, 40), draw(2, 2, 3000, 24)
    lengths = torch.tensor([3000, 1500])
    options = {"key_lengths": lengths, "enable_gqa": True, "return_lse": True}
    for more in ({}, {"causal": "bottom-right", "window": (700, None)}, {"mask": draw.mask(2, 1, 1, 3000)}):
        assert all(by <= 0 for by in compare(s2s.attention, ((query, key, value), options | more), "cpu").values())


@st.composite
def calls(draw, groups=((1, 1), (2, 2), (4, 2), (3, 1)), longest=280, sloped=None):
    heads, kv_heads = draw(st.sampled_from(groups))
    time, source = (draw(st.one_of(st.integers(0, 150), st.integers(90, longest))) for _ in range(2))
    batch = draw(st.integers(1, 3))
    side = st.one_of(st.none(), st.integers(0, 160))
    shape = st.tuples(*(st.sampled_from([1, n]) for n in (batch, heads, time, source)))
    lengths = [
        draw(st.one_of(st.none(), st.lists(st.integers(0, n), min_size=batch, max_size=batch))) for n in (time, source)
    ]
    return {
        "sizes": (batch, heads, kv_heads, time, source),
        # Sides of 32 and more, and lengths of about 100, meet the tile unit where there is one.
        "widths": draw(st.sampled_from([(1, 1), (8, 8), (16, 5), (7, 20), (33, 64), (64, 40), (80, 33)])),
        "dtype": draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16])),
        "layout": draw(st.sampled_from(["dense", "heads inside", "columns apart", "expanded"])),
        "mask": draw(st.one_of(st.none(), shape)),
        "bias": draw(st.one_of(st.none(), shape)),
        "bias_dtype": draw(st.sampled_from([None, torch.float32, torch.bfloat16])),
        "lengths": lengths,
        "slopes": draw(st.booleans()) if sloped is None else sloped,
        "seed": draw(st.integers(0, 1000)),
        "options": {
            "causal": draw(st.sampled_from([False, True, "bottom-right"])),
            "window": draw(st.one_of(st.none(), st.tuples(side, side))),
            "softcap": draw(st.sampled_from([None, None, 3.0])),
            "scale": draw(st.sampled_from([None, 0.2])),
            "dropout_p": draw(st.sampled_from([0.0, 0.0, 0.25])),
            "return_lse": draw(st.booleans()),
            "enable_gqa": True,
        },
    }


def laid_out(tensor, layout):
    if layout == "heads inside":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "columns apart":
        return tensor.mT.contiguous().mT
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    return tensor


def broken(made):
    """What doesn't equal the definition."""
    draw = Draw(made["dtype"], seed=made["seed"])
    batch, heads, kv_heads, time, source = made["sizes"]
    width, value_width = made["widths"]
    shapes = ((batch, heads, time, width), (batch, kv_heads, source, width), (batch, kv_heads, source, value_width))
    tensors = [laid_out(draw(*shape), made["layout"]) for shape in shapes]
    options = dict(made["options"])
    if made["mask"]:
        options["mask"] = draw.mask(*made["mask"], p=0.7)
    if made["bias"]:
        options["bias"] = draw(*made["bias"], dtype=made["bias_dtype"])
    if made["slopes"]:
        options["alibi_slopes"] = draw(heads).abs() * 0.1
    for name, lengths in zip(("query_lengths", "key_lengths"), made["lengths"], strict=True):
        if lengths is not None:
            options[name] = torch.tensor(lengths)
    judged = compare(s2s.attention, (tuple(tensors), options), "cpu")
    return {name: by for name, by in judged.items() if by > 0}


@needs_extension
@given(calls())
def test_any_call_equals_the_definition(made):
    found = broken(made)
    assert not found, found


@needs_extension
@given(calls(groups=((16, 16), (24, 8)), longest=150, sloped=True))
def test_any_call_of_many_sloped_heads_equals_the_definition(made):
    """Each slope's gradient is one number, a sum over all pairs: some of many measure eager torch well."""
    found = broken(made)
    assert not found, found


@needs_extension
@pytest.mark.parametrize("width", [16, 40])
@pytest.mark.parametrize("bias", [None, (1, 4, 300, 300), (2, 1, 300, 1)])
def test_the_same_bits_on_any_number_of_threads(bias, width):
    draw = Draw()
    leaves = [draw(2, 4, 300, width), draw(2, 2, 300, width), draw(2, 2, 300, width)]
    options = {} if bias is None else {"bias": draw(*bias).requires_grad_()}

    def run():
        inputs = [leaf.clone().requires_grad_() for leaf in leaves]
        torch.manual_seed(0)
        out = s2s.attention(*inputs, **options, causal=True, dropout_p=0.2, enable_gqa=True)
        return [out, *torch.autograd.grad(out.square().sum(), [*inputs, *options.values()])]

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
@pytest.mark.parametrize("source, window", [(70, (30, 30)), (60, (30, None)), (300, (40, 0)), (300, None)])
def test_the_same_bits_however_queries_are_dealt(source, window):
    draw = Draw()
    query, key, value = draw(1, 1, 400, 32), draw(1, 1, source, 32), draw(1, 1, source, 32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            results.append(s2s.attention(query, key, value, window=window, return_lse=True))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_explains_its_choice():
    draw = Draw()
    query = draw(2, 3, 4, 5)
    explanation = s2s.explain(s2s.attention, query, query, query, causal=True)
    assert explanation.backend == ("cpu" if dispatch.extension_missing is None else "reference")
    assert "CUDA tensors" in explanation.reasons["triton"]
    for options in (
        {}, {"causal": True}, {"mask": draw.mask(4, 4)}, {"dropout_p": 0.5}, {"softcap": 1.0}, {"return_lse": True},
    ):  # fmt: skip
        reason = s2s.explain(s2s.attention, query, query, query, **options).reasons["torch"]
        with s2s.use_backend("torch"), pytest.raises(NotImplementedError, match=reason):
            s2s.attention(query, query, query, **options)
    assert s2s.explain(s2s.scaled_dot_product_attention, query, query, query).backend == explanation.backend
