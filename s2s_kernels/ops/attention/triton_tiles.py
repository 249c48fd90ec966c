"""The sizes of what a program of the Triton kernels of attention works on at a time.

HOPPER holds what was measured on an H100 (torch 2.11, triton 3.6, 2026-11-27; benchmarks/tiles.py does it), in
bfloat16: the fastest of those tried with which the compiler doesn't spill, but for SPILLING, at T = S = 2048 without
a mask or bias (D 64 and 128; causal forward too), at T = S = 512 under a bias (D 64, 256 and 512) and without (D 256
and 512), and at T = 256, S = 384 under a bias (D 128). What this holds nothing of is reasoned, not measured: other
architectures, float32, heads wider than 512, softcap, slopes, dropout and decoding.
"""

import torch

from ..triton_common import power
from .triton_call import Call


def generation(x: torch.Tensor) -> int:
    """The major compute capability, 9 or 10 where a program has twice the shared memory of 8; 12 hasn't."""
    major = torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 8
    return major if major in (9, 10) else 8


def _tiles(rows: int, keys: int, edge: int, chunk: int, warps: int, stages: int) -> dict[str, int]:
    return {"ROWS": rows, "KEYS": keys, "EDGE": edge, "CHUNK": chunk, "num_warps": warps, "num_stages": stages}


def _registers(many: bool) -> dict[str, int]:
    """All there are, where the assembler might spill a few to fit two programs into 128 each."""
    return {"maxnreg": 255} if many else {}


# Of compute capability 9, in 16 bits, without and with a mask or bias, up to a width of heads: rows, keys, edge, chunk,
# warps and stages.
HOPPER = {
    ("forward", False, 64): (64, 64, 32, 128, 4, 3),
    ("forward", False, 128): (64, 64, 64, 128, 4, 3),
    ("forward", False, 256): (128, 64, 16, 256, 8, 2),
    ("forward", False, 512): (64, 32, 32, 512, 8, 2),
    ("forward", True, 64): (128, 32, 32, 128, 8, 3),
    ("forward", True, 128): (64, 64, 64, 128, 4, 2),
    ("forward", True, 256): (128, 32, 32, 256, 8, 2),
    ("forward", True, 512): (64, 32, 32, 512, 8, 2),
    ("query", False, 64): (64, 64, 32, 128, 4, 3),
    ("query", False, 128): (128, 64, 32, 128, 8, 3),
    ("query", False, 256): (64, 32, 32, 256, 4, 2),
    ("query", False, 512): (64, 64, 64, 128, 8, 1),
    ("query", True, 64): (64, 64, 64, 128, 4, 3),
    ("query", True, 128): (64, 32, 32, 128, 4, 3),
    ("query", True, 256): (64, 32, 32, 256, 8, 2),
    ("query", True, 512): (64, 64, 64, 128, 8, 1),
    ("key", False, 64): (64, 64, 16, 128, 4, 3),
    ("key", False, 128): (32, 128, 16, 128, 8, 3),
    ("key", False, 256): (32, 64, 32, 256, 4, 2),
    ("key", False, 512): (64, 64, 64, 128, 8, 1),
    ("key", True, 64): (64, 64, 32, 128, 4, 3),
    ("key", True, 128): (32, 128, 16, 128, 8, 3),
    ("key", True, 256): (64, 64, 64, 128, 8, 2),
    ("key", True, 512): (32, 64, 32, 128, 8, 2),
    ("bias", True, 64): (64, 64, 16, 64, 4, 3),
    ("bias", True, 128): (64, 64, 16, 128, 8, 2),
    ("bias", True, 256): (128, 64, 16, 128, 8, 2),
    ("bias", True, 512): (64, 64, 16, 64, 4, 3),
}
# Of these, those that one of two releases of the compiler spills registers of, some of them few: all the same they were
# measured to take a quarter to nine tenths of the time of those that it doesn't.
SPILLING = frozenset({
    ("forward", False, 512), ("forward", True, 512), ("query", False, 256), ("query", False, 512),
    ("query", True, 256), ("query", True, 512), ("key", False, 128), ("key", False, 256), ("key", False, 512),
    ("key", True, 256), ("key", True, 512), ("bias", True, 64), ("bias", True, 256), ("bias", True, 512),
})  # fmt: skip


def widths(call: Call) -> tuple[int, int]:
    """Of keys and of values, as powers of two."""
    return power(call.width, 16, 1024), power(call.columns, 16, 1024)


def _hopper(call: Call, direction: str, most: int) -> dict[str, int] | None:
    both = call.mask is not None and call.bias is not None
    if generation(call.query) != 9 or call.query.dtype == torch.float32 or call.busy or both:
        return None
    sizes = HOPPER.get((direction, call.hides, max(most, 64)))
    return None if sizes is None else _tiles(*sizes)


def _whole(tiles: dict[str, int], call: Call, *names: str) -> dict[str, int]:
    """At least 32 terms in the products of weights, whose number in tiles has these names, below a mask and dropout.
    The compiler lays the weights out by the narrowest load that they come of, the mask's of 8 bits, and by half of that
    where numbers are joined, as dropout's are: so that a product of 16 terms takes half of them twice."""
    if call.mask is None or call.seed is None:
        return tiles
    return {**tiles, **{name: max(tiles[name], 32) for name in names}}


