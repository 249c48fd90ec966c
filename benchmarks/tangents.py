"""As many hyperbolic tangents as a GPU's units for them can take in a row."""

import torch
import triton
import triton.language as tl

ROUNDS = 512  # for each number, so that reading and writing it is nothing
SIZE = 1024  # numbers of a program
PROGRAMS = 8192


@triton.jit
def tangents_kernel(numbers, ROUNDS: tl.constexpr, SIZE: tl.constexpr):
    index = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = tl.load(numbers + index)
    for _ in range(ROUNDS):
        x = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    tl.store(numbers + index, x)


def count(numbers: torch.Tensor) -> int:
    """Of a run on so many numbers."""
    return min(PROGRAMS, numbers.numel() // SIZE) * SIZE * ROUNDS


def run(numbers: torch.Tensor) -> None:
    """Replaces the first numbers of a float32 tensor."""
    tangents_kernel[(min(PROGRAMS, numbers.numel() // SIZE),)](numbers, ROUNDS, SIZE)  # type: ignore[index]
