"""What a row of attention doesn't see never touches it, and what isn't finite stays with what sees it."""

import pytest
import torch
from interpreting import needs_extension

import s2s_kernels as s2s
from s2s_kernels.testing import Draw, compare

BACKENDS = ["reference", pytest.param("cpu", marks=needs_extension)]
INF, NAN = float("inf"), float("nan")


@needs_extension
@pytest.mark.parametrize("size", [40, 100])
@pytest.mark.parametrize("place", [0, 1])
def test_what_is_not_finite_stays_with_what_sees_it(size, place):
    draw = Draw()
    tensors = [draw(1, 2, size, 16) for _ in range(3)]
    tensors[place][:, :, 20] = NAN
    worst = compare(s2s.attention, (tuple(tensors), {"window": (3, 2)}), "cpu")
    assert all(excess <= 0 for excess in worst.values()), worst


@needs_extension
@pytest.mark.parametrize("time", [2, 20, 100])
def test_a_visible_key_and_its_value_that_are_not_finite(time):
    """The value's own gradient is NaN then, as its weight is; of a value alone it is 0."""
    draw = Draw()
    query, key, value = draw(1, 2, time, 4), draw(1, 2, 90, 4), draw(1, 2, 90, 4)
    value[0, 0, 7, 1] = value[0, 1, 8, 2] = NAN
    key[0, 0, 7, 3] = INF
    judged = compare(s2s.attention, ((query, key, value), {}), "cpu")
    assert all(by <= 0 for by in judged.values()), judged


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("time, width", [(9, 16), (70, 16), (150, 16), (150, 40), (260, 40)])
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_what_is_hidden_never_leaks(backend, time, width, poison):
    """Row 14: a NaN in a future key or value stays in the future, in results and in gradients."""
    at = time // 2
    query, key, value = (Draw(seed=i)(1, 2, time, width) for i in range(3))
    for place in range(3):
        leaves = [t.clone() for t in (query, key, value)]
        leaves[place][0, 0, at, 3] = poison
        leaves = [leaf.requires_grad_() for leaf in leaves]
        clean = [t.clone().requires_grad_() for t in (query, key, value)]
        with s2s.use_backend(backend):
            out = s2s.attention(*leaves, causal=True)
            expected = s2s.attention(*clean, causal=True)
            # Only rows that don't see the poison take part.
            rows = torch.arange(time) != at if place == 0 else torch.arange(time) < at
            grads = torch.autograd.grad(out[:, :, rows].sum(), leaves, retain_graph=True)
            wanted = torch.autograd.grad(expected[:, :, rows].sum(), clean)
        torch.testing.assert_close(out[:, :, rows], expected[:, :, rows])
        torch.testing.assert_close(out[:, 1], expected[:, 1])
        assert out[0, 0, ~rows].isnan().all()
        if place:
            torch.testing.assert_close(grads[0][:, :, rows], wanted[0][:, :, rows])
            for grad, want in zip(grads, wanted, strict=True):
                torch.testing.assert_close(grad[:, 1], want[:, 1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("time, width", [(1, 8), (5, 8), (70, 8), (130, 40), (260, 40)])
@pytest.mark.parametrize("by", ["mask", "bias"])
def test_a_masked_key_that_other_rows_see(backend, time, width, by):
    source = 80
    keep = torch.ones(time, source, dtype=torch.bool)
    keep[: (time + 1) // 2, 7] = False
    options = {by: keep if by == "mask" else torch.zeros(time, source).masked_fill(~keep, -INF)}
    query, key, value = (Draw(seed=i)(2, 3, n, width) for i, n in enumerate((time, source, source)))
    poisoned = [t.clone() for t in (query, key, value)]
    poisoned[1][:, :, 7] = NAN
    poisoned[2][:, :, 7] = INF
    poisoned = [t.requires_grad_() for t in poisoned]
    clean = [t.clone().requires_grad_() for t in (query, key, value)]
    half = (time + 1) // 2
    with s2s.use_backend(backend):
        out, expected = s2s.attention(*poisoned, **options), s2s.attention(*clean, **options)
        torch.testing.assert_close(out[:, :, :half], expected[:, :, :half])
        assert out[:, :, half:].isnan().all()
        (grad,) = torch.autograd.grad(out[:, :, :half].sum(), poisoned[0])
        (wanted,) = torch.autograd.grad(expected[:, :, :half].sum(), clean[0])
        torch.testing.assert_close(grad[:, :, :half], wanted[:, :, :half])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_see_nothing(backend):
    """Rows 11 and 15: results of 0, gradients of 0, lse of -infinity, whatever comes from above."""
    draw = Draw()
    leaves = [draw(3, 2, 5, 4), draw(3, 2, 6, 4), draw(3, 2, 6, 4), draw(3, 1, 5, 6)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    mask = torch.ones(3, 1, 5, 6, dtype=torch.bool)
    mask[0, :, 2] = False
    with s2s.use_backend(backend):
        out, lse = s2s.attention(
            *leaves[:3], bias=leaves[3], mask=mask, key_lengths=torch.tensor([6, 0, 3]), return_lse=True
        )
        assert out[0, :, 2].eq(0).all() and out[1].eq(0).all()
        assert lse[0, :, 2].eq(-INF).all() and lse[1].eq(-INF).all() and lse[2].isfinite().all()
        upstream = torch.ones_like(out)
        upstream[0, :, 2] = NAN
        upstream[1] = INF
        grads = torch.autograd.grad([out, lse], leaves, [upstream, upstream[..., 0]])
    for grad in grads:
        assert grad.isfinite().all() and grad[1].eq(0).all()
    assert grads[0][0, :, 2].eq(0).all() and grads[2][2, :, 3:].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", ["apart", "expanded"])
def test_what_comes_from_above_to_rows_that_see_nothing(backend, dtype, layout):
    """As before, of whole tiles whose rows lie apart or are one."""
    draw = Draw(dtype)
    leaves = [draw(2, 3, time, 32).requires_grad_() for time in (40, 72, 72)]
    mask = torch.ones(2, 1, 40, 72, dtype=torch.bool)
    mask[0, :, 7] = mask[1] = False
    upstream = draw(2, 40, 5, 32).transpose(1, 2)[:, 1:4] if layout == "apart" else draw(2, 3, 1, 32)
    upstream[1] = INF
    if layout == "apart":
        upstream[0, :, 7] = NAN
    upstream = upstream.expand(2, 3, 40, 32)
    with s2s.use_backend(backend):
        grads = torch.autograd.grad(s2s.attention(*leaves, mask=mask), leaves, upstream)
        clean = upstream.clone()
        clean[0, :, 7] = clean[1] = 0
        expected = torch.autograd.grad(s2s.attention(*leaves, mask=mask), leaves, clean)
    for grad, wanted in zip(grads, expected, strict=True):
        assert grad.equal(wanted)
