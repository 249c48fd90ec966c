"""A call of attention as its Triton kernels are told of it: strides, limits, and the constants of a compilation."""

import dataclasses
import math
from typing import Any

import torch

from ..triton_common import dropout_numbers, precision
from . import triton_scores as scores

LOG2E = math.log2(math.e)
ROW_STRIDE = 2**24  # 32 bits hold what a tile of 128 rows spans


def kind_of(tensor: torch.Tensor | None, group: int) -> int:
    """What a mask or bias varies over, and how the kernels read it."""
    if tensor is None:
        return 0
    batch, head, row, column = pair_strides(tensor)
    kind = scores.GIVEN.value
    if row or (head and group > 1):
        kind |= scores.ROWS.value
    if column:
        kind |= scores.COLUMNS.value
    if column == 1:
        kind |= scores.UNIT.value
        if not any(size % 16 for size in (batch, head, row, tensor.shape[3])):
            kind |= scores.VECTORS.value
    return kind


def pair_strides(tensor: torch.Tensor | None) -> tuple[int, ...]:
    if tensor is None:
        return (0, 0, 0, 0)
    return tuple(stride if size != 1 else 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def laid_out(x: torch.Tensor, packed: bool) -> torch.Tensor:
    """x (B, H, T, D), `packed` (T, H, D), as the kernels read it: (B, H, T, D or more), `packed` B = 1, of which whole
    vectors of 16 bytes can be loaded. A row is contiguous, begins at a multiple of them and ends at one, with zeros
    past D, and is less than ROW_STRIDE elements from the next. What isn't so is copied, and what is broadcast stays
    so."""
    if packed:
        x = x.transpose(0, 1)[None]
    vector = 16 // x.element_size()
    *strides, unit = x.stride()
    *sizes, width = x.shape
    first, second, row = (stride if size > 1 else 0 for size, stride in zip(sizes, strides, strict=True))
    vectors = unit == 1 and not (width | first | second | row) % vector and x.data_ptr() % 16 == 0
    if vectors and row < ROW_STRIDE:
        return x
    whole = (width + vector - 1) // vector * vector
    once = x[tuple(slice(0, 1 if stride == 0 else None) for stride in strides)]
    rows = x.new_empty(*once.shape[:3], whole)
    rows[..., :width] = once
    if width < whole:
        rows[..., width:].zero_()
    return rows.expand(*sizes, whole)


@dataclasses.dataclass(frozen=True)
class Call:
    """What the kernels of both directions are told alike. Packed sequences lie in a single element of the batch, and
    what are lengths else says where they begin, (sequences + 1,)."""

    query: torch.Tensor  # these three are laid out
    key: torch.Tensor
    value: torch.Tensor
    width: int
    columns: int  # the width of values
    mask: torch.Tensor | None
    bias: torch.Tensor | None
    slopes: torch.Tensor | None
    query_lengths: torch.Tensor | None
    key_lengths: torch.Tensor | None
    seed: torch.Tensor | None
    left: int | None
    right: int | None
    bottom_right: bool
    dropout_p: float
    factor: float
    softcap: float | None
    packed: bool
    needed: torch.Tensor | None = None  # (1,): 0 where there is nothing to be done, which only the GPU knows

    @property
    def sequences(self) -> int:
        return (
            self.query_lengths.shape[0] - 1 if self.packed and self.query_lengths is not None else self.query.shape[0]
        )

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def time(self) -> int:
        return self.query.shape[2]

    @property
    def source(self) -> int:
        return self.key.shape[2]

    @property
    def group(self) -> int:
        return self.heads // self.key.shape[1] if self.key.shape[1] else 1

    @property
    def rows(self) -> int:
        """How many a sequence has, with all heads that read the same keys; on average where only the GPU knows more."""
        return -(-self.time * self.group // max(self.sequences, 1)) if self.packed else self.time * self.group

    @property
    def lse_shape(self) -> tuple[int, ...]:
        return self.query.shape[1:3] if self.packed else self.query.shape[:3]

    @property
    def folded(self) -> bool:
        """Whether the scale, and a factor that makes exp of exp2, are applied within the exponent: in 16 bits, where
        nothing is added to scores, and their order is that of the products."""
        plain = self.bias is None and self.slopes is None and self.softcap is None
        return plain and self.query.dtype != torch.float32 and self.factor > 0

    @property
    def hides(self) -> bool:
        return self.mask is not None or self.bias is not None

    @property
    def busy(self) -> bool:
        """Whether more than products and what hides takes registers."""
        return self.softcap is not None or self.slopes is not None or self.seed is not None

    def programs(self, rows: int, size: int) -> int:
        """Those that make `rows` of each head in tiles of `size`, as triton_scores.tile_of counts them."""
        tiles = rows // size + self.sequences if self.packed else -(-rows // size) * self.sequences
        return tiles * self.key.shape[1]

    def strides(self) -> tuple[int, ...]:
        return (*self.query.stride()[:3], *self.key.stride()[:3], *self.value.stride()[:3])

    def pairs(self) -> tuple[Any, ...]:
        slopes = (0, 0) if self.slopes is None else self.slopes.stride()
        return (*pair_strides(self.mask), *pair_strides(self.bias), *((0, 0, *slopes)[-2:]))

    def limits(self) -> tuple[Any, ...]:
        """Sizes, the window, and what else is no constant of a compilation."""
        far = self.time + self.source
        sides = (far if side is None else min(side, far) for side in (self.left, self.right))
        return (self.time, self.source, *sides)

    def numbers(self) -> tuple[Any, ...]:
        softcap = self.softcap if self.softcap is not None else 0.0
        return self.factor * LOG2E if self.folded else self.factor, softcap, *dropout_numbers(self.dropout_p)

    def options(self) -> dict[str, Any]:
        """Constants of a compilation."""
        return {
            "WIDTH": self.width, "VALUE_WIDTH": self.columns, "LEFT": self.left is not None,
            "RIGHT": self.right is not None, "BOTTOM_RIGHT": self.bottom_right, "SOFTCAP": self.softcap is not None,
            "PRECISION": precision(),
        }  # fmt: skip

    def grouped(self) -> dict[str, Any]:
        group = self.group
        return {
            "GROUP": group, "MASK": kind_of(self.mask, group), "BIAS": kind_of(self.bias, group), "FOLDED": self.folded,
            "PACKED": self.packed,
        }  # fmt: skip
