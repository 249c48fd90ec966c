"""Attention against torch's scaled_dot_product_attention and the naive form."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask

import s2s_kernels as s2s

from . import work
from .harness import FORWARD, TRAINING, Case, Entrant, Grid, Inputs, on_gpu
from .peers import biased_score, compiled_flex_attention, naive_attention, varlen_attention

sdpa = F.scaled_dot_product_attention
NAIVE = 1024  # longest T of the form that writes the matrix of scores out
CUDA_BACKENDS = {
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def heads(inputs: Inputs, batch: int, heads: int, time: int, width: int) -> tuple[torch.Tensor, ...]:
    """Query, key and value (B, H, T, D)."""
    query, key, value = (inputs.noise(batch, heads, time, width) for _ in range(3))
    return query, key, value


def on_backend(backend: SDPBackend, call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        with sdpa_kernel(backend):
            return call()

    return run


@functools.cache
def serves(backend: SDPBackend, kind: str, dtype: torch.dtype, width: int = 64) -> bool:
    """Whether this GPU has torch's backend for such a call and its gradients, that of a learned bias included."""
    query = torch.randn(1, 8, 64, width, device="cuda", dtype=dtype, requires_grad=True)
    mask = None
    if kind == "lengths":
        mask = (torch.arange(64, device="cuda") < 32)[None, None, None]
    elif kind == "bias":
        mask = torch.randn(1, 8, 64, 64, device="cuda", dtype=dtype, requires_grad=True)
    call = on_backend(backend, lambda: sdpa(query, query, query, attn_mask=mask, is_causal=kind == "causal"))
    leaves = [leaf for leaf in (query, mask) if leaf is not None and leaf.requires_grad]
    try:
        gradients = torch.autograd.grad(call().sum(), leaves, allow_unused=True)
    except RuntimeError:
        return False
    return all(gradient is not None for gradient in gradients)


def dense(
    grid: Grid, batch: int, causal: bool, quick: tuple[int, ...] = (), lengths: list[int] | None = None
) -> list[Case]:
    """8 heads of width 64 over T = S, all pairs or causal."""
    count, width = 8, 64
    kind = "causal" if causal else "dense"

    def case(time: int) -> Case:
        backends = (
            [name for name, backend in CUDA_BACKENDS.items() if serves(backend, kind, grid.dtype)]
            if grid.device == "cuda"
            else []
        )
        with_naive = time <= NAIVE and not causal

        def build(inputs: Inputs, time: int) -> dict[str, Entrant]:
            query, key, value = leaves = heads(inputs, batch, count, time, width)

            def theirs() -> torch.Tensor:
                return sdpa(query, key, value, is_causal=causal)

            entrants = {
                "ours": Entrant(lambda: s2s.attention(query, key, value, causal=causal), leaves),
                "sdpa": Entrant(theirs, leaves),
            }
            if with_naive:
                entrants["naive"] = Entrant(lambda: naive_attention(query, key, value), leaves)
            for name in backends:
                entrants[name] = Entrant(on_backend(CUDA_BACKENDS[name], theirs), leaves)
            return entrants

        def amount(t: int) -> work.Work:
            share = (t + 1) / (2 * t) if causal else 1.0
            return work.attention(batch, count, t, t, width, share=share)

        return Case(
            f"{'causal ' if causal else ''}attention B{batch} H{count} D{width}",
            time,
            batch * time,
            build,
            amount,
            ("ours", "sdpa", *(["naive"] if with_naive else []), *backends),
            quick=time in quick,
        )

    return [case(time) for time in (lengths or grid.lengths())]


def padded(batch: int = 8, time: int = 256) -> Case:
    """Keys of unequal length, half of S on average, against a padding mask."""
    count, width = 8, 64

    def lengths_of(time: int) -> torch.Tensor:
        share = torch.rand(batch, generator=torch.Generator().manual_seed(11))
        return (share * time).long() + 1

    def build(inputs: Inputs, time: int) -> dict[str, Entrant]:
        query, key, value = leaves = heads(inputs, batch, count, time, width)
        lengths = lengths_of(time).to(inputs.device)
        keep = (torch.arange(time, device=inputs.device) < lengths[:, None])[:, None, None]
        return {
            "ours": Entrant(lambda: s2s.attention(query, key, value, key_lengths=lengths), leaves),
            "sdpa mask": Entrant(lambda: sdpa(query, key, value, attn_mask=keep), leaves),
        }

    def amount(t: int) -> work.Work:
        share = lengths_of(t).double().mean().item() / t
        return work.attention(batch, count, t, t, width, share=share, present=share)

    row = f"key lengths attention B{batch} H{count} D{width}"
    return Case(row, time, batch * time, build, amount, ("ours", "sdpa mask"), quick=True)