# Sizes with which the compiler doesn't spill, on any of the architectures.
def forward_tiles(call: Call, wide_out: bool) -> dict[str, int]:
    width, columns = widths(call)
    most, major = max(width, columns), generation(call.query)
    known = None if wide_out else _hopper(call, "forward", most)
    if known is not None:
        tiles = known
    elif call.query.dtype == torch.float32 or wide_out:
        if most <= 64:
            tiles = _tiles(64, 32, 16, 32, 8, 2)
        elif most <= 128:
            tiles = _tiles(64, 16, 16, 32, 8, 2) if call.busy else _tiles(32, 32, 16, 32, 8, 2)
        elif most <= 512:
            tiles = _tiles(8192 // most, 32, 16, 32, 8, 2)
        else:
            tiles = _tiles(8, 16, 16, 16, 8, 1) if call.busy or wide_out else _tiles(8, 16, 16, 32, 8, 2)
    elif most > 256:
        tiles = _tiles(32 if most <= 512 else 8 if call.busy else 16, 32, 16, 64, 8, 2)
    elif most > 128:
        tiles = _tiles(64, 32, 16, 256, 8, 2)
    elif call.hides:
        edge = 64 if most <= 64 else 32
        tiles = _tiles(128, 32, 16, 128, 8, 2) if call.busy else _tiles(64, edge, edge, 128, 8, 2)
    elif call.busy:
        tiles = _tiles(128 if call.group == 1 else 64, 64 if major >= 9 else 32, 16, 128, 8, 2)
    else:
        tiles = _tiles(128, 32, 16, 128, 8, 2)
        if major >= 10 or most <= 64:
            tiles |= {"KEYS": 64 if most > 64 else 128, "EDGE": 32}
    rows = call.rows  # a few, as in decoding, or some: not a compilation for each number of queries
    if rows <= 16 and most <= 256:
        keys = 32 if tiles["CHUNK"] == 32 else 128 if most <= 128 else 64
        tiles = _tiles(16, keys, 32, tiles["CHUNK"], 4, 2)
    elif rows <= 16:
        tiles |= {"ROWS": min(tiles["ROWS"], 16)}
    elif rows <= 64 and tiles["ROWS"] > 64:
        tiles |= {"ROWS": 64}
    many = call.busy or call.query.dtype == torch.float32 or (call.packed and rows <= 16)
    tiles = _whole(tiles, call, "KEYS", "EDGE")
    return {**tiles, **_registers(many), "CHUNK": min(width, tiles["CHUNK"]), "COLUMNS": columns}


def backward_tiles(call: Call, direction: str) -> dict[str, int]:
    width, columns = widths(call)
    most, major = max(width, columns), generation(call.query)
    known = _hopper(call, direction, most)
    if known is not None:
        tiles = known
    elif call.query.dtype == torch.float32:
        if direction == "bias":
            tiles = _tiles(32, 32, 16, 32, 8, 2)
        elif direction == "query":
            rows = 32 if most <= 64 else 16 if most <= 256 else 8
            tiles = _tiles(rows, max(rows, 16), 16, 16 if most <= 64 else 32, 8, 2 if most <= 256 else 1)
        else:
            keys = 32 if most <= 128 else 16 if most <= 512 else 8
            rows = 32 if most <= 64 else 16
            tiles = _tiles(rows, keys, 16, 32, 8, 1 if 256 < most <= 512 else 2)
    elif direction == "bias":
        tiles = _tiles(64, 64 if major >= 9 else 32, 16, 64, 8, 2)
    elif most > 128:
        rows = keys = 16 if most > 512 else 32 if most > 256 or major < 9 else 64
        if call.busy and direction == "key":
            rows = min(rows, 32)
        elif call.busy and most > 256:
            rows, keys = min(rows, 8192 // most), 16
        tiles = _tiles(rows, keys, 16, 64, 8, 2)
    elif direction == "query":
        if call.busy:
            tiles = _tiles(64 if major == 9 and call.group == 1 else 32, 32, 16, 128, 8, 2)
        else:
            tiles = _tiles(128 if major >= 9 else 64, 64, 32 if call.hides and most <= 64 else 16, 128, 8, 2)
    elif call.busy:  # packed sequences leave no registers for whole heads
        keys = 64 if call.mask is None else 32
        tiles = _tiles(32, keys, 16, 64 if major == 9 and most > 64 and call.packed else 128, 8, 2)
    else:
        tiles = _tiles(64 if most <= 64 and major < 10 else 32, 128 if most <= 64 or major >= 9 else 64, 16, 128, 8, 2)
    tiles = _whole(tiles, call, "EDGE", "ROWS" if direction == "key" else "KEYS")
    chunks = {"CHUNK": min(width, tiles["CHUNK"]), "VALUE_CHUNK": min(columns, tiles["CHUNK"])}
    many = call.busy or direction == "bias" or call.query.dtype == torch.float32
    return {**tiles, **_registers(many), **chunks}
