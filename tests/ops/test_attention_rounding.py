"""Attention: where rounding would show."""

import pytest
import torch
from interpreting import needs_extension

import s2s_kernels as s2s
from s2s_kernels.testing import Draw, compare

BACKENDS = ["reference", pytest.param("cpu", marks=needs_extension)]


@needs_extension
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("heads, width", [(2, 256), (1, 512)])
def test_scores_of_wide_heads_round_as_little_as_the_definitions(heads, width, seed):
    """Errors of sums of so many terms show where weights are peaked."""
    draw = Draw(torch.float32, seed=seed)
    tensors = tuple(draw(1, heads, 512, width) for _ in range(3))
    judged = compare(s2s.attention, (tensors, {}), "cpu")
    assert all(by <= 0 for by in judged.values()), judged


@needs_extension
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("time", [1, 2, 3])
def test_scores_of_a_few_queries_round_as_little_as_the_definitions(time, seed):
    """Products of so few rows are eager torch's most exact ones."""
    draw = Draw(torch.float32, seed=seed)
    tensors = draw(2, 12, time, 128), draw(2, 3, 16, 128), draw(2, 3, 16, 128)
    judged = compare(s2s.attention, (tensors, {"scale": 1.0, "enable_gqa": True}), "cpu")
    assert all(by <= 0 for by in judged.values()), judged


@needs_extension
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("time", [1, 33, 150])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_offset_that_all_values_share_moves_no_gradient(dtype, time, packed):
    """It cancels where the gradients of weights lose their mean, in which no result may be rounded to 16 bits."""
    draw = Draw(dtype)
    query, key, value = draw(4, time, 64), draw(4, 129, 64) + 5 * draw(64), draw(4, 129, 64) + 20
    starts = torch.tensor([0, time]), torch.tensor([0, 129])
    judged = (
        compare(s2s.attention_packed, ((*(x.transpose(0, 1) for x in (query, key, value)), *starts), {}), "cpu")
        if packed
        else compare(s2s.attention, ((query[None], key[None], value[None]), {}), "cpu")
    )
    assert all(by <= 0 for by in judged.values()), judged


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_lse_beside_the_least_number(backend):
    """Row 16: of four keys with such a bias each has a quarter of it."""
    bias = torch.full((1, 1, 1, 4), torch.finfo(torch.float32).min, requires_grad=True)
    tensors = [torch.zeros(1, 1, n, 2) for n in (1, 4, 4)]
    with s2s.use_backend(backend):
        _, lse = s2s.attention(*tensors, bias=bias, return_lse=True)
    torch.testing.assert_close(torch.autograd.grad(lse.sum(), bias)[0], torch.full_like(bias, 0.25))