def packed(
    grid: Grid, time: int, causal: bool, batch: int = 8, count: int = 8, width: int = 64, quick: bool = False
) -> Case:
    """Sequences of unequal length, half of T on average, one after another; against padded ones under a mask (their
    inputs padded beforehand, the result's rows picked out), a loop over sequences, nested tensors, which have no causal
    mask on a CPU, and on a GPU in 16 bits torch's own kernel for such sequences."""
    on_gpu = grid.device == "cuda"
    names = ["ours", "sdpa mask", "sdpa loop"]
    names += ["sdpa nested"] if on_gpu or not causal else []
    names += ["torch varlen"] if on_gpu and grid.dtype.itemsize == 2 else []

    def lengths_of(time: int) -> torch.Tensor:
        share = torch.rand(batch, generator=torch.Generator().manual_seed(11))
        return (share * time).long() + 1

    def build(inputs: Inputs, time: int) -> dict[str, Entrant]:
        lengths = lengths_of(time)
        starts = F.pad(lengths.cumsum(0), (1, 0))
        bounds = starts.tolist()
        query, key, value = leaves = [inputs.noise(bounds[-1], count, width) for _ in range(3)]
        present = torch.arange(time) < lengths[:, None]
        rows, starts = present.flatten().nonzero()[:, 0].to(inputs.device), starts.to(inputs.device)
        keep = present.to(inputs.device)[:, None, None]
        if causal:
            keep = keep & torch.ones(time, time, dtype=torch.bool, device=inputs.device).tril()
        padded = []
        for leaf in leaves:
            whole = leaf.new_zeros(batch * time, count, width).index_copy(0, rows, leaf.detach())
            padded.append(whole.unflatten(0, (batch, time)).transpose(1, 2).contiguous().requires_grad_())
        inputs.touched.extend(padded)

        def under_a_mask() -> torch.Tensor:
            q, k, v = padded
            out = sdpa(q, k, v, attn_mask=keep)
            return out.transpose(1, 2).flatten(0, 1).index_select(0, rows)

        def one_by_one() -> torch.Tensor:
            parts = zip(*(leaf.transpose(0, 1)[None].split(lengths.tolist(), 2) for leaf in leaves), strict=True)
            outs = [sdpa(q, k, v, is_causal=causal) for q, k, v in parts]
            return torch.cat([out[0].transpose(0, 1) for out in outs])

        def nested() -> torch.Tensor:
            q, k, v = (torch.nested.nested_tensor_from_jagged(x, starts).transpose(1, 2) for x in leaves)
            return sdpa(q, k, v, is_causal=causal).transpose(1, 2).values()

        def varlen() -> torch.Tensor:
            return varlen_attention(query, key, value, starts.int(), int(lengths.max()), causal)

        functions: dict[str, Callable[[], torch.Tensor]] = {
            "ours": lambda: s2s.attention_packed(query, key, value, starts, starts, causal=causal),
            "sdpa mask": under_a_mask,
            "sdpa loop": one_by_one,
            "sdpa nested": nested,
            "torch varlen": varlen,
        }
        return {name: Entrant(functions[name], padded if name == "sdpa mask" else leaves) for name in names}

    def amount(t: int) -> work.Work:
        lengths = lengths_of(t).double()
        pairs = (lengths * (lengths + 1) / 2 if causal else lengths**2).sum().item()
        return work.simple(4 * count * width * pairs, 4 * lengths.sum().item() * count * width)

    row = f"packed {'causal ' if causal else ''}attention B{batch} H{count} D{width}"
    return Case(row, time, int(lengths_of(time).sum()), build, amount, tuple(names), quick=quick)


