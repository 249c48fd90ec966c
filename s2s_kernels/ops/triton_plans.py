"""Calls of Triton kernels made again as they were made before.

What a call allocates and launches depends on the sizes, strides, dtypes and numbers of its arguments alone. So the
second call of a kind is watched, and the next ones do the same at once, past all that works it out: for a short
sequence that takes longer than the kernels do. A kind of call is remembered only where nothing but allocations happened
beside the launches, every argument is read as it is, and no two of them begin at the same address.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import triton_launch

MOST = 2048  # kinds of calls that are remembered
_aten = torch.ops.aten
ALLOCATIONS = {
    _aten.new_empty.default, _aten.empty.memory_format, _aten.empty_like.default, _aten.view.dtype,
}  # fmt: skip
_plans: dict[Any, "Plan | str | None"] = {}  # None: of a kind that can't be repeated


class _Operations(TorchDispatchMode):
    """Notes whether anything but allocations is called inside."""

    others = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.others |= func not in ALLOCATIONS
        return func(*args, **(kwargs or {}))


class Plan:
    """Buffers to allocate, by shape and dtype; launches, each with what reads its tensors from the inputs, the buffers
    and None; and which buffers are the results."""

    def __init__(
        self, buffers: list[tuple[Any, torch.dtype]], launches: list[tuple[Any, ...]], results: list[int | None]
    ) -> None:  # fmt: skip
        self.buffers, self.launches, self.results = buffers, launches, results

    def __call__(self, inputs: list[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
        new = inputs[0].new_empty
        made = [new(shape, dtype=dtype) for shape, dtype in self.buffers]
        pool = (*inputs, *made, None)
        active = triton_launch.driver.active
        stream = active.get_current_stream(active.get_current_device())
        for run, x, y, z, function, metadata, read, rest in self.launches:
            run(x, y, z, stream, function, metadata, None, None, None, *read(pool), *rest)
        return tuple(None if place is None else made[place] for place in self.results)


def planned(name: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """function(*args), a tuple of fresh tensors and None. The arguments are plain tensors on one GPU, and constants;
    under `name` the function is always the same."""
    key: list[Any] = [
        name, torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(),
    ]  # fmt: skip
    inputs, addresses = [], []
    for value in args:
        if isinstance(value, torch.Tensor):
            address = value.data_ptr()
            key += (value.shape, value.stride(), value.dtype, address % 16 == 0)
            inputs.append(value)
            addresses.append(address)
        else:
            key += (type(value), value)
    device = inputs[0].get_device()
    current = triton_launch.driver.active.get_current_device() == device
    if not current or len({*addresses, 0}) <= len(addresses) or triton_launch.observed():
        return function(*args)
    known = tuple(key) + (device,)
    plan = _plans.get(known, "unseen")
    if plan == "unseen":  # whether it comes again shows: of lengths that grow each call is the first
        if len(_plans) >= MOST:
            _plans.clear()
        _plans[known] = "seen"
        return function(*args)
    if plan is None:
        return function(*args)
    if plan != "seen":
        return plan(inputs)  # type: ignore[operator]
    with triton_launch.watching() as launches, _Operations() as operations:
        results = function(*args)
    if len(_plans) >= MOST:
        _plans.clear()
    _plans[known] = (
        None if operations.others else _plan_of(dict(zip(addresses, inputs, strict=True)), launches, results)
    )
    return results


def _plan_of(
    inputs: dict[int, torch.Tensor], launches: list[tuple[Any, ...]], results: tuple[torch.Tensor | None, ...]
) -> Plan | None:
    """None where a call can't be repeated from what was seen of it."""
    places = {address: place for place, address in enumerate(inputs)}
    read: set[int] = set()
    fresh: dict[int, torch.Tensor] = {}  # by address, in the order of their places behind the inputs
    again = []
    for started, grid, args, tensors in launches:
        if started is None or tensors != tuple(range(len(tensors))):
            return None
        given = args[: len(tensors)]
        for x in given:
            if x is None or x.data_ptr() in fresh:
                continue
            if x.data_ptr() in places:
                read.add(x.data_ptr())
            elif x.is_contiguous() and x.data_ptr() == x.untyped_storage().data_ptr():
                fresh[x.data_ptr()] = x
            else:
                return None
        again.append((started, grid, given, args[len(tensors) :]))
    if read != places.keys() or len({x.untyped_storage().data_ptr() for x in fresh.values()}) < len(fresh):
        return None
    buffers = [(tuple(x.shape), x.dtype) for x in fresh.values()]
    order = {address: place for place, address in enumerate(fresh)}
    ends: list[int | None] = []
    for result in results:
        if result is None:
            ends.append(None)
        elif result.numel() == 0:
            ends.append(len(buffers))
            buffers.append((tuple(result.shape), result.dtype))
        elif any(result is x for x in fresh.values()):
            ends.append(order[result.data_ptr()])
        else:
            return None
    where = {**places, **{address: len(places) + place for address, place in order.items()}}
    nothing = len(places) + len(buffers)
    steps = []
    for (run, function, metadata, constants), grid, given, numbers in again:
        x, y, z = (*grid, 1, 1)[:3]
        slots = [nothing if t is None else where[t.data_ptr()] for t in given]
        steps.append((run, x, y, z, function, metadata, operator.itemgetter(*slots), (*numbers, *constants)))
    return Plan(buffers, steps, ends)
