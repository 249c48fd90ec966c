"""Checks that attention and attention of packed sequences share."""

from numbers import Real
from typing import Any

import torch

from ... import checks, dispatch

MAXIMUM_WIDTH = 1024
# With which sums of a few positions and lengths fit 32 bits.
TRITON_POSITIONS = 2**29


def width(name: str, argument: str, x: torch.Tensor, letter: str) -> None:
    if not 1 <= x.shape[-1] <= MAXIMUM_WIDTH:
        checks.wrong_value(name, argument, f"of {letter} from 1 to {MAXIMUM_WIDTH}", tuple(x.shape))


def groups(name: str, key: torch.Tensor, heads: int, kv_heads: int, enable_gqa: bool) -> None:
    if not enable_gqa:
        checks.wrong_value(name, "key", f"of H = {heads} heads unless enable_gqa", tuple(key.shape))
    if kv_heads == 0 or heads % kv_heads:
        checks.wrong_value(name, "key", f"of a number of heads that divides H = {heads}", tuple(key.shape))


def slopes(name: str, alibi_slopes: Any, query: torch.Tensor, batch: int, heads: int) -> None:
    checks.tensor(name, "alibi_slopes", alibi_slopes)
    per_batch = alibi_slopes.dim() == 2
    wanted, layout = ((batch, heads), "(B, H)") if per_batch else ((heads,), "(H,) or (B, H)")
    checks.like(name, "alibi_slopes", alibi_slopes, query, "query", wanted, layout)


def numbers(name: str, dropout_p: float, scale: Any, softcap: Any) -> None:
    checks.probability(name, "dropout_p", dropout_p)
    if scale is not None:
        real(name, "scale", scale)
    if softcap is not None:
        real(name, "softcap", softcap)
        if not softcap > 0:
            checks.wrong_value(name, "softcap", "above 0", softcap)


def restrictions(name: str, causal: Any, window: Any) -> tuple[int | None, int | None, bool]:
    """How far a query sees to the left and to the right of its diagonal, and whether that is the bottom-right one."""
    if not isinstance(causal, bool) and causal != "bottom-right":
        checks.wrong_value(name, "causal", 'True, False or "bottom-right"', repr(causal))
    left = right = None
    if window is not None:
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            checks.wrong_type(name, "window", "a pair (left, right)", repr(window))
        left, right = (_side(name, side, window) for side in window)
    if causal:
        right = 0
    return left, right, causal == "bottom-right"


def _side(name: str, side: Any, window: Any) -> int | None:
    if side is None:
        return None
    side = checks.integer(name, "window", side, "a pair of integers or None")
    if side < 0 or side >= 2**63:
        checks.wrong_value(name, "window", "of sides from 0 to 2^63 - 1 (None = unbounded)", window)
    return side


def real(name: str, argument: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (Real, torch.SymFloat, torch.SymInt)):
        checks.wrong_type(name, argument, "a number or None", type(value).__name__)


def triton_gap(
    query: torch.Tensor, time: Any, heads: Any, source: Any, kv_heads: Any, bias: torch.Tensor | None = None
) -> str | None:  # fmt: skip
    """What the Triton kernels don't cover of a call; of packed sequences time and source are those of all."""
    if torch.float64 in (query.dtype, None if bias is None else bias.dtype):
        return dispatch.NO_FLOAT64
    sizes = (time * (heads // kv_heads if kv_heads else 1), source)
    # torch.compile's symbols are left alone: to compare one would make a condition of the compilation.
    if any(isinstance(size, int) and size >= TRITON_POSITIONS for size in sizes):
        return (
            "its kernels count positions in 32 bits: the queries that read one key head, and its keys, must be "
            "below 2^29"
        )
    return None
