"""Analytic counts: floating-point operations, compulsory traffic and critical path of a call.

Backward counts twice the operations of forward, and, where nothing else is said, its traffic: every tensor has a
gradient of its own size to move.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

FLOAT = 4  # bytes of an element; `scaled` changes it


@dataclass(frozen=True)
class Phase:
    """A part of a call that must end before the next begins.

    Attributes:
        flops: floating-point operations.
        bytes: traffic that can't be avoided.
        resident: bytes that are touched again and again, which decide the level of memory that serves the traffic.
        special: hyperbolic tangents, which a GPU has units for that can bound the speed. Backward needs them again.
        backward: bytes of traffic of its backward pass; None: those of forward.
    """

    flops: float
    bytes: float
    resident: float
    special: float = 0.0
    backward: float | None = None

    def scaled(self, ratio: float) -> "Phase":
        backward = None if self.backward is None else self.backward * ratio
        return replace(self, bytes=self.bytes * ratio, resident=self.resident * ratio, backward=backward)


@dataclass(frozen=True)
class Work:
    """A call as phases, and the number of its steps that depend on one another."""

    phases: tuple[Phase, ...]
    path: int

    @property
    def flops(self) -> float:
        return sum(phase.flops for phase in self.phases)

    @property
    def bytes(self) -> float:
        return sum(phase.bytes for phase in self.phases)

    @property
    def parallelism(self) -> float:
        """Operations that could run at once on average: all of them over the critical path."""
        return self.flops / self.path

    def scaled(self, element_size: int) -> "Work":
        """The same work on elements of another size."""
        return Work(tuple(phase.scaled(element_size / FLOAT) for phase in self.phases), self.path)


def simple(
    flops: float, elements: float, path: int = 1, *, special: float = 0.0, backward: float | None = None
) -> Work:
    """One phase that reads its inputs and writes its results once, `elements` in all, and `backward` in its backward
    pass."""
    traffic = FLOAT * elements
    return Work((Phase(flops, traffic, traffic, special, None if backward is None else FLOAT * backward),), path)


def with_backward(forward: Work) -> Work:
    """Forward and backward: three times the operations, the traffic of both, twice the critical path."""
    backward = tuple(
        replace(phase, flops=2 * phase.flops, bytes=phase.bytes if phase.backward is None else phase.backward)
        for phase in forward.phases
    )
    return Work(forward.phases + backward, 2 * forward.path)


def chain(parts: Sequence[Work]) -> Work:
    """Calls one after another."""
    return Work(tuple(phase for part in parts for phase in part.phases), sum(part.path for part in parts))


def recurrence(gates: int, batch: float, time: float, inputs: int, hidden: int, steps: int, heads: int = 1) -> Work:
    """A layer with so many gates (LSTM 4, GRU 3, RNN 1). The input's product is one matrix product; the recurrent one
    reads its weights again at every step, from the level of memory that holds them.

    Args:
        batch, time: batch * time present positions.
        steps: of the longest sequence.
        heads: of which the recurrent weights are blocks.
    """
    cells = batch * time
    entering = Phase(
        2 * gates * cells * inputs * hidden,
        FLOAT * (cells * inputs + gates * hidden * inputs),
        FLOAT * (cells * inputs + gates * hidden * inputs),
    )
    products = gates * hidden * hidden / heads
    weights = FLOAT * products
    recurrent = Phase(2 * cells * products, steps * weights + FLOAT * cells * hidden, weights)
    return Work((entering, recurrent), steps)


def convolution(batch: int, time: int, inputs: int, outputs: int, taps: int, groups: int = 1) -> Work:
    """Dense or grouped causal convolution. Backward reads both x and the gradient of y."""
    positions, weights = batch * time, outputs * inputs // groups * taps
    backward = positions * (2 * inputs + outputs) + 2 * weights
    return simple(
        2 * positions * taps * inputs * outputs / groups, positions * (inputs + outputs) + weights, backward=backward
    )


def attention(
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    width: int,
    *,
    share: float = 1.0,
    present: float = 1.0,
    kv_heads: int | None = None,
) -> Work:
    """softmax(Q K^T) V: `share` of the pairs may attend (about half if causal), `present` of the keys are seen at all.
    Exponentials aren't counted."""
    elements = 2 * batch * width * (heads * queries + (kv_heads or heads) * keys * present)
    return simple(4 * batch * heads * queries * keys * width * share, elements)


def additive_attention(batch: int, queries: int, keys: int, width: int, values: int, share: float = 1.0) -> Work:
    """Scores weight . tanh(q + k), softmax, context. Two operations for a tanh's sum and product; the tanh itself,
    which bounds the speed, is counted apart."""
    pairs = batch * queries * keys * share
    elements = batch * (queries * (width + values) + keys * share * (width + values))
    return simple(2 * pairs * width + 2 * pairs * values, elements, special=pairs * width)


def language_model(family: str, batch: int, time: int, model: object) -> Work:
    """A language model of `s2s_kernels.models`: its layers one after another, and the map to logits."""
    sizes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}  # type: ignore[attr-defined]
    vocabulary, width = sizes["output.weight"]
    parts = []
    if family == "lstm":
        layers = [shape for name, shape in sizes.items() if name.startswith("lstm.weight_ih")]
        parts += [recurrence(4, batch, time, inputs, rows // 4, time) for rows, inputs in layers]
    elif family == "tcn":
        convs = [shape for name, shape in sizes.items() if name.endswith("weight.original1")]
        parts += [convolution(batch, time, inputs, outputs, taps) for outputs, inputs, taps in convs]
    elif family == "transformer":
        depth = len([name for name in sizes if name.endswith("qkv.weight")])
        linear = [shape for name, shape in sizes.items() if name.startswith("blocks.0") and len(shape) == 2]
        for _ in range(depth):
            parts += [dense(batch * time, inputs, outputs) for outputs, inputs in linear]
            parts.append(attention(batch, 1, time, time, width, share=(time + 1) / (2 * time)))
    else:
        raise ValueError(f"family must be lstm, tcn or transformer, got {family!r}")
    return chain([*parts, dense(batch * time, width, vocabulary)])


def dense(rows: int, inputs: int, outputs: int) -> Work:
    """A linear map."""
    return simple(2 * rows * inputs * outputs, rows * (inputs + outputs) + inputs * outputs)
