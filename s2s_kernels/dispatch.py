"""Which backend serves a call, and the reason in words.

A public operator describes its call to `choose`, which returns the name of the backend to run. Every operator
registers,
once, what each of its backends doesn't cover. All policy is here: kernels and references know nothing of it.
"""

import contextvars
import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import forward_ad

from . import checks

try:
    from . import _C  # type: ignore[attr-defined]  # noqa: F401  (importing registers torch.ops.s2s)
except ImportError as error:
    extension_missing: str | None = f"the compiled extension is missing ({error})"
else:
    extension_missing = None

# Looked for, not imported: that waits for the first call on a CUDA tensor.
triton_missing = None if importlib.util.find_spec("triton") else "triton is not installed"

BACKENDS = ("reference", "cpu", "triton", "cuda", "torch")

# The order of preference for each type of device. The reference comes last everywhere, and alone on any other device.
PREFERENCE: Mapping[str, tuple[str, ...]] = {
    "cpu": ("cpu", "torch", "reference"),
    "cuda": ("torch", "cuda", "triton", "reference"),
}
DEVICE = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}  # the device a backend's kernels run on
emulated: set[str] = set()  # backends of another device that take CPU tensors as well now, for tests

TRITON_FOR_10 = (3, 8)  # those before crash on loops of attention and convolution for compute capability 10
NO_FLOAT64 = "its kernels take float32, bfloat16 and float16"  # what every Triton kernel says of float64

# What a backend doesn't cover of a call: a reason in words, or None where it serves it.
Gap = Callable[[Any], str | None]


def not_in_triton(dtype: torch.dtype) -> str | None:
    """What the Triton kernels don't cover of a dtype."""
    return NO_FLOAT64 if dtype == torch.float64 else None


@dataclasses.dataclass(frozen=True)
class Operator:
    """An operator and, for each backend that has code for it, the function that says what is not covered; for some,
    one that says why a call that is covered is better left to another backend, unless this one is forced."""

    name: str
    gaps: Mapping[str, Gap]
    deferrals: Mapping[str, Gap] = dataclasses.field(default_factory=dict)

    def deferral(self, backend: str, call: Any) -> str | None:
        rule = self.deferrals.get(backend)
        return None if rule is None else rule(call)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The backend that serves a call, and for each other backend the reason why it doesn't."""

    backend: str
    reasons: Mapping[str, str]

    def __str__(self) -> str:
        return "\n".join([f"served by {self.backend}", *(f"  not {name}: {why}" for name, why in self.reasons.items())])


class _Explained(Exception):
    def __init__(self, explanation: Explanation) -> None:
        self.explanation = explanation


OPERATORS: dict[str, Operator] = {}


def register(name: str, deferrals: Mapping[str, Gap] | None = None, /, **gaps: Gap) -> Operator:
    """Enters an operator under its public name. `gaps` maps a backend to what it doesn't cover; the reference covers
    all. deferrals: as `Operator`."""
    OPERATORS[name] = Operator(name, gaps, deferrals or {})
    return OPERATORS[name]


def _known(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin}: backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_environment = os.environ.get("S2S_BACKEND") or None
if _environment is not None:
    _known(_environment, "S2S_BACKEND")
# The forced backend, and whether calls are explained instead of made: one variable, since small calls read it too.
_asked: contextvars.ContextVar[tuple[str | None, bool]] = contextvars.ContextVar(
    "s2s_kernels_asked", default=(_environment, False)
)
# torch.compile can't read a context variable; it reads this copy, which it guards on, so that forcing another backend
# compiles anew.
_forced_traced = _environment


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces one backend for the forward and first-order backward of every call inside the context.

    Args:
        name: "reference", "cpu", "triton", "cuda" or "torch".

    A call that the backend doesn't cover raises NotImplementedError with the reason. Backward runs on the backend that
    ran forward,
    wherever it is called. The environment variable S2S_BACKEND, read at import, does the same for a whole process.
    Functions compiled by torch.compile see the backend that was forced last by any thread.

    Raises:
        ValueError: the name is unknown.
    """
    global _forced_traced
    token, before = _asked.set((_known(name, "use_backend"), _asked.get()[1])), _forced_traced
    _forced_traced = name
    try:
        yield
    finally:
        _asked.reset(token)
        _forced_traced = before


def unavailable(backend: str) -> str | None:
    """Why a backend can't run anything in this process; None where it can."""
    if backend == "cpu":
        return extension_missing
    if backend == "triton" and (triton_missing or extension_missing):
        return triton_missing or extension_missing
    if backend in ("cuda", "triton"):
        return None if torch.cuda.is_available() else "no CUDA device is available"
    return None