def banded(time: int = 2048, window: int = 256) -> Case:
    """A causal window, against a band mask."""
    batch, count, width = 1, 8, 64

    def build(inputs: Inputs, time: int) -> dict[str, Entrant]:
        query, key, value = leaves = heads(inputs, batch, count, time, width)
        i = torch.arange(time, device=inputs.device)
        band = (i[:, None] >= i) & (i[:, None] - i <= window)
        return {
            "ours": Entrant(lambda: s2s.attention(query, key, value, causal=True, window=(window, 0)), leaves),
            "sdpa mask": Entrant(lambda: sdpa(query, key, value, attn_mask=band), leaves),
        }

    def amount(t: int) -> work.Work:
        inside = min(window + 1, t)
        pairs = t * inside - inside * (inside - 1) / 2
        return work.attention(batch, count, t, t, width, share=pairs / t**2)

    row = f"window {window} attention B{batch} H{count} D{width}"
    return Case(row, time, batch * time, build, amount, ("ours", "sdpa mask"), quick=True)


def dropped(time: int, quick: bool) -> Case:
    batch, count, width = 2, 8, 64

    def build(inputs: Inputs, time: int) -> dict[str, Entrant]:
        query, key, value = leaves = heads(inputs, batch, count, time, width)
        return {
            "ours": Entrant(lambda: s2s.attention(query, key, value, dropout_p=0.1), leaves),
            "sdpa": Entrant(lambda: sdpa(query, key, value, dropout_p=0.1), leaves),
        }

    return Case(
        f"dropout attention B{batch} H{count} D{width}",
        time,
        batch * time,
        build,
        lambda t: work.attention(batch, count, t, t, width),
        ("ours", "sdpa"),
        (TRAINING,),
        quick,
        agree=False,
    )


def biased(time: int, quick: bool) -> Case:
    """A learned bias (1, H, T, S) with its gradient."""
    batch, count, width = 2, 8, 64

    def build(inputs: Inputs, time: int) -> dict[str, Entrant]:
        query, key, value = heads(inputs, batch, count, time, width)
        bias = inputs.noise(1, count, time, time)
        leaves = (query, key, value, bias)
        return {
            "ours": Entrant(lambda: s2s.attention(query, key, value, bias=bias), leaves),
            "sdpa mask": Entrant(lambda: sdpa(query, key, value, attn_mask=bias), leaves),
        }

    def amount(t: int) -> work.Work:
        table = count * t * t
        return work.chain([work.attention(batch, count, t, t, width), work.simple(batch * table, table, path=0)])

    row = f"learned bias attention B{batch} H{count} D{width}"
    return Case(row, time, batch * time, build, amount, ("ours", "sdpa mask"), (TRAINING,), quick)


def decoding(label: str, count: int, kv_heads: int, width: int, cached: int, dtype: torch.dtype | None = None) -> Case:
    """One query against a cache; T counts the cached keys."""

    def build(inputs: Inputs, time: int) -> dict[str, Entrant]:
        def cast(*shape: int) -> torch.Tensor:
            tensor = inputs.noise(*shape, grad=False)
            if dtype is None:
                return tensor
            inputs.touched[-1] = tensor.to(dtype)
            return inputs.touched[-1]

        query, key, value = cast(1, count, 1, width), cast(1, kv_heads, time, width), cast(1, kv_heads, time, width)
        grouped = count != kv_heads
        return {
            "ours": Entrant(lambda: s2s.attention(query, key, value, enable_gqa=grouped)),
            "sdpa": Entrant(lambda: sdpa(query, key, value, enable_gqa=grouped)),
        }

    def amount(t: int) -> work.Work:
        amount = work.attention(1, count, 1, t, width, kv_heads=kv_heads)
        return amount if dtype is None else amount.scaled(dtype.itemsize)

    row = f"decode {label} H{count} D{width}"
    return Case(row, cached, 1, build, amount, ("ours", "sdpa"), (FORWARD,), quick=True)


