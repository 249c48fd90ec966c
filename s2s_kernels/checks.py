"""Argument validation, in one wording for every operator: "operator: argument must be ..., got ..."."""

import contextlib
import os
from collections.abc import Callable, Sequence
from operator import index
from typing import Any, NoReturn, TypeVar, cast

import torch

# S2S_DEBUG=1, read at import: what can't be looked at without waiting is asserted on the device.
DEBUG = os.environ.get("S2S_DEBUG") == "1"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def wrong_value(operator: str, name: str, expected: str, given: Any) -> NoReturn:
    raise ValueError(f"{operator}: {name} must be {expected}, got {given}")


def wrong_type(operator: str, name: str, expected: str, given: Any) -> NoReturn:
    raise TypeError(f"{operator}: {name} must be {expected}, got {given}")


def tensor(operator: str, name: str, value: Any) -> None:
    """TypeError unless `value` is a tensor, whose shape can be asked for."""
    if not isinstance(value, torch.Tensor):
        wrong_type(operator, name, "a tensor", type(value).__name__)
    if value.is_nested:
        wrong_type(operator, name, "a strided tensor", "a nested one")


def data(operator: str, name: str, value: Any, rank: int, layout: str) -> None:
    """The argument that sets the others' dtype and device: a strided tensor of `rank` dimensions, of a dtype that the
    contract has."""
    tensor(operator, name, value)
    if value.dtype not in DTYPES:
        wrong_type(operator, name, "float64, float32, bfloat16 or float16", value.dtype)
    if value.layout != torch.strided:
        wrong_type(operator, name, "a strided tensor", value.layout)
    if value.dim() != rank:
        wrong_value(operator, name, layout, tuple(value.shape))


def like(
    operator: str,
    name: str,
    value: torch.Tensor | None,
    reference: torch.Tensor,
    reference_name: str,
    shape: Sequence[int],
    layout: str,
) -> None:
    """An argument (None passes) with the dtype and device of `reference` and exactly this shape.

    Args:
        layout: the shape in letters, for the message, such as "(4H, I)".
    """
    if value is None:
        return
    tensor(operator, name, value)
    if value.dtype != reference.dtype:
        wrong_type(operator, name, f"{reference.dtype} like {reference_name}", value.dtype)
    beside(operator, name, value, reference, reference_name)
    if tuple(value.shape) != tuple(shape):
        wrong_value(operator, name, f"{layout} = {tuple(shape)}", tuple(value.shape))


def beside(operator: str, name: str, value: torch.Tensor, reference: torch.Tensor, reference_name: str) -> None:
    """ValueError unless both tensors are on one device."""
    if value.device != reference.device:
        wrong_value(operator, name, f"on {reference.device} like {reference_name}", value.device)


def readable(value: torch.Tensor) -> bool:
    """Whether the content can be looked at now: eager mode, a real tensor in the CPU's memory."""
    return (
        not torch.compiler.is_compiling()
        and value.device.type == "cpu"
        and type(value) in (torch.Tensor, torch.nn.Parameter)
        and not torch._C._are_functorch_transforms_active()
    )


def assure(condition: Callable[[], torch.Tensor], message: str) -> None:
    """Under S2S_DEBUG=1, asserts on the device what isn't `readable`: a failure ends the process's use of a GPU, and
    raises RuntimeError on a CPU.

    Args:
        condition: makes a boolean tensor, all of which must be True; called under S2S_DEBUG=1 only.
    """
    if DEBUG and not torch._C._are_functorch_transforms_active():
        torch._assert_async(condition().all(), message)


def lengths(
    operator: str, name: str, value: Any, reference: torch.Tensor, batch: int, maximum: int, limit: str = "T"
) -> torch.Tensor | None:
    """Checks lengths (B,), int32 or int64, on the CPU or beside the data, in [0, maximum] where they can be read (None
    passes); where they can't, they are asserted under S2S_DEBUG=1.

    Returns:
        them as int64 on the device of `reference`, contiguous.
    """
    if value is None:
        return None
    tensor(operator, name, value)
    if value.dtype not in (torch.int32, torch.int64):
        wrong_type(operator, name, "an int32 or int64 tensor", value.dtype)
    if tuple(value.shape) != (batch,):
        wrong_value(operator, name, f"(B,) = ({batch},)", tuple(value.shape))
    if value.device.type != "cpu" and value.device != reference.device:
        wrong_value(operator, name, f"on the CPU or on {reference.device}", value.device)
    if not readable(value):
        assure(lambda: (value >= 0) & (value <= maximum), f"{operator}: {name} must be in [0, {limit}]")
    elif batch:
        smallest, largest = (int(v) for v in torch.aminmax(value))
        if smallest < 0 or largest > maximum:
            wrong_value(operator, name, f"in [0, {limit}] = [0, {maximum}]", f"values in [{smallest}, {largest}]")
    # Out of pageable memory they are taken before the call returns: nothing has to wait for what the GPU still does.
    taken = reference.is_cuda and readable(value) and not value.is_pinned()
    return value.to(device=reference.device, dtype=torch.int64, non_blocking=taken).contiguous()


