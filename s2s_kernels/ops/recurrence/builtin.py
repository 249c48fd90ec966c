"""torch's own recurrent layers as a backend: cuDNN on a GPU, oneDNN or ATen on a CPU. `gap` says what they don't cover.

Forward keeps the graph of torch's call, on leaves of its own, and backward goes through that graph once. The second
derivative, which cuDNN has none of, is the definition's, as every kernel's here.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ... import checks
from ..differentiation import Options, Tensors, differentiable
from . import measurements
from .layers import reference_of
from .reference import GATES

if TYPE_CHECKING:
    from . import Asked

LONGEST = 65535  # positions, in cuDNN: pytorch issue 133751


def gap(asked: "Asked") -> str | None:
    """What torch's layers don't cover of a call, or where they would break the contract; None where they serve it."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "torch's layers aren't traced: they would be compiled anew for each length, or unrolled"
    if asked.beyond is not None:
        return f"torch's layers have no {asked.beyond}"
    if 0 in (asked.batch, asked.time, asked.inputs):
        return "torch's layers refuse what is empty"
    if asked.projected and asked.width >= asked.hidden:
        return "torch's layers project to fewer units only"
    return _not_in_cudnn(asked) if asked.device.type == "cuda" else _not_on_cpu(asked)


def _not_on_cpu(asked: "Asked") -> str | None:
    if asked.dtype.itemsize < 4:
        return "torch's layers carry the state in 16 bits from step to step"
    return None


def _not_in_cudnn(asked: "Asked") -> str | None:
    enabled = torch.backends.cudnn.enabled
    if not enabled or not _taken_by_cudnn(asked.dtype, asked.device):
        kind = str(asked.dtype).removeprefix("torch.")
        return f"cuDNN is switched off or doesn't take {kind}, and torch's layers without it carry the state in it"
    if torch.are_deterministic_algorithms_enabled():
        return "cuDNN's recurrences aren't deterministic under every setting of cuBLAS's workspace"
    if asked.time > LONGEST:
        return f"cuDNN takes no more than {LONGEST} positions"
    widest = max(asked.inputs, asked.directions * GATES[asked.cell] * asked.hidden)
    if asked.batch * asked.time * widest >= 2**31:
        return "cuDNN counts elements in 32 bits"
    if asked.dtype == torch.float32 and rounds_more():
        return (
            "cuDNN would round float32 products to tf32 (torch.backends.cudnn.rnn.fp32_precision), which "
            'torch.set_float32_matmul_precision("highest") rules out'
        )
    # In float64 what may differ is the order of sums alone.
    if (asked.dtype != torch.float64 or asked.cell == "rnn_relu") and not measurements.keeps_contract(
        asked.cell, asked.dtype, asked.device
    ):
        return (
            "cuDNN doesn't say that it carries the state in float32, hands NaN on and rounds no more than other "
            "products, and no measurement on this device and version of it has shown that (python -m benchmarks.choice)"
        )
    return None


def settings(dtype: torch.dtype) -> tuple[Any, ...]:
    """The settings of torch that the choice of a backend depends on: those that `gap` reads, and the precision of
    float32 products, which other backends' rules read too."""
    exact = dtype != torch.float32 or (torch.get_float32_matmul_precision(), rounds_more())
    return torch.backends.cudnn.enabled, torch.are_deterministic_algorithms_enabled(), exact


def rounds_more() -> bool:
    """Whether cuDNN would round what it multiplies in float32 where other products don't."""
    rounds = torch.backends.cudnn.rnn.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return rounds and torch.get_float32_matmul_precision() == "highest"


@functools.lru_cache(maxsize=64)
def _taken_by_cudnn(dtype: torch.dtype, device: torch.device) -> bool:
    return torch.cudnn_is_acceptable(torch.empty(1, dtype=dtype, device=device))


def _flattened(
    cell: str,
    weights: Sequence[torch.Tensor],
    *,
    count: int,
    directions: int,
    inputs: int,
    hidden: int,
    projection: int,
) -> list[torch.Tensor]:
    """Weights as cuDNN reads them, in one buffer: copies, where they don't share one already as torch's own layers' do.
    Left to cuDNN the copy would be made as well, with a warning at every call."""
    if len({weight.untyped_storage().data_ptr() for weight in weights}) == 1:
        return [weight.detach() for weight in weights]
    mode = torch.backends.cudnn.rnn.get_cudnn_mode(cell.upper())
    copies = [weight.detach().clone(memory_format=torch.contiguous_format) for weight in weights]
    with torch.cuda.device_of(copies[0]):
        torch._cudnn_rnn_flatten_weight(
            copies, len(weights) // (count * directions), inputs, mode, hidden, projection, count, False,
            directions == 2,
        )  # fmt: skip
    return copies


