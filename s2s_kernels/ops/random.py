"""Seeds and the counter-based random numbers that every backend draws alike.

Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). The word of the element in column `column` of row `row`
(a row is everything but the last dimension, flattened) in stream `stream` under the seed (s0, s1) is, all in 32-bit arithmetic,

    key     = (low(s0), high(s0))
    counter = (column // 32 * 8 + column % 8, low(row), high(row), low(s1) + stream)
    word    = philox(counter, key)[column // 8 % 4]

so that eight neighbouring counters give 32 neighbouring columns. An element is kept iff word >= round(p * 2^32).
"""

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def draw_seed(device: torch.device) -> torch.Tensor:
    """Two int64 from torch's generator on `device`, as a tensor (2,): `torch.manual_seed` reproduces them."""
    return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=device)


def threshold(p: float) -> int:
    """The 32-bit word below which an element is dropped with probability p."""
    return min(2**32, round(p * 2**32))


def _multiply(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # The 64-bit product of two 32-bit words does not fit a signed int64: its halves are made from 16-bit pieces.
    high, low = (a >> 16) * b, (a & 0xFFFF) * b
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: list[torch.Tensor], key: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
    """Four 32-bit words (in int64 tensors) from four counter words and two key words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return [c0, c1, c2, c3]


def keep_mask(seed: torch.Tensor, shape: tuple[int, ...], p: float, stream: int = 0) -> torch.Tensor:
    """Which elements of a tensor survive dropout with probability p of being dropped.

    Args:
        seed: (2,) int64, from `draw_seed`.
        shape: the tensor's; the last dimension is the column, all before it the row.
        p: in [0, 1].
        stream: tells apart several masks drawn under one seed.

    Returns:
        bool tensor of `shape` on the seed's device, True = kept.
    """
    columns = shape[-1]
    rows = 1
    for size in shape[:-1]:
        rows = rows * size
    column = torch.arange(columns, device=seed.device)
    row = torch.arange(rows, device=seed.device)[:, None]
    # Masked after the shift: an arithmetic shift of a negative seed would carry its sign into the high word.
    key = (seed[0] & _LOW, (seed[0] >> 32) & _LOW)
    counter = [
        (column // 32 * 8 + column % 8).expand(rows, columns),
        (row & _LOW).expand(rows, columns),
        (row >> 32).expand(rows, columns),
        ((seed[1] + stream) & _LOW).expand(rows, columns),
    ]
    words = torch.stack(philox(counter, key))
    word = words.gather(0, (column // 8 % 4).expand(1, rows, columns))[0]
    return (word >= threshold(p)).reshape(shape)
