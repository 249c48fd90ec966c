"""The calls of additive attention and attention pooling whose launches are compiled for each architecture."""

from collections.abc import Iterator
from typing import Any

import torch

from s2s_kernels.ops.additive_attention import triton_kernels, triton_pool

PRODUCTS = (
    "context_kernel", "product_kernel", "value_gradient_kernel", "pool_scores_kernel", "pool_map_gradient_kernel",
    "pool_input_gradient_kernel",
)  # fmt: skip
EVERYWHERE = (*PRODUCTS, "scores_kernel", "gradient_kernel")


def without_convolution(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> tuple[Any, ...]:
    """In place of what pooling's backward borrows of convolution, which has calls of its own."""
    return torch.empty_like(x), torch.empty_like(weight), weight.new_empty(weight.shape[0]), None, None


triton_pool.causal_conv1d_backward = without_convolution


EVERYTHING = {"mask": True, "dropout": 0.2, "weights": True, "odd": True}


def call(
    dtype: torch.dtype, batch: int, queries: int, keys: int, *, width: int = 96, values: int = 80, mask: bool = False,
    dropout: float = 0.0, weights: bool = False, odd: bool = False,
) -> None:  # fmt: skip
    def noise(*shape: int) -> torch.Tensor:
        laid = torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2] if odd else torch.randn(*shape)
        return laid.to(dtype)

    query, key, value = noise(batch, queries, width), noise(batch, keys, width), noise(batch, keys, values)
    weight, lengths = torch.randn(width).to(dtype), torch.arange(batch) % (keys + 1)
    visible = torch.ones(batch, queries, keys, dtype=torch.bool) if mask else None
    seed = torch.tensor([3, 5]) if dropout else None
    shared = visible, lengths, seed, None, None, dropout
    _, given, statistics = triton_kernels.additive_attention_forward(query, key, value, weight, *shared, weights, True)
    triton_kernels.additive_attention_backward(
        noise(batch, queries, values), given if weights else None, query, key, value, weight, statistics, *shared,
        True, True, True, True,
    )  # fmt: skip


def pool(dtype: torch.dtype, batch: int, time: int, *, width: int = 96, units: int = 80, last: bool = True) -> None:
    x = torch.randn(batch, time, width).to(dtype)
    x = x if last else x.mT.contiguous().mT
    weight, bias, context = (torch.randn(*shape).to(dtype) for shape in ((units, width), (units,), (units,)))
    lengths = torch.arange(batch) % (time + 1)
    pooled, weights = triton_pool.attention_pool_forward(x, weight, bias, context, lengths)
    triton_pool.attention_pool_backward(pooled, weights, x, weight, bias, context, weights, lengths)


def calls(arch: int) -> Iterator[tuple[torch.dtype, str, bool]]:
    """Makes the calls, some for one architecture only; yields the dtype and the precision of what they launched, and
    whether that is a sample."""
    call(torch.bfloat16, 3, 74, 75, **EVERYTHING)
    yield torch.bfloat16, "highest", arch != 80
    pool(torch.bfloat16, 3, 75)
    yield torch.bfloat16, "highest", arch == 90
    if arch == 90:
        call(torch.bfloat16, 3, 74, 75)
        call(torch.float16, 3, 1, 75)
        yield torch.float16, "highest", False
    call(torch.float32, 3, 74, 75, **EVERYTHING)
    yield torch.float32, "highest", arch == 80
    if arch == 90:
        pool(torch.float32, 3, 75, last=False)
    yield torch.float32, "highest", False


def again() -> None:
    """Another batch and length, odd ones too, that compile to the same kernels."""
    call(torch.bfloat16, 2, 5, 640, **EVERYTHING)
    call(torch.float32, 5, 129, 2, **EVERYTHING)
    pool(torch.bfloat16, 2, 641)
