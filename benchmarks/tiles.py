"""python -m benchmarks.tiles [NAME...]: measures tiles of attention's Triton kernels on a CUDA device.

Of each kind of call it compiles every candidate in many processes, then times the kernel alone, and prints the fastest
beside what s2s_kernels/ops/attention/triton_tiles.py has: rows, keys, edge, chunk, warps and stages. What is taken from
it into that file is up to who reads it, and whether it spills to tests/ops/test_triton_compilation.py.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from . import gpu

Tiles = tuple[int, int, int, int, int, int]
KERNELS = {"forward": "forward_kernel", "query": "query_kernel", "key": "key_value_kernel", "bias": "bias_kernel"}
REPEATS = 6
NARROW = {
    "forward": [
        (64, 64, 32, 128, 4, 3), (64, 64, 64, 128, 4, 3), (64, 64, 64, 128, 4, 2), (128, 32, 32, 128, 8, 3),
        (128, 64, 32, 128, 8, 3), (128, 64, 64, 128, 8, 2), (128, 64, 64, 128, 8, 3), (128, 128, 32, 128, 8, 2),
    ],
    "query": [
        (64, 32, 32, 128, 4, 3), (64, 64, 32, 128, 4, 3), (64, 64, 64, 128, 4, 2), (64, 64, 64, 128, 4, 3),
        (128, 32, 32, 128, 8, 2), (128, 64, 32, 128, 8, 3), (128, 64, 64, 128, 8, 2),
    ],
    "key": [
        (64, 64, 16, 128, 4, 3), (64, 64, 32, 128, 4, 3), (64, 64, 64, 128, 4, 2), (32, 64, 32, 128, 4, 3),
        (32, 128, 16, 128, 8, 3), (32, 128, 32, 128, 8, 3), (64, 64, 32, 128, 8, 3), (64, 128, 64, 128, 8, 2),
    ],
    "bias": [
        (64, 64, 16, 64, 4, 3), (64, 64, 16, 64, 8, 3), (64, 64, 16, 128, 8, 2), (128, 64, 16, 64, 8, 3),
        (128, 64, 16, 128, 8, 2),
    ],
}  # fmt: skip
WIDE = {
    "forward": [
        (128, 64, 16, 256, 8, 2), (128, 64, 64, 256, 8, 2), (128, 32, 32, 256, 8, 2), (64, 64, 64, 256, 4, 2),
        (64, 64, 32, 64, 8, 2), (64, 32, 32, 512, 8, 2), (64, 64, 64, 128, 8, 2), (64, 32, 32, 64, 8, 3),
    ],
    "query": [
        (64, 64, 32, 64, 8, 2), (64, 64, 64, 64, 8, 3), (64, 64, 64, 128, 8, 2), (64, 64, 64, 128, 8, 1),
        (64, 32, 32, 256, 4, 2), (64, 32, 32, 256, 8, 2), (64, 32, 32, 64, 8, 2), (64, 16, 16, 512, 8, 2),
    ],
    "key": [
        (64, 64, 32, 64, 8, 3), (64, 64, 64, 64, 8, 2), (64, 64, 64, 128, 8, 2), (64, 64, 64, 128, 8, 1),
        (32, 64, 32, 256, 4, 2), (32, 64, 32, 128, 8, 2), (32, 64, 32, 64, 8, 2), (16, 64, 16, 512, 8, 2),
    ],
    "bias": NARROW["bias"],
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A call in bfloat16 with 16 heads, and candidates by direction."""

    batch: int
    width: int
    queries: int
    keys: int
    candidates: dict[str, list[Tiles]]
    bias: bool = False
    causal: bool = False
    kv_heads: int = 16

    def directions(self) -> list[str]:
        return [name for name in self.candidates if self.bias or name != "bias"]

    def key(self, direction: str) -> tuple[str, bool, int]:
        """Where the table has it."""
        return direction, self.bias, max(self.width, 64)