def gap(operator: Operator, backend: str, device: torch.device, call: Any) -> str | None:
    """Why `backend` doesn't serve this call; None where it does."""
    if backend == "reference":
        return None
    if backend not in operator.gaps:
        return f"{operator.name} has no {backend} kernel"
    if _exporting_onnx():
        return "ONNX has no such operator: the reference is exported"
    devices = (DEVICE[backend],) if backend in DEVICE else tuple(PREFERENCE)
    if device.type not in devices and not (device.type == "cpu" and backend in emulated):
        return f"its kernels take {' and '.join(map(str.upper, devices))} tensors, these are on {device}"
    if backend in ("cpu", "triton") and extension_missing is not None:  # it brings the schemas
        return extension_missing
    if backend == "triton":
        reason = triton_missing or _not_on(device)
        if reason is not None:
            return reason
    return operator.gaps[backend](call)


@functools.cache
def _installed(package: str) -> tuple[int, int]:
    major, minor = importlib.metadata.version(package).split(".")[:2]
    return int(major), int(minor)


@checks.traced_as_constant
def triton_version() -> tuple[int, int]:
    """The installed one's, without importing it."""
    return _installed("triton")


def _not_on(device: torch.device) -> str | None:
    """Why a CUDA device doesn't run the Triton kernels: it lacks tensor cores for every dtype, or triton fails to
    compile for it. None where it runs them, or where its tensors are fake."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(device)  # torch.compile takes both of these for constants
    major = properties.major
    if major < 8:
        return f"its kernels need compute capability 8.0, {device} has {major}.{properties.minor}"
    if major == 10 and triton_version() < TRITON_FOR_10:
        first = ".".join(map(str, TRITON_FOR_10))
        return f"triton {first} is the first to compile its kernels where {device} has {major}.{properties.minor}"
    return None


@functools.lru_cache(maxsize=64)
def _runs_triton(device: torch.device) -> bool:
    return _not_on(device) is None


def _exporting_onnx() -> bool:
    # The question itself imports modules, 2 us a call: it is asked only where something is being traced.
    return (torch.jit.is_tracing() or torch.compiler.is_compiling()) and torch.onnx.is_in_onnx_export()


def choose(operator: Operator, device: torch.device, call: Any) -> str:
    """The backend that serves a call.

    Args:
        operator: as registered.
        device: where the call's tensors are.
        call: what the operator's gap functions look at.

    Raises:
        NotImplementedError: the forced backend doesn't cover the call.
    """
    if torch.compiler.is_compiling():
        forced = _forced_traced
    else:
        forced, explaining = _asked.get()
        if explaining:
            raise _Explained(_explain(operator, device, call, forced))
    if forced is not None:
        reason = gap(operator, forced, device, call)
        if reason is not None:
            raise NotImplementedError(
                f"{operator.name}: the forced backend {forced} does not cover this call: {reason}"
            )
        return forced
    for backend in PREFERENCE.get(device.type, ()):
        if gap(operator, backend, device, call) is None and operator.deferral(backend, call) is None:
            return backend
    return "reference"


def _explain(operator: Operator, device: torch.device, call: Any, forced: str | None) -> Explanation:
    order = PREFERENCE.get(device.type, ("reference",))
    ranked = [*order, *(name for name in BACKENDS if name not in order)]
    reasons = {name: gap(operator, name, device, call) for name in ranked}
    if forced is not None and reasons[forced] is not None:
        raise NotImplementedError(
            f"{operator.name}: the forced backend {forced} does not cover this call: {reasons[forced]}"
        )
    if forced is None:
        reasons = {name: reason or operator.deferral(name, call) for name, reason in reasons.items()}
    chosen = forced or next(name for name in order if reasons[name] is None)
    why = f"{chosen} is forced" if forced else f"{chosen} is preferred"
    return Explanation(chosen, {name: reason or why for name, reason in reasons.items() if name != chosen})


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which backend serves `function(*args, **kwargs)`, and why the others don't. Nothing is computed.

    Args:
        function: an operator of this package, or anything that calls one: the first call of an operator is explained.

    Raises:
        ValueError: the function returns without calling an operator.
        NotImplementedError: a forced backend doesn't cover the call.
    """
    token = _asked.set((_asked.get()[0], True))
    try:
        function(*args, **kwargs)
    except _Explained as found:
        return found.explanation
    finally:
        _asked.reset(token)
    raise ValueError(f"explain: function must call an operator of s2s_kernels, {function!r} called none")


