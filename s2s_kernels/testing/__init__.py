"""Sample inputs, inputs that must be refused, and the rule by which equality is judged.

The tests, `python -m s2s_kernels check` and the benchmarks all use these. An operator has one `OperatorCase` in
`CASES`; the samples of a stem are in the file of that name.
"""

from . import additive_attention, attention, convolution, recurrence, recurrent_layers
from .rule import (
    Call,
    Draw,
    ErrorSample,
    OperatorCase,
    Sample,
    call,
    compare,
    evaluate,
    excess,
    is_float,
    leaves_of,
    noise_like,
    outputs_of,
    prepare,
    to_device,
)

CASES: dict[str, OperatorCase] = {
    **recurrence.CASES,
    **recurrent_layers.CASES,
    **convolution.CASES,
    **attention.CASES,
    **additive_attention.CASES,
}

__all__ = [
    "CASES",
    "Call",
    "Draw",
    "ErrorSample",
    "OperatorCase",
    "Sample",
    "call",
    "compare",
    "evaluate",
    "excess",
    "is_float",
    "leaves_of",
    "noise_like",
    "outputs_of",
    "prepare",
    "to_device",
]
