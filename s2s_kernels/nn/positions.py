"""Where in a sequence an element stands: encodings that are added to it, and rotations of queries and keys."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import checks


class SinusoidalPositions(nn.Module):
    """Adds fixed encodings (Vaswani et al. 2017, section 3.5): sin(position / base^(2i / E)) at width 2i, the cosine at
    2i + 1. No parameters, no buffers, no greatest length.

    Args:
        d_model: E.
        base: of the wavelengths, which go from 2 pi to 2 pi base.
    """

    def __init__(self, d_model: int, base: float = 10000.0) -> None:
        super().__init__()
        _at_least_one("SinusoidalPositions", "d_model", d_model)
        _check_base("SinusoidalPositions", base)
        self.d_model, self.base = d_model, base

    def forward(self, x: torch.Tensor, offset: int | torch.Tensor = 0) -> torch.Tensor:
        """
        Args:
            x: (B, T, E).
            offset: the position of x[:, 0], an int or one a row, (B,) int32 or int64: while decoding, the lengths of a
                `KVCache` before the append.

        Returns:
            (B, T, E), in x's dtype; the encodings are made in float32 at least.
        """
        _check_embedded("SinusoidalPositions", x, self.d_model)
        position = _positions("SinusoidalPositions", x, x.shape[1], offset)
        angle = _angles(position, self.d_model, self.base, x)
        # an odd width leaves out the last cosine
        encoded = torch.stack((angle.sin(), angle.cos()), -1).flatten(-2)[..., : self.d_model]
        return x + encoded.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.d_model}, base={self.base}"


class LearnedPositions(nn.Module):
    """Adds a learned vector per position, drawn from a normal distribution of deviation 0.02 (Radford et al. 2018).

    Args:
        max_length: L, the number of positions.
        d_model: E.
        device, dtype: of the parameter.

    Parameter: weight (L, E).
    """

    def __init__(
        self,
        max_length: int,
        d_model: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _at_least_one("LearnedPositions", "max_length", max_length)
        _at_least_one("LearnedPositions", "d_model", d_model)
        self.max_length, self.d_model = max_length, d_model
        self.weight = nn.Parameter(torch.empty(max_length, d_model, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: torch.Tensor, offset: int | torch.Tensor = 0) -> torch.Tensor:
        """
        Args:
            x: (B, T, E).
            offset: the position of x[:, 0], an int or one a row, (B,) int32 or int64; offset + T is at most L.

        Returns:
            (B, T, E).
        """
        name = "LearnedPositions"
        _check_embedded(name, x, self.d_model)
        time = x.shape[1]
        if time > self.max_length:
            checks.wrong_value(name, "x", f"of at most L = {self.max_length} positions", tuple(x.shape))
        position = _positions(name, x, time, offset, self.max_length - time)
        return x + F.embedding(position, self.weight)

    def extra_repr(self) -> str:
        return f"{self.max_length}, {self.d_model}"


class RotaryPositions(nn.Module):
    """Rotates pairs of a query's and a key's elements by angles proportional to their positions, so that a score
    depends on the difference of positions only (Su et al. 2021, "RoFormer"). No parameters, no buffers, no greatest
    length.

    Pair i turns by position / base^(2i / D). It is made of the elements i and i + D/2 unless `interleaved`, as in
    GPT-NeoX, Llama and most published checkpoints: two contiguous halves. `interleaved` pairs 2i with 2i + 1, as the
    paper does. A model trained with one computes the same with the other once the rows of its projections of queries
    and keys are permuted.

    Args:
        head_dim: D, even.
        base: of the wavelengths, which go from 2 pi to 2 pi base.
        interleaved: how elements are paired.
    """

    def __init__(self, head_dim: int, base: float = 10000.0, *, interleaved: bool = False) -> None:
        super().__init__()
        if checks.integer("RotaryPositions", "head_dim", head_dim) <= 0 or head_dim % 2:
            checks.wrong_value("RotaryPositions", "head_dim", "even and at least 2", head_dim)
        _check_base("RotaryPositions", base)
        self.head_dim, self.base, self.interleaved = head_dim, base, interleaved

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, offset: int | torch.Tensor = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            query: (B, H, T, D).
            key: (B, Hkv, T, D), of the same positions.
            offset: the position of the first of them, an int or one a row, (B,) int32 or int64: while decoding, the
                lengths of a `KVCache` before the append, which keeps rotated keys.

        Returns:
            query and key, rotated in float32 at least, each in its own dtype.
        """
        name = "RotaryPositions"
        for argument, x in (("query", query), ("key", key)):
            checks.data(name, argument, x, 4, "(B, H, T, D)")
            wanted = (query.shape[0], query.shape[2], self.head_dim)
            if (x.shape[0], *x.shape[2:]) != wanted:
                checks.wrong_value(
                    name, argument, "(B, H, T, D) with B, T, D = {}, {}, {}".format(*wanted), tuple(x.shape)
                )
        checks.beside(name, "key", key, query, "query")
        position = _positions(name, query, query.shape[2], offset)
        angle = _angles(position, self.head_dim, self.base, query)
        if angle.dim() == 3:
            angle = angle[:, None]  # (B, 1, T, D/2)
        cosine, sine = angle.cos(), angle.sin()
        return self._rotate(query, cosine, sine), self._rotate(key, cosine, sine)

    def _rotate(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        first, second = (x[..., ::2], x[..., 1::2]) if self.interleaved else x.chunk(2, -1)
        pairs = (first * cosine - second * sine, first * sine + second * cosine)
        turned = torch.stack(pairs, -1).flatten(-2) if self.interleaved else torch.cat(pairs, -1)
        return turned.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.head_dim}, base={self.base}, interleaved={self.interleaved}"


def _at_least_one(name: str, argument: str, size: int) -> None:
    if checks.integer(name, argument, size) <= 0:
        checks.wrong_value(name, argument, "at least 1", size)


def _check_base(name: str, base: Any) -> None:
    if not base > 0:
        checks.wrong_value(name, "base", "above 0", base)


def _check_embedded(name: str, x: torch.Tensor, width: int) -> None:
    checks.data(name, "x", x, 3, "(B, T, E)")
    if x.shape[2] != width:
        checks.wrong_value(name, "x", f"of width E = {width}", tuple(x.shape))


def _positions(name: str, x: torch.Tensor, time: int, offset: int | torch.Tensor, maximum: int = 2**62) -> torch.Tensor:
    """Positions (T,), or (B, T) of an offset a row, int64 on the device of x (B, ...)."""
    steps = torch.arange(time, device=x.device)
    if isinstance(offset, torch.Tensor):
        offset = checks.lengths(name, "offset", offset, x, x.shape[0], maximum, "L - T")  # type: ignore[assignment]
        return offset[:, None] + steps  # type: ignore[index]
    offset = checks.integer(name, "offset", offset, "an integer, or a tensor of one a row")
    if not 0 <= offset <= maximum:
        checks.wrong_value(name, "offset", f"in [0, {maximum}]", offset)
    return offset + steps


def _angles(position: torch.Tensor, width: int, base: float, like: torch.Tensor) -> torch.Tensor:
    """position / base^(2i / width): (T, ceil(width / 2)), or (B, T, ...), in float32, float64 beside float64."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    even = torch.arange(0, width, 2, device=like.device, dtype=dtype)
    return position.to(dtype)[..., None] * torch.exp2(even * (-math.log2(base) / width))