def on_a_gpu(
    grid: Grid, kind: str, batch: int, width: int, queries: int, keys: int, *, bar: str, count: int = 16
) -> Case:
    """Against torch's backends by name, at sizes that fill a GPU, and with long sequences of the width 128 against
    FlexAttention, whose compilation takes half a minute. `kind`: dense, causal, lengths (of keys, half of S on average)
    or bias (learned, (1, H, T, S))."""
    causal, lengths, bias = kind == "causal", kind == "lengths", kind == "bias"
    backends = [name for name, backend in CUDA_BACKENDS.items() if serves(backend, kind, grid.dtype, width)]
    long = queries == keys >= 2048
    flexible = long and width == 128
    names = ("ours", *(["triton"] if bar == "GA2" else []), "sdpa", *backends, *(["flex"] if flexible else []))

    def keys_of(time: int) -> int:
        return time * keys // queries

    def lengths_of(time: int) -> torch.Tensor:
        share = torch.rand(batch, generator=torch.Generator().manual_seed(11))
        return (share * keys_of(time)).long() + 1

    def build(inputs: Inputs, time: int) -> dict[str, Entrant]:
        source = keys_of(time)
        query, key, value = tensors = [inputs.noise(batch, count, t, width) for t in (time, source, source)]
        present = lengths_of(time).to(inputs.device)
        learned = inputs.noise(1, count, time, source) if bias else None
        leaves = tensors if learned is None else (*tensors, learned)
        mask = (torch.arange(source, device=inputs.device) < present[:, None])[:, None, None] if lengths else learned

        def ours() -> torch.Tensor:
            return s2s.attention(
                query, key, value, causal=causal, bias=learned, key_lengths=present if lengths else None
            )  # fmt: skip

        def by_triton() -> torch.Tensor:
            with s2s.use_backend("triton"):
                return ours()

        def theirs() -> torch.Tensor:
            return sdpa(query, key, value, attn_mask=mask, is_causal=causal)

        functions = {"ours": ours, "triton": by_triton, "sdpa": theirs}
        functions |= {name: on_backend(CUDA_BACKENDS[name], theirs) for name in backends}
        if flexible:
            options: dict[str, Any] = {} if learned is None else {"score_mod": biased_score(learned)}
            if causal or lengths:
                options["block_mask"] = create_block_mask(
                    (lambda b, h, i, j: i >= j) if causal else (lambda b, h, i, j: j < present[b]),
                    batch if lengths else None, None, time, source, inputs.device,
                )  # fmt: skip
            functions["flex"] = lambda: compiled_flex_attention()(query, key, value, **options)
        return {name: Entrant(functions[name], leaves) for name in names}

    def amount(t: int) -> work.Work:
        present = lengths_of(t).double().mean().item() / keys_of(t) if lengths else 1.0
        share = (t + 1) / (2 * t) if causal else present
        return work.attention(batch, count, t, keys_of(t), width, share=share, present=present)

    across = "" if queries == keys else f" S{keys}"
    row = f"{kind} attention B{batch} H{count}{across} D{width}"
    case = Case(row, queries, batch * queries, build, amount, names, varied=not flexible)
    return on_gpu(case, bar, quick=not long or flexible)


def for_a_gpu(grid: Grid) -> list[Case]:
    if grid.device != "cuda":
        return []
    short = ((16, 64, 512, 512), (16, 128, 256, 384), (8, 256, 512, 512), (4, 512, 512, 512))
    both = ("dense", "causal")
    return [
        *(on_a_gpu(grid, kind, *sizes, bar="GA1") for kind in ("lengths", "bias", "dense") for sizes in short),
        *(on_a_gpu(grid, kind, 4, width, 2048, 2048, bar="GA2") for width in (64, 128) for kind in both),
        *(on_a_gpu(grid, kind, 4, width, 2048, 2048, bar="GA1") for width in (64, 128) for kind in ("lengths", "bias")),
        *(on_a_gpu(grid, kind, 4, 256, 2048, 2048, bar="GA1") for kind in (*both, "lengths", "bias")),
        *(on_gpu(packed(grid, 2048, causal, 16, 16, 128)) for causal in (False, True)),
    ]


def cases(grid: Grid) -> list[Case]:
    return [
        *dense(grid, 32, False, quick=(32, 64), lengths=[32, 64]),
        *dense(grid, 8, True, quick=(256,), lengths=[128, 256, 512]),
        *dense(grid, 1, True, quick=(32, 128, 512, 2048)),
        *dense(grid, 1, False, quick=(1024,)),
        padded(),
        packed(grid, 64, causal=False, batch=32),
        packed(grid, 256, causal=False, quick=True),
        packed(grid, 1024, causal=True),
        banded(),
        dropped(256, quick=True),
        dropped(1024, quick=False),
        biased(256, quick=True),
        biased(1024, quick=False),
        decoding("32 over 8 heads", 32, 8, 128, 2048),
        decoding("bfloat16", 8, 8, 64, 4096, torch.bfloat16),
        *for_a_gpu(grid),
    ]


def test_attention(case: str, direction: str, entrant: str, race: Any) -> None:
    race(case, direction, entrant)
