"""Packed sequences: equal to each sequence by itself, in values and gradients, wherever they lie."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import s2s_kernels as s2s
from s2s_kernels import checks, dispatch
from s2s_kernels.testing import Draw

needs_extension = pytest.mark.skipif(dispatch.extension_missing is not None, reason=str(dispatch.extension_missing))
BACKENDS = ["reference", pytest.param("cpu", marks=needs_extension)]
NAN = float("nan")
LENGTHS = {
    "short": ((3, 0, 5, 1), (4, 2, 0, 7)),
    "one query each": ((1, 0, 1, 1), (40, 3, 0, 7)),
    "several blocks": ((70, 1, 140), (130, 0, 65)),
}


def starts(lengths, dtype=torch.int64):
    return torch.tensor([sum(lengths[:b]) for b in range(len(lengths) + 1)], dtype=dtype)


def drawn(times, sources, heads=4, kv_heads=2, width=16, value_width=8, dtype=torch.float64):
    draw = Draw(dtype)
    shapes = (sum(times), heads, width), (sum(sources), kv_heads, width), (sum(sources), kv_heads, value_width)
    return [draw(*shape).requires_grad_() for shape in shapes]


def one_by_one(query, key, value, times, sources, alibi_slopes=None, **options):
    """attention of each sequence by itself."""
    outs, logs = [], []
    slopes = [alibi_slopes] * len(times) if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes
    parts = zip(query.split(times), key.split(sources), value.split(sources), slopes, strict=True)
    for *part, slope in parts:
        rows = (x.transpose(0, 1)[None] for x in part)
        out, lse = s2s.attention(*rows, alibi_slopes=slope, enable_gqa=True, return_lse=True, **options)
        outs.append(out[0].transpose(0, 1))
        logs.append(lse[0])
    return torch.cat(outs), torch.cat(logs, 1)


def weighted(out, lse):
    """A number that depends on every result; nothing has a lse of -inf in it."""
    return out.square().sum() + lse.masked_fill(lse.isinf(), 0).sin().sum()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("value_width", [8, 5])
def test_equals_a_loop_over_sequences(backend, lengths, value_width):
    """Values and gradients, both diagonals, windows, slopes, grouped heads, empty sequences."""
    times, sources = (list(side) for side in LENGTHS[lengths])
    leaves = drawn(times, sources, value_width=value_width)
    slopes = Draw(torch.float64)(len(times), 4).abs().requires_grad_()
    for options in (
        {},
        {"causal": True},
        {"causal": "bottom-right", "alibi_slopes": slopes},
        {"causal": "bottom-right", "window": (9, None), "alibi_slopes": slopes[0], "softcap": 3.0, "scale": 0.4},
    ):
        wanted = [*leaves, slopes] if "alibi_slopes" in options else leaves
        with s2s.use_backend(backend):
            ours = s2s.attention_packed(
                *leaves, starts(times), starts(sources, torch.int32), enable_gqa=True, return_lse=True, **options
            )
            grads = torch.autograd.grad(weighted(*ours), wanted)
        theirs = one_by_one(*leaves, times, sources, **options)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(grads, torch.autograd.grad(weighted(*theirs), wanted))
        assert ours[0].is_contiguous() and ours[1].is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
def test_literal_diagonals(backend):
    """Row 19: what each query of two sequences sees, by weights; a row that sees nothing is 0 and has lse -inf."""
    query, key, value = torch.zeros(5, 1, 1), torch.zeros(5, 1, 1), torch.eye(5)[:, None]
    cu = torch.tensor([0, 2, 5]), torch.tensor([0, 3, 5])
    with s2s.use_backend(backend):
        seen = [s2s.attention_packed(query, key, value, *cu, causal=c).gt(0).int() for c in (True, "bottom-right")]
        assert seen[0][:, 0].tolist() == [
            [1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [0, 0, 0, 1, 0],
            [0, 0, 0, 1, 1],
            [0, 0, 0, 1, 1],
        ]
        assert seen[1][:, 0].tolist() == [
            [1, 1, 0, 0, 0],
            [1, 1, 1, 0, 0],
            [0, 0, 0, 0, 0],
            [0, 0, 0, 1, 0],
            [0, 0, 0, 1, 1],
        ]
        _, lse = s2s.attention_packed(query, key, value, *cu, causal="bottom-right", return_lse=True)
        assert lse.isinf().tolist() == [[False, False, True, False, False]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [16, 5])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_nan_stays_in_its_sequence(backend, width, dropout_p):
    times, sources = [9, 70, 8], [11, 90, 66]
    results = []
    for poison in (False, True):
        query, key, value = (x.detach() for x in drawn(times, sources, 4, 2, width, width, torch.float32))
        if poison:
            query[9:79], key[11:101:3], value[12:101] = NAN, NAN, float("inf")
        leaves = [x.requires_grad_() for x in (query, key, value)]
        torch.manual_seed(5)
        with s2s.use_backend(backend):
            out, lse = s2s.attention_packed(
                *leaves, starts(times), starts(sources), dropout_p=dropout_p, enable_gqa=True, return_lse=True
            )
            grads = torch.autograd.grad([out, lse], leaves, [torch.ones_like(out), torch.ones_like(lse)])
        assert bool(out[9:79].isnan().any()) is poison
        results.append([out, lse.T, *grads])
    for clean, poisoned, lengths in zip(*results, [times, times, times, sources, sources], strict=True):
        for part, other in list(zip(clean.split(lengths), poisoned.split(lengths), strict=True))[::2]:
            assert part.isfinite().all()
            assert torch.equal(part, other) if backend == "cpu" else torch.allclose(part, other, atol=1e-5)


@needs_extension
@pytest.mark.parametrize("width", [64, 40, 17])
def test_same_bits_as_alone_on_any_number_of_threads(width):
    """Long sequences, which are on the tile unit where there is one; several parts of keys."""
    times, sources = [300, 20, 0, 410], [520, 300, 64, 390]
    leaves = drawn(times, sources, 4, 2, width, width, torch.float32)
    cu = starts(times), starts(sources)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with s2s.use_backend("cpu"):
                out, lse = s2s.attention_packed(*leaves, *cu, causal="bottom-right", enable_gqa=True, return_lse=True)
                results.append([out, lse, *torch.autograd.grad(weighted(out, lse), leaves)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    out, lse = one_by_one(*leaves, times, sources, causal="bottom-right")
    expected = [out, lse, *torch.autograd.grad(weighted(out, lse), leaves)]
    torch.testing.assert_close(results[0], expected, rtol=2e-4, atol=2e-5)


@needs_extension
@pytest.mark.parametrize("width", [40, 17])
def test_each_sequence_is_served_by_its_own_length(width):
    """A long sequence beside single queries and short ones, which other code serves: the bits are those of each alone,
    and a call that records gradients gives what one that doesn't gives."""
    times, sources = [300, 1, 5, 1, 90], [300, 700, 40, 3, 90]
    leaves = drawn(times, sources, 4, 2, width, width, torch.float32)
    options = {"causal": "bottom-right", "enable_gqa": True, "return_lse": True}
    with torch.no_grad(), s2s.use_backend("cpu"):
        out, lse = s2s.attention_packed(*leaves, starts(times), starts(sources), **options)
        alone = [
            s2s.attention_packed(*part, starts([t]), starts([n]), **options)
            for *part, t, n in zip(
                leaves[0].split(times), *(x.split(sources) for x in leaves[1:]), times, sources, strict=True
            )
        ]
    assert torch.equal(out, torch.cat([a for a, _ in alone])) and torch.equal(lse, torch.cat([b for _, b in alone], 1))
    recorded = s2s.attention_packed(*leaves, starts(times), starts(sources), **options)
    eps = torch.finfo(torch.float32).eps  # each is within 4, of what exceeds 1 relative to it
    torch.testing.assert_close((out, lse), recorded, rtol=8 * eps, atol=8 * eps)


