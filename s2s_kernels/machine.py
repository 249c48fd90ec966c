"""Facts and measured limits of this machine, for `info`, the benchmarks and their reports."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

try:
    from . import _machine  # type: ignore[attr-defined]
except ImportError as error:
    missing: str | None = f"s2s_kernels._machine is missing ({error})"
else:
    missing = None


def active_isa() -> str:
    """The instruction set that the CPU kernels run: "baseline", "avx2", "avx512", "avx512_bf16": with
    products of bfloat16 beside it, or "amx": with the tile unit beside those.

    Raises:
        RuntimeError: S2S_CPU_ISA names one that doesn't exist or that this machine lacks, or `_machine` is missing.
    """
    if missing is not None:
        raise RuntimeError(missing)
    return _machine.active_isa()


def cache_sizes() -> dict[str, int]:
    """Bytes of the data caches that one core sees, by name ("L1", "L2", "L3"); empty where the system doesn't tell."""
    sizes = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            if (folder / "type").read_text().strip() == "Instruction":
                continue
            level, size = (folder / "level").read_text().strip(), (folder / "size").read_text().strip()
        except OSError:
            continue
        unit = {"K": 2**10, "M": 2**20}.get(size[-1:], 1)
        sizes[f"L{level}"] = int(size.rstrip("KM")) * unit
    return sizes


def peak_flops(threads: int = 1, seconds: float = 0.1) -> float:
    """Peak rate of float32 fused multiply-adds over so many threads, in floating-point operations a second."""
    return _machine.fma_rate_float32(threads, seconds)


def bandwidths(seconds: float = 0.1, threads: int = 1) -> list[tuple[str, float, float]]:
    """What so many threads together read from each level of memory: (name, bytes that fit in it, bytes a second),
    nearest first.

    Each level is probed with a buffer of half its size, memory with four times the last cache (at least 64 MiB). Each
    thread reads a buffer of its own; those in the last cache and in memory share that size.
    """
    sizes = cache_sizes() or {"L2": 2**19, "L3": 2**24}
    last = max(sizes.values())
    beyond = max(2**26, 4 * last)
    probes = [(name, float(size), size // 2) for name, size in sizes.items() if name != "L1"]
    probes.append(("DRAM", float("inf"), beyond))
    levels = []
    with ThreadPoolExecutor(threads) as pool:
        for name, size, buffer in probes:
            each = buffer // threads if size >= last else buffer
            rates = pool.map(lambda _, each=each: _machine.read_bandwidth(each, seconds), range(threads))
            levels.append((name, size, sum(rates)))
    return levels


def processor() -> str:
    """The processor's own name, or the architecture where it has none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else os.uname().machine
