"""torch's own attention on a GPU as a backend: cuDNN's or FlashAttention's, as torch chooses.

Those know nothing of what isn't finite: it reaches rows that don't see it, or only part of those that do. So a kernel
looks for it, and where there is any, the Triton kernels, which return at once otherwise, make the results anew: no
synchronisation, and the definition's values for whatever comes in.

Forward keeps the graph of torch's call, on leaves of its own, and backward goes through that. The second derivative is
the definition's, as every kernel's here.
"""

from typing import Any

import torch

from ... import checks, dispatch
from ..differentiation import Options, Tensors, differentiable
from .autograd import reference_of

WIDEST = 128  # of the heads that were measured
FEWEST = 16  # queries to a key head: with as few the Triton kernels split the keys
# Multiplications of one of the two products, B H T S D. torch's kernel saves a tenth to a quarter of the time on the
# GPU (an H100's), what has to look for values that aren't finite costs 0.5 ms of the host's.
LEAST = 2**36


def gap(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool) -> str | None:
    """What torch's fast kernels don't cover of a call without other restrictions; None where they serve it."""
    if query.itemsize != 2:
        return "torch's fast kernels are of bfloat16 and float16"
    if 0 in (*query.shape, *key.shape):
        return "torch's kernel isn't asked for what is empty"
    if causal and query.shape[2] != key.shape[2]:
        return "torch's fast kernels have a causal mask for T = S only"
    width = query.shape[3]
    if value.shape[3] != width or width % 8 or width > WIDEST:
        return f"torch's fast kernels are measured for D = Dv, a multiple of 8 up to {WIDEST}"
    if any(x.stride(3) != 1 for x in (query, key, value)):
        return "torch's fast kernels take heads whose elements are neighbours in memory"
    if max(*query.shape[:2]) > 65535 or max(x.numel() for x in (query, key, value)) >= 2**31:
        return "torch's fast kernels count elements in 32 bits, and batch and heads up to 65535"
    if torch.are_deterministic_algorithms_enabled():
        return "torch's fast kernels of backward aren't deterministic"
    return None


def may_serve(tensors: Tensors, causal: bool | str) -> bool:
    """Whether a call on CUDA tensors, unchecked, is one of those that torch's kernel is asked about."""
    query, key, *_ = tensors
    assert query is not None and key is not None
    restricted = causal == "bottom-right" or any(x is not None for x in tensors[3:])
    return not restricted and not _small(query, key)


def _small(query: torch.Tensor, key: torch.Tensor) -> bool:
    return query.numel() * key.shape[2] < LEAST


def deferral(query: torch.Tensor, key: torch.Tensor) -> str | None:
    """Why a call that torch's kernel covers is better left to Triton's."""
    if query.shape[2] * (query.shape[1] // key.shape[1]) <= FEWEST:
        return "of a few queries torch's kernel leaves most of the GPU idle, where the Triton kernel splits the keys"
    if _small(query, key):
        return "of so few products torch's kernel saves less than it costs to see to what isn't finite"
    return None


def _mend(name: str, *args: Any) -> Any:
    """Calls the function that mends: as an earlier call of its kind was made, where nothing looks at this one."""
    from .. import triton_plans
    from . import triton_kernels

    function, tensors = getattr(triton_kernels, name), [x for x in args if isinstance(x, torch.Tensor)]
    if tensors[0].is_cuda and dispatch.untouched(tensors):
        return triton_plans.planned(name, function, args)
    return function(*args)


def _forward(tensors: Tensors, options: Options, save: bool) -> tuple[Tensors, Tensors]:
    query, key, value = tensors[:3]
    _, right, _, _, scale, _ = options
    assert query is not None and key is not None and value is not None
    leaves = [x.detach().requires_grad_(save and x.requires_grad) for x in (query, key, value)]
    with torch.set_grad_enabled(save), checks.without_autocast(query):
        result = torch.nn.functional.scaled_dot_product_attention(
            leaves[0], leaves[1], leaves[2], is_causal=right is not None, scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
    out = result.detach().contiguous()
    softmax, spoilt = _mend("mend_forward", *(x.detach() for x in leaves), out, save, *options)
    return (out, None), (result, out, softmax, spoilt, *leaves) if save else ()


def _backward(grads: Tensors, tensors: Tensors, saved: Tensors, options: Options, needs: tuple[bool, ...]) -> Tensors:
    """The graph is kept: the caller's own may be asked again."""
    grad_out, (result, out, softmax, spoilt, *leaves) = grads[0], saved
    found: list[torch.Tensor | None] = [None] * len(tensors)
    if grad_out is None or result is None:
        return tuple(found)
    wanted = {place: leaf for place, leaf in enumerate(leaves) if needs[place]}
    results = torch.autograd.grad([result], list(wanted.values()), [grad_out], retain_graph=True)  # type: ignore[arg-type]
    for place, grad in zip(wanted, results, strict=True):
        found[place] = grad.contiguous()
    inputs = [leaf.detach() for leaf in leaves]  # type: ignore[union-attr]
    _mend("mend_backward", grad_out, out, softmax, spoilt, *inputs, *found[:3], *options)
    return tuple(found)


kernel = differentiable("attention_builtin", forward=_forward, backward=_backward, reference=reference_of)
