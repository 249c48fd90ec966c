"""How the Triton kernels of all operators are declared and started.

Triton's own way to a compiled kernel costs 20 us and more of each launch: it binds the arguments by name, works out
what a compilation would be told of each, and makes a key of text of it all. A kernel that is compiled for no value of
its numbers is told apart by much less, and a launch that is known by that goes to the compiled kernel at once.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# Of every compilation: from triton 3.10 on products and sums are one instruction only where that is asked for.
COMPILED_WITH = {"enable_fp_fusion": True}


def kernel(function: Callable[..., None]) -> Any:
    """A kernel that is compiled for no value of its numbers: of what is annotated as tl.int64 or tl.float32. Tensors
    and numbers are given in their order, constants and the compiler's options by name."""
    numbers = [name for name, kind in function.__annotations__.items() if kind in (tl.int64, tl.float32)]
    if knobs.runtime.interpret:
        return triton.jit(function, do_not_specialize=numbers)
    return Kernel(function, do_not_specialize=numbers)


def observed() -> bool:
    """Whether anyone wants to be told of launches or has a say in compilations, which triton alone knows how to do."""
    runtime = knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if getattr(hook, "calls", hook):
            return True
    return bool(runtime.add_stages_inspection_hook) or runtime.debug


class Launched(NamedTuple):
    """A launch: what was started (None where triton itself launched), the grid, the arguments before the constants, and
    the places of tensors among these."""

    started: tuple[Any, ...] | None
    grid: Any
    args: tuple[Any, ...]
    tensors: tuple[int, ...]


_watched = threading.local()


@contextlib.contextmanager
def watching() -> Iterator[list[Any]]:
    """Gives a list to which the launches that this thread makes inside are added."""
    before = getattr(_watched, "steps", None)
    _watched.steps = steps = []  # type: ignore[var-annotated]
    try:
        yield steps
    finally:
        _watched.steps = before


class Kernel(JITFunction):
    def __init__(self, function: Callable[..., None], **options: Any) -> None:
        super().__init__(function, **options)
        self._constants = tuple(p.name for p in self.params if p.is_constexpr)
        given = [p for p in self.params if not p.is_constexpr]
        # The rest of what is given are numbers, whose types are declared.
        self._tensors = tuple(place for place, p in enumerate(given) if not p.do_not_specialize)
        self._given = len(given)
        behind = all(p.is_constexpr for p in self.params[self._given :])
        self._direct = behind and all(p.do_not_specialize or not p.annotation_type for p in given)
        self._started: dict[Any, tuple[Any, ...]] = {}

    def run(self, *args: Any, **kwargs: Any) -> Any:
        return super().run(*args, **COMPILED_WITH, **kwargs)

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: Any, /, *args: Any, **kwargs: Any) -> Any:
        steps = getattr(_watched, "steps", None)
        if len(args) != self._given or self.pre_run_hooks or observed():
            if steps is not None:
                steps.append(Launched(None, grid, args, self._tensors))
            return self.run(*args, grid=grid, warmup=False, **kwargs)
        active = driver.active
        device = active.get_current_device()
        values = tuple(kwargs.values())
        told: list[Any] = [device, *kwargs, *values, *map(type, values)]  # True is no 1 to the compiler
        for place in self._tensors:
            x = args[place]
            told += (None,) if x is None else (x.dtype, x.data_ptr() % 16 == 0)
        key = tuple(told)
        known = self._started.get(key)
        if known is None:
            compiled = self.run(*args, grid=grid, warmup=False, **kwargs)
            if self._direct and type(grid) is tuple and set(self._constants) <= kwargs.keys():
                self._remember(key, compiled, kwargs)
            if steps is not None:
                steps.append(Launched(self._started.get(key), grid, args, self._tensors))
            return compiled
        if steps is not None:
            steps.append(Launched(known, grid, args, self._tensors))
        run, function, metadata, constants = known
        x, y, z = (*grid, 1, 1)[:3]
        run(x, y, z, active.get_current_stream(device), function, metadata, None, None, None, *args, *constants)
        return None

    def _remember(self, key: tuple[Any, ...], compiled: Any, kwargs: dict[str, Any]) -> None:
        """Keeps what the next launch needs, as JITFunction.run takes it from the compiled kernel; a triton that has it
        elsewhere launches in its own way."""
        found = [getattr(compiled, name, None) for name in ("run", "function", "packed_metadata")]
        if all(value is not None for value in found):
            self._started[key] = (*found, tuple(kwargs[name] for name in self._constants))