@needs_extension
def test_memory_goes_with_the_rows_that_are_there():
    """Neither a padded copy nor anything of the size of all pairs, at any time, in both directions."""
    times = [1200, *[20] * 39]
    leaves = drawn(times, times, 4, 4, 32, 32, torch.float32)
    torch.use_deterministic_algorithms(False)  # filling buffers with NaN is no business of this test
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        s2s.attention_packed(*leaves, starts(times), starts(times), causal=True, dropout_p=0.1).sum().backward()
    live = peak = 0
    events = (e for e in record.profiler.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    padded, pairs = len(times) * max(times) * 4 * 32 * 4, 4 * max(times) ** 2 * 4
    assert 0 < peak < min(padded, pairs) * 0.9


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_sequence_draws_the_dropout_of_attention(backend):
    query, key, value = drawn([70], [90], 2, 2)
    with s2s.use_backend(backend):
        torch.manual_seed(3)
        ours = s2s.attention_packed(query, key, value, starts([70]), starts([90]), dropout_p=0.3)
        torch.manual_seed(3)
        theirs = s2s.attention(*(x.transpose(0, 1)[None] for x in (query, key, value)), dropout_p=0.3)
    torch.testing.assert_close(ours, theirs[0].transpose(0, 1))


@needs_extension
@pytest.mark.parametrize("values", [[1, 3, 5], [0, 6, 5], [0, 2, 4]])
def test_starts_that_cannot_be_read_are_asserted_under_debug(values, monkeypatch):
    monkeypatch.setattr(checks, "DEBUG", True)
    torch._dynamo.reset()
    query = torch.zeros(5, 2, 3)
    attend = torch.compile(s2s.attention_packed, fullgraph=True, backend="aot_eager")
    attend(query, query, query, torch.tensor([0, 2, 5]), torch.tensor([0, 0, 5]))
    with pytest.raises(RuntimeError, match="cu_seqlens_k must ascend"):
        attend(query, query, query, torch.tensor([0, 2, 5]), torch.tensor(values))


@needs_extension
@pytest.mark.parametrize("values", [[1, 3, 5], [0, 6, 5], [0, 2, 4]])
def test_the_kernel_checks_starts_itself(values):
    query, key, value = (torch.zeros(5, 2, 3) for _ in range(3))
    with pytest.raises(RuntimeError, match="cu_seqlens_q"):
        torch.ops.s2s.attention_packed_forward(
            query, key, value, torch.tensor(values), torch.tensor([0, 2, 5]), None, None, None, None, False, 0.0, None,
            None, False,
        )  # fmt: skip