def indices(operator: str, name: str, value: Any, reference: torch.Tensor, size: int) -> torch.Tensor:
    """Checks indices (N,), int32 or int64, beside `reference`, in [0, size) where they can be read."""
    tensor(operator, name, value)
    if value.dtype not in (torch.int32, torch.int64):
        wrong_type(operator, name, "an int32 or int64 tensor", value.dtype)
    if value.dim() != 1:
        wrong_value(operator, name, "of one dimension", tuple(value.shape))
    beside(operator, name, value, reference, "the rows")
    if readable(value) and value.numel():
        smallest, largest = (int(v) for v in torch.aminmax(value))
        if smallest < 0 or largest >= size:
            wrong_value(operator, name, f"in [0, {size})", f"values in [{smallest}, {largest}]")
    return value


def are_read(lengths: Any) -> bool:
    """Whether a kernel reads lengths as they are, and so checks them: int64, or none."""
    return lengths is None or getattr(lengths, "dtype", None) is torch.int64


def boolean(operator: str, name: str, value: Any, reference: torch.Tensor, reference_name: str) -> None:
    """TypeError unless `value` is a boolean tensor beside `reference` (None passes)."""
    if value is None:
        return
    tensor(operator, name, value)
    if value.dtype != torch.bool:
        wrong_type(operator, name, "a boolean tensor", value.dtype)
    beside(operator, name, value, reference, reference_name)


def probability(operator: str, name: str, value: float) -> None:
    """TypeError unless `value` is a number, ValueError unless 0 <= value <= 1."""
    try:
        within = 0.0 <= value <= 1.0
    except TypeError:
        wrong_type(operator, name, "a number", type(value).__name__)
    if not within:
        wrong_value(operator, name, "a probability in [0, 1]", value)


def integer(operator: str, name: str, value: Any, expected: str = "an integer") -> int:
    """`value` as an int if it is an integer of Python, numpy or torch.compile, else TypeError."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return cast(int, value)  # a SymInt stands for one
    if isinstance(value, (bool, torch.Tensor)) or not hasattr(value, "__index__"):
        wrong_type(operator, name, expected, repr(value))
    return index(value)


def choice(operator: str, name: str, value: Any, allowed: Sequence[Any]) -> None:
    """ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        wrong_value(operator, name, f"one of {', '.join(map(repr, allowed))}", repr(value))


Function = TypeVar("Function", bound=Callable[..., Any])


def traced_as_constant(function: Function) -> Function:
    """A traced call takes its answers for constants, as `torch.compiler.assume_constant_result` would have it, which
    imports the compiler."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@traced_as_constant
def _knows_autocast(device: str) -> bool:
    # torch.compile can't trace the question before torch 2.12.
    return device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)


def autocasts(value: torch.Tensor) -> bool:
    """Whether autocast is on for the device of a tensor."""
    device = value.device.type
    return _knows_autocast(device) and torch.is_autocast_enabled(device)


def without_autocast(value: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Keeps autocast out of what is computed of `value`: arguments have been cast already, and what is made of them is
    wider on purpose."""
    return torch.autocast(value.device.type, enabled=False) if autocasts(value) else contextlib.nullcontext()


def autocast(first: torch.Tensor, *others: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Every floating tensor in the autocast dtype of the first one's device; unchanged where autocast is off."""
    values = (first, *others)
    if not autocasts(first):
        return values
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in values)


def broadcast(operator: str, name: str, value: torch.Tensor, shape: Sequence[int], layout: str) -> torch.Tensor:
    """`value` as a view of `shape` (nothing is copied); ValueError where it can't be broadcast.

    Args:
        layout: the shape in letters, for the message.
    """
    missing = len(shape) - value.dim()
    fits = missing >= 0 and all(
        size == 1 or size == wanted for size, wanted in zip(value.shape, tuple(shape)[missing:], strict=True)
    )
    if not fits:
        wrong_value(operator, name, f"broadcastable to {layout} = {tuple(shape)}", tuple(value.shape))
    return value.expand(tuple(shape))