KINDS = {
    "dense64": Kind(16, 64, 512, 512, NARROW),
    "dense64-long": Kind(4, 64, 2048, 2048, NARROW),
    "dense128-long": Kind(4, 128, 2048, 2048, NARROW),
    "grouped128-long": Kind(4, 128, 2048, 2048, NARROW, causal=True, kv_heads=4),
    "dense256": Kind(8, 256, 512, 512, WIDE),
    "dense512": Kind(4, 512, 512, 512, WIDE),
    "bias64": Kind(16, 64, 512, 512, NARROW, bias=True),
    "bias128": Kind(16, 128, 256, 384, NARROW, bias=True),
    "bias256": Kind(8, 256, 512, 512, WIDE, bias=True),
    "bias512": Kind(4, 512, 512, 512, WIDE, bias=True),
}


def call_of(kind: Kind, direction: str) -> Callable[[], Any]:
    """Runs forward, or backward alone."""
    import s2s_kernels as s2s

    generator = torch.Generator("cuda").manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        made = torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=generator)
        return made.requires_grad_(direction != "forward")

    query = noise(kind.batch, 16, kind.queries, kind.width)
    key, value = (noise(kind.batch, kind.kv_heads, kind.keys, kind.width) for _ in range(2))
    bias = noise(1, 16, kind.queries, kind.keys) if kind.bias else None

    def forward() -> torch.Tensor:
        with s2s.use_backend("triton"):
            return s2s.attention(query, key, value, bias=bias, causal=kind.causal, enable_gqa=True)

    if direction == "forward":
        return forward
    out = forward()
    upstream = torch.randn_like(out)
    leaves = [x for x in (query, key, value, bias) if x is not None]
    return lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True)


def microseconds(name: str, direction: str, tiles: Tiles, measure: bool = True) -> float | str:
    """Of the kernel in one call, with these tiles; 0.0 where it is compiled alone, and in words why it can't be."""
    from torch.profiler import ProfilerActivity, profile

    from s2s_kernels.ops import triton_plans
    from s2s_kernels.ops.attention import triton_tiles

    kind = KINDS[name]
    try:
        with mock.patch.dict(triton_tiles.HOPPER, {kind.key(direction): tiles}):
            triton_plans._plans.clear()  # they know of other tiles
            call = call_of(kind, direction)
            call()
            torch.cuda.synchronize()
            if not measure:
                return 0.0
            with profile(activities=[ProfilerActivity.CUDA]) as profiled:
                for _ in range(REPEATS):
                    call()
                torch.cuda.synchronize()
    except Exception as error:  # out of shared memory, or the compiler's own
        return f"{type(error).__name__}: {error}"[:100]
    found = [event for event in profiled.key_averages() if KERNELS[direction] in event.key]
    return sum(event.device_time_total for event in found) / REPEATS


def compiled(job: tuple[str, str, Tiles]) -> float | str:
    return microseconds(*job, measure=False)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tiles", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(KINDS))
    chosen = parser.parse_args(arguments)
    unknown = [name for name in chosen.names if name not in KINDS]
    if unknown:
        parser.error(f"which is {unknown[0]}? There are {', '.join(KINDS)}")
    if not gpu.devices() or not torch.cuda.is_available():
        print("tiles: this machine has no CUDA device that torch can use: nothing was done", file=sys.stderr)
        return 1
    names = chosen.names or list(KINDS)
    jobs = [(n, d, tiles) for n in names for d in KINDS[n].directions() for tiles in KINDS[n].candidates[d]]
    start = time.perf_counter()
    # Processes of their own, which share the compiler's cache on disk with this one; no forks of one that knows CUDA.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 1), mp_context=context) as pool:
        failed = {job: found for job, found in zip(jobs, pool.map(compiled, jobs), strict=True) if found}
    print(f"{len(jobs)} candidates compiled in {time.perf_counter() - start:.0f} s", flush=True)
    from s2s_kernels.ops.attention import triton_tiles

    for name in names:
        for direction in KINDS[name].directions():
            here = [job for job in jobs if job[:2] == (name, direction)]
            times = [(microseconds(*job), job[2]) for job in here if job not in failed]
            print(f"{name}, {direction}: now {triton_tiles.HOPPER.get(KINDS[name].key(direction))}")
            for took, tiles in sorted((took, tiles) for took, tiles in times if isinstance(took, float))[:4]:
                print(f"  {took:8.1f} us {tiles}", flush=True)
            lost = {job[2]: failed[job] for job in here if job in failed}
            for tiles, reason in list(lost.items())[:1]:
                print(f"  {len(lost)} not compiled, {tiles}: {reason}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