_PLAIN = (torch.Tensor, torch.nn.Parameter)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def at_rest(backend: str | None = "cpu") -> bool:
    """Whether nothing surrounds a call: eager, no autocast, no transform, no other backend forced, nothing to be
    explained (neither is asked if `backend` is None) or exported. A call on CPU tensors is then the cpu backend's
    wherever that covers it, and need not pay for what it doesn't use: with cold caches each function of Python's that a
    call enters takes 3 us or more."""
    return (
        not torch.compiler.is_compiling()
        and (backend is None or _asked.get() in ((None, False), (backend, False)))
        and not torch._C._is_any_autocast_enabled()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not torch._C._is_tracing()
        and extension_missing is None
    )


def untouched(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Whether nothing stands between a call on these tensors and its kernel: no autocast, transform, trace, mode,
    profile or subclass. Torch's dispatcher would then do nothing but unpack the arguments and pack them again."""
    if not at_rest(None):
        return False
    for tensor in tensors:  # a generator would cost as much as the rest
        if tensor is not None and type(tensor) not in _PLAIN:
            return False
    return not (torch._C._len_torch_dispatch_stack() or torch.autograd._profiler_enabled())


def asked() -> tuple[str | None, bool]:
    """The backend that is forced on eager calls, and whether they are explained instead of made."""
    return _asked.get()


def _all_on_one_gpu(tensors: Sequence[Any]) -> bool:
    """Whether the Triton kernels serve plain tensors of these places and dtype. Under S2S_DEBUG=1 what can't be read is
    asserted first, which they don't do."""
    first = tensors[0]
    device = first.get_device()
    for tensor in tensors:
        if tensor is not None and tensor.get_device() != device:
            return False
    runs = triton_missing is None and not checks.DEBUG and first.dtype in TRITON_DTYPES
    return runs and _runs_triton(first.device) and untouched(tensors)


def directly(
    kernel: Callable[[Any, Any], Any], tensors: Sequence[Any], options: tuple[Any, ...], triton: bool = False
) -> Any:
    """What the cpu backend's kernel makes of a call that nobody has checked: it checks everything itself, at a fraction
    of the cost. None where something surrounds the call, or the kernel refuses it: the checks in Python say why.

    Args:
        triton: whether the operator has Triton kernels, no others for a GPU, and they check everything too.
    """
    on_gpu = triton and getattr(tensors[0], "is_cuda", False)
    if not at_rest("triton" if on_gpu else "cpu"):
        return None
    try:
        if on_gpu:
            if not _all_on_one_gpu(tensors):
                return None
        else:
            for tensor in tensors:
                if tensor is not None and not tensor.is_cpu:
                    return None
        return kernel(tensors, options)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None


def is_plain(*tensors: torch.Tensor | None, triton: bool = False) -> bool:
    """Whether a kernel serves a call on these tensors with nothing around it (`at_rest`) and no gradient. The kernel is
    the cpu backend's, or triton's on CUDA tensors of one device if that has one (`triton`)."""
    first = tensors[0]
    device = first.device if triton and first is not None and first.is_cuda else None
    for tensor in tensors:  # a generator would cost as much as the rest
        if tensor is not None and (
            type(tensor) not in _PLAIN or not (tensor.device == device if device else tensor.is_cpu)
        ):
            return False
    return (
        not torch.is_grad_enabled()
        and at_rest("cpu" if device is None else "triton")
        and (device is None or (triton_missing is None and _runs_triton(device)))
    )


def transformed(*tensors: torch.Tensor | None) -> bool:
    """Whether torch.func (vmap, grad, jvp) or forward-mode differentiation is looking: kernels can't see through those,
    so the reference serves whatever is forced."""
    if torch._C._are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )
