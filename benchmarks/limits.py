"""What this machine can do at most, measured, and the time that a call takes at least on it."""

import time
from dataclasses import dataclass
from typing import Any

import torch

from s2s_kernels import machine

from .work import Work


@dataclass(frozen=True)
class Limits:
    """Peak rate in floating-point operations a second, for each level of memory (name, bytes that fit, bytes a
    second), nearest first, and hyperbolic tangents a second where there are units for them."""

    flops: float
    levels: tuple[tuple[str, float, float], ...]
    special: float = float("inf")

    def bandwidth(self, resident: float) -> float:
        """Bytes a second of the nearest level that holds so many bytes."""
        return next((rate for _, size, rate in self.levels if resident <= size), self.levels[-1][2])

    def seconds(self, work: Work) -> float:
        """The least time: each phase is bound by arithmetic, by memory or by the units for tangents, whichever takes
        longest."""
        return sum(
            max(p.flops / self.flops, p.bytes / self.bandwidth(p.resident), p.special / self.special)
            for p in work.phases
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON: rates by name; the size of main memory is left out."""
        levels = {
            name: {"bytes": None if size == float("inf") else size, "rate": rate} for name, size, rate in self.levels
        }
        special = {} if self.special == float("inf") else {"special": self.special}
        return {"flops": self.flops, "levels": levels, **special}


def measure(threads: int, device: str, dtype: torch.dtype) -> Limits:
    """Probes this machine, about a second. On a CPU: fused multiply-adds of float32 (float64 runs at half of it) and
    reads from each level of memory, on so many threads; on a GPU a large matrix product, a large copy, and tangents.

    Raises:
        RuntimeError: `s2s_kernels._machine`, which holds the CPU's probes, is missing.
    """
    if device == "cuda":
        return _measure_cuda(dtype)
    if machine.missing is not None:
        raise RuntimeError(machine.missing)
    flops = machine.peak_flops(threads) * (0.5 if dtype == torch.float64 else 1.0)
    return Limits(flops, tuple(machine.bandwidths(threads=threads)))


def _measure_cuda(dtype: torch.dtype) -> Limits:
    from . import tangents  # it imports triton

    side = 8192
    a = torch.randn(side, side, device="cuda", dtype=dtype)
    source = torch.randn(2**28, device="cuda", dtype=torch.float32)  # 1 GiB, beyond any cache
    target = torch.empty_like(source)
    product = _best(lambda: torch.mm(a, a))
    copy = _best(lambda: target.copy_(source))
    special = tangents.count(source) / _best(lambda: tangents.run(source))
    return Limits(2 * side**3 / product, (("device memory", float("inf"), 2 * source.nbytes / copy),), special)


def _best(function: Any) -> float:
    times = []
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)
