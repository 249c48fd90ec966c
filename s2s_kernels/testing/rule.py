"""What a sample is, how a call is run on it, and the rule by which equality is judged."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..dispatch import use_backend

Call = tuple[tuple[Any, ...], dict[str, Any]]


def call(*args: Any, **kwargs: Any) -> Call:
    """The arguments of one call, as a sample gives them."""
    return args, kwargs


class Draw:
    """Draws the tensors of a sample: draw(2, 5, 3) is normal noise of the wanted dtype on the wanted device."""

    def __init__(self, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", seed: int = 0) -> None:
        self.dtype, self.device = dtype, torch.device(device)
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        noise = torch.randn(*shape, generator=self.generator, dtype=torch.float64) * scale
        return noise.to(device=self.device, dtype=dtype or self.dtype)

    def mask(self, *shape: int, p: float = 0.5) -> torch.Tensor:
        """Boolean noise, True with probability p."""
        return (torch.rand(*shape, generator=self.generator) < p).to(self.device)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """int64 noise in [low, high)."""
        return torch.randint(low, high, shape, generator=self.generator).to(self.device)

    def tensor(self, values: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Literal values on the wanted device."""
        return torch.tensor(values, dtype=dtype).to(self.device)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One call of an operator.

    Attributes:
        name: what is special about it.
        build: draws its arguments.
        smooth: finite differences make sense (no NaN or Inf among the inputs, nothing at a kink, no saturation to a
            constant);
            such samples must be tiny, since gradcheck and gradgradcheck run on them.
    """

    name: str
    build: Callable[[Draw], Call]
    smooth: bool = True


@dataclasses.dataclass(frozen=True)
class ErrorSample:
    """One call that must be refused with an error that names the argument."""

    name: str
    build: Callable[[Draw], Call]
    error: type[Exception]
    argument: str


@dataclasses.dataclass(frozen=True)
class OperatorCase:
    """An operator with everything that the generic tests need.

    Attributes:
        function: the public function, or a thin wrapper where an argument is not a tensor (a streaming state).
        samples, errors: as above.
        by_length: draws a call of sequence length T, for tests that vary the length.
        loops: whether the definition is a loop over time in Python, which torch.compile unrolls for each length.
    """

    function: Callable[..., Any]
    samples: tuple[Sample, ...]
    errors: tuple[ErrorSample, ...]
    by_length: Callable[[Draw, int], Call]
    loops: bool = False


def is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def prepare(
    arguments: Call, dtype: torch.dtype | None = None, wanted: Callable[[int], bool] = lambda index: True
) -> Call:
    """The same call on fresh leaves that record gradients, with the same strides.

    Args:
        dtype: of the floating tensors, if they are to be converted.
        wanted: which floating tensors, by their order, record a gradient.
    """
    flat, spec = tree_flatten(arguments)
    index = iter(range(len(flat)))
    leaves = [
        (v.detach() if dtype is None else v.detach().to(dtype)).requires_grad_(wanted(next(index)))
        if is_float(v)
        else v
        for v in flat
    ]
    return tree_unflatten(leaves, spec)


def leaves_of(arguments: Call) -> list[torch.Tensor]:
    """The floating tensors of a call that record a gradient, in order."""
    return [v for v in tree_flatten(arguments)[0] if is_float(v) and v.requires_grad]


def outputs_of(result: Any) -> list[torch.Tensor]:
    """The tensors of a result, in order."""
    return [v for v in tree_flatten(result)[0] if isinstance(v, torch.Tensor)]


def evaluate(
    function: Callable[..., Any],
    arguments: Call,
    upstream: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Runs a prepared call under a fixed seed and yields its outputs and, given `upstream` gradients, its inputs'
    gradients, by name."""
    torch.manual_seed(0)
    outputs = outputs_of(function(*arguments[0], **arguments[1]))
    for index, output in enumerate(outputs):
        yield f"output {index}", output.detach()
    leaves = leaves_of(arguments)
    if upstream is None or not leaves:
        return
    roots = [(o, upstream(o, i)) for i, o in enumerate(outputs) if o.requires_grad]
    if not roots:
        return
    grads = torch.autograd.grad([o for o, _ in roots], leaves, [g for _, g in roots], allow_unused=True)
    for index, (leaf, grad) in enumerate(zip(leaves, grads, strict=True)):
        yield f"gradient {index} {tuple(leaf.shape)}", torch.zeros_like(leaf) if grad is None else grad


def noise_like(output: torch.Tensor, index: int) -> torch.Tensor:
    """An upstream gradient: noise that depends on the shape and the output's place alone, so that every run draws the
    same."""
    generator = torch.Generator().manual_seed(100 + index)
    noise = torch.randn(output.shape, generator=generator, dtype=torch.float32)
    return noise.to(dtype=output.dtype, device=output.device)


def excess(ours: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> float:
    """By how much `ours` breaks the tolerance rule; at most 0 where it keeps it.

    |ours - exact| <= 2 max|eager - exact| + 4 eps(dtype) max(1, max|exact|), elementwise, with NaN and Inf in the same
    places.
    """
    if ours.shape != exact.shape or ours.numel() == 0:
        return 0.0 if ours.shape == exact.shape else float("inf")
    eps = torch.finfo(ours.dtype).eps
    ours, eager = ours.double(), eager.double()
    finite = exact.isfinite() & eager.isfinite()
    special = ~finite
    same = (ours == eager) | (ours.isnan() & eager.isnan()) | (ours == exact) | (ours.isnan() & exact.isnan())
    if bool((special & ~same).any()) or bool((finite & ~ours.isfinite()).any()):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    ours, eager, exact = ours[finite], eager[finite], exact[finite]
    bound = 2 * (eager - exact).abs().max() + 4 * eps * exact.abs().max().clamp(min=1.0)
    return float((ours - exact).abs().max() - bound)


def compare(
    function: Callable[..., Any],
    arguments: Call,
    backend: str | None = None,
    wanted: Callable[[int], bool] = lambda index: True,
    upstream: Callable[[torch.Tensor, int], torch.Tensor] | None = noise_like,
) -> dict[str, float]:
    """Judges a backend (None: whichever serves) on one call, value and first-order gradient, against the float64
    reference on the same
    rounded inputs. Returns by how much each output and gradient breaks the tolerance rule: all at most 0 where it is
    right."""

    def run(name: str | None, dtype: torch.dtype | None) -> list[tuple[str, torch.Tensor]]:
        prepared = prepare(arguments, dtype, wanted)

        def same_noise(output: torch.Tensor, index: int) -> torch.Tensor:
            assert upstream is not None
            low = next(iter(rounded), output.dtype)
            return upstream(output.detach().to(low), index).to(output.dtype)

        chosen = None if upstream is None else same_noise
        if name is None:
            return list(evaluate(function, prepared, chosen))
        with use_backend(name):
            return list(evaluate(function, prepared, chosen))

    rounded = [v.dtype for v in tree_flatten(arguments)[0] if is_float(v)]
    ours, eager, exact = run(backend, None), run("reference", None), run("reference", torch.float64)
    assert len(ours) == len(eager) == len(exact)
    return {
        name: excess(value, plain, true)
        if value.is_floating_point()
        else float(not torch.equal(value, true.to(value.dtype)))
        for (name, value), (_, plain), (_, true) in zip(ours, eager, exact, strict=True)
    }


def to_device(arguments: Call, device: str | torch.device) -> Call:
    """The same call on another device."""
    return tree_map(lambda v: v.to(device) if isinstance(v, torch.Tensor) else v, arguments)
