"""python compiled_additive_attention.py ARCHITECTURE: compiles every launch of some calls of additive attention and
attention pooling, without a GPU, and prints a line of JSON for each: its resources and the matrix instructions in
it."""

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from s2s_kernels.ops.additive_attention import triton_kernels, triton_pool
from s2s_kernels.testing.compilation import TYPES, inspect, launched, record, source_of

TYPES[torch.bool] = "*i1"


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


def calls(arch: int, batch: int, queries: int, keys: int) -> Iterator[torch.dtype]:
    """Makes the calls; yields the dtype of what they have launched."""
    for dtype in (torch.bfloat16, torch.float32):
        call(dtype, batch, queries, keys, mask=True, dropout=0.2, weights=True, odd=True)
        if arch == 90 or dtype == torch.bfloat16:
            pool(dtype, batch, keys, last=dtype == torch.bfloat16)
        yield dtype
    if arch == 90:
        call(torch.bfloat16, batch, queries, keys)
        yield torch.bfloat16
        call(torch.float16, batch, 1, keys)
        yield torch.float16


PRODUCTS = (
    "context_kernel", "product_kernel", "value_gradient_kernel", "pool_scores_kernel", "pool_map_gradient_kernel",
)  # fmt: skip
HEAVY = (*PRODUCTS, "scores_kernel", "gradient_kernel")


def sources(arch: int) -> Iterator[tuple[Any, dict[str, Any], Any, dict[str, int], torch.dtype]]:
    """Kernel, arguments, source, options and dtype of everything that has been launched."""
    for sizes in ((3, 74, 75), (2, 5, 640), (5, 129, 2)):
        for dtype in calls(arch, *sizes):
            for kernel, args, kwargs in launched:
                # Convolution has tests of its own; what has neither tanh nor product is seen once.
                if "convolution" not in kernel.__module__ and (arch == 90 or kernel.__name__ in HEAVY):
                    yield kernel, kwargs, *source_of(kernel, args, kwargs), dtype
            launched.clear()
        yield None, {}, None, {}, torch.float32  # another batch and other lengths from here on


def main(arch: int) -> None:
    JITFunction.run = record  # type: ignore[method-assign]
    seen: set[tuple[object, ...]] = set()
    first = True
    for kernel, kwargs, source, options, dtype in sources(arch):
        if kernel is None:
            first = False
        elif (key := (source.hash(), *options.values())) not in seen:
            assert first, f"{kernel.__name__} compiles again for another length"
            seen.add(key)
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
            facts = {"name": kernel.__name__, "dtype": str(dtype).removeprefix("torch."), **kwargs}
            print(json.dumps({**facts, **inspect(compiled, kernel.__name__ in PRODUCTS)}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