def _forward(tensors: Tensors, options: Options, save: bool) -> tuple[Tensors, Tensors]:
    x, h0, c0, _, _, *weights = tensors
    cell, directions, bias, projected, *_, time_first, _ = options
    assert x is not None
    hidden, width = weights[0].shape[0] // GATES[cell], weights[1].shape[1]  # type: ignore[union-attr]
    cells = len(weights) // (2 + 2 * bias + projected)
    given = ((h0, width), (c0, hidden))[: 2 if cell == "lstm" else 1]
    states = [x.new_zeros(cells, x.shape[0], size) if v is None else v.detach() for v, size in given]
    flat = [weight.detach() for weight in weights]  # type: ignore[union-attr]
    if x.is_cuda:
        sizes = {"inputs": x.shape[2], "hidden": hidden, "projection": width if projected else 0}
        with torch.no_grad():
            flat = _flattened(cell, flat, count=cells // directions, directions=directions, **sizes)
    leaves = (x.detach(), *states, *flat)
    if save:
        for leaf, original in zip(leaves, (x, *(v for v, _ in given), *weights), strict=True):
            leaf.requires_grad_(original is not None and original.requires_grad)
    with torch.set_grad_enabled(save), checks.without_autocast(x):
        before = tuple(state.contiguous() for state in states)
        output, *finals = getattr(torch, cell)(
            leaves[0].transpose(0, 1), before if cell == "lstm" else before[0], flat, bias, cells // directions, 0.0,
            save, directions == 2, False,
        )  # fmt: skip
    shown = [value.detach() for value in (output if time_first else output.transpose(0, 1), *finals)]
    results = (*(value.contiguous() for value in shown), *(None,) * (2 - len(given)))
    return results, (output, *finals, *leaves) if save else ()


def _backward(grads: Tensors, tensors: Tensors, saved: Tensors, options: Options, needs: tuple[bool, ...]) -> Tensors:
    """The graph is kept: the caller's own may be asked again."""
    states = 2 if options[0] == "lstm" else 1
    outputs, leaves = saved[: 1 + states], saved[1 + states :]
    grad_output, *others = grads
    if grad_output is not None and not options[7]:
        grad_output = grad_output.transpose(0, 1)
    pairs = [(output, grad) for output, grad in zip(outputs, (grad_output, *others), strict=False) if grad is not None]
    # By the places of the tensors: x, h0, c0 of an LSTM, and the weights behind lengths and reset.
    places = (0, 1, 2, *range(5, len(tensors))) if states == 2 else (0, 1, *range(5, len(tensors)))
    wanted = {place: leaf for place, leaf in zip(places, leaves, strict=True) if needs[place]}
    found: list[torch.Tensor | None] = [None] * len(tensors)
    if pairs and wanted:
        results = torch.autograd.grad(
            [output for output, _ in pairs], list(wanted.values()), [grad for _, grad in pairs],  # type: ignore[arg-type]
            retain_graph=True, allow_unused=True,
        )  # fmt: skip
        for place, result in zip(wanted, results, strict=True):
            found[place] = result
    return tuple(found)


kernel = differentiable("recurrence_builtin", forward=_forward, backward=_backward, reference=reference_of)


def one(tensors: Tensors, options: Options) -> Tensors:
    """One layer and direction, under `autograd`'s convention."""
    x, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0, weight_hr = tensors[:8]
    cell, reverse = options[:2]
    assert x is not None and weight_ih is not None
    weights = [weight_ih, weight_hh]
    bias = bias_ih is not None or bias_hh is not None
    if bias:  # torch's layers have both or none
        weights += [weight_ih.new_zeros(weight_ih.shape[0]) if v is None else v for v in (bias_ih, bias_hh)]
    projected = weight_hr is not None
    states = (state if state is None else state.unsqueeze(0) for state in (h0, c0))
    output, h_n, c_n = kernel(
        (x.flip(1) if reverse else x, *states, None, None, *weights, *([weight_hr] if projected else [])),
        (cell, 1, bias, projected, False, 0.0, 0.0, False, False),
    )
    assert output is not None and h_n is not None
    return output.flip(1) if reverse else output, h_n.squeeze(0), c_n if c_n is None else c_n.squeeze(0)
