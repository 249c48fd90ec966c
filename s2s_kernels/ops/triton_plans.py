"""Calls of Triton kernels made again as they were made before.

What a call allocates, computes and launches depends on the sizes, strides, dtypes and numbers of its arguments alone.
So the second call of a kind is watched, and the next ones do the same at once, past all that works it out: for a short
sequence that takes longer than the kernels do.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import triton_launch

MOST = 2048  # kinds of calls that are remembered
_aten = torch.ops.aten
ALLOCATIONS = {_aten.new_empty.default, _aten.empty.memory_format, _aten.empty_like.default}


class Called(NamedTuple):
    """One of torch's operators, as it was called."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any


class _Watch(TorchDispatchMode):
    def __init__(self, steps: list[Any]) -> None:
        super().__init__()
        self.steps = steps

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.steps.append(Called(func, args, kwargs or {}, result))
        return result


class Place(NamedTuple):
    """Where a tensor is among all of a call: None, the arguments, and what is made, in its order."""

    number: int


class _Unknown(Exception):
    """Something that isn't a function of the arguments."""


class Plan:
    """What a kind of call does."""

    def __init__(
        self, inputs: Sequence[torch.Tensor], steps: Sequence[Any], results: tuple[torch.Tensor | None, ...]
    ) -> None:  # fmt: skip
        """From what was seen of one call.

        Raises:
            _Unknown: not all of it comes from the arguments.
        """
        self.steps: list[tuple[Any, ...]] = []
        places = {id(x): Place(place) for place, x in enumerate(inputs, 1)}
        count = len(inputs) + 1
        for step in steps:
            if isinstance(step, triton_launch.Launched):
                first = tuple(range(len(step.tensors)))  # tensors come before numbers
                if step.started is None or step.tensors != first or len(first) < 2:
                    raise _Unknown
                run, function, metadata, constants = step.started
                given = [0 if x is None else _placed(x, places).number for x in step.args[: len(step.tensors)]]
                rest = (*step.args[len(step.tensors) :], *constants)
                grid = (*step.grid, 1, 1)[:3]
                self.steps.append((None, run, grid, function, metadata, operator.itemgetter(*given), rest))
                continue
            several = isinstance(step.result, (tuple, list))
            made: Sequence[Any] = step.result if several else () if step.result is None else (step.result,)
            # What isn't a tensor beside the arguments has been read: another call would have another.
            if not all(type(x) is torch.Tensor and x.device == inputs[0].device for x in made):
                raise _Unknown
            fresh = [x for x in made if id(x) not in places]
            if fresh and len(fresh) < len(made):
                raise _Unknown
            if step.function in ALLOCATIONS and made[0].is_contiguous():
                self.steps.append((tuple(made[0].shape), made[0].dtype))
            else:
                args, kwargs = _placed(step.args, places), _placed(step.kwargs, places)
                self.steps.append((step.function, args, kwargs, bool(fresh), several))
            for x in fresh:
                places[id(x)] = Place(count)
                count += 1
        self.results = [0 if x is None else _placed(x, places).number for x in results]

    def __call__(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
        pool = [None, *inputs]
        new = inputs[0].new_empty
        active = triton_launch.driver.active
        stream = active.get_current_stream(active.get_current_device())
        for step in self.steps:
            if len(step) == 2:
                pool.append(new(step[0], dtype=step[1]))
            elif step[0] is None:
                _, run, (x, y, z), function, metadata, read, rest = step
                run(x, y, z, stream, function, metadata, None, None, None, *read(pool), *rest)
            else:
                call, args, kwargs, fresh, several = step
                made = call(*_filled(args, pool), **_filled(kwargs, pool))
                if fresh:
                    pool += made if several else (made,)
        return tuple([pool[place] for place in self.results])


def _placed(value: Any, places: dict[int, Place]) -> Any:
    """A value with places instead of tensors."""
    if isinstance(value, torch.Tensor):
        place = places.get(id(value))
        if place is None:
            raise _Unknown
        return place
    if type(value) in (tuple, list):
        return type(value)(_placed(one, places) for one in value)
    if type(value) is dict:
        return {name: _placed(one, places) for name, one in value.items()}
    return value


def _filled(value: Any, pool: list[torch.Tensor | None]) -> Any:
    kind = type(value)
    if kind is Place:
        return pool[value.number]
    if kind is tuple or kind is list:
        return kind([_filled(one, pool) for one in value])
    if kind is dict:
        return {name: _filled(one, pool) for name, one in value.items()}
    return value


_plans: dict[Any, Plan | str | None] = {}  # None: of a kind that can't be repeated


def planned(name: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """function(*args), a tuple of fresh tensors and None. The arguments are plain tensors on one GPU, and constants;
    under `name` the function is always the same."""
    key: list[Any] = [name, torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()]
    inputs = []
    for value in args:
        if isinstance(value, torch.Tensor):
            key += (value.shape, value.stride(), value.dtype, value.data_ptr() % 16 == 0)
            inputs.append(value)
        else:
            key += (type(value), value)
    device = inputs[0].get_device()
    # One that is given twice is not to be told from the other.
    once = len(set(map(id, inputs))) == len(inputs)
    if not once or triton_launch.driver.active.get_current_device() != device or triton_launch.observed():
        return function(*args)
    known = (*key, device)
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
    with triton_launch.watching() as steps, _Watch(steps):
        results = function(*args)
    try:
        _plans[known] = Plan(inputs, steps, results)
    except _Unknown:
        _plans[known] = None
    return results
