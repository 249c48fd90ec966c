"""Attention: what is allocated, kept and copied."""

import pytest
import torch
from interpreting import needs_extension
from torch.profiler import ProfilerActivity, profile

import s2s_kernels as s2s
from s2s_kernels.testing import Draw, compare


@needs_extension
def test_nothing_of_the_size_of_all_pairs_is_kept():
    """What autograd keeps beside the inputs: the result, and three numbers a row."""
    leaves = [torch.zeros(1, 2, 1000, 8, requires_grad=True) for _ in range(3)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        s2s.attention(*leaves, causal=True, dropout_p=0.1)
    assert max(kept) <= 2 * 1000 * 8


@needs_extension
@pytest.mark.parametrize("time, source", [(700, 600), (1500, 1700)])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"mask": True}, {"bias": True}, {"dropout_p": 0.1}])
def test_no_buffer_of_the_size_of_the_scores(time, source, options):
    """No allocation of B H T S elements in either direction, be masks and biases broadcast to it."""
    draw = Draw()
    leaves = [draw(1, 8, n, 8).requires_grad_() for n in (time, source, source)]
    options = dict(options)
    if "mask" in options:
        options["mask"] = draw.mask(1, 1, 1, source)
    if "bias" in options:
        options["bias"] = draw(1, 1, 1, source).requires_grad_()
    torch.use_deterministic_algorithms(False)  # filling buffers with NaN is no business of this test
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        s2s.attention(*leaves, **options).sum().backward()
    sizes = [e.nbytes() for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert sizes and max(sizes) < 8 * time * source * 4 / 4


@needs_extension
def test_a_broadcast_is_not_copied():
    """Row 3: expanded keys, values, masks and biases."""
    draw = Draw()
    heads, time = 4, 8
    query = draw(1, 1, time, 4).expand(3, heads, time, 4)
    key = draw(1, 1, 16, 4).expand(3, heads, 16, 4)
    mask, bias = draw.mask(1, 1, 1, 16).expand(3, heads, time, 16), draw(1, 1, time, 1).expand(3, heads, time, 16)
    arguments = ((query, key, key), {"mask": mask, "bias": bias})
    assert all(by <= 0 for by in compare(s2s.attention, arguments, "cpu").values())
