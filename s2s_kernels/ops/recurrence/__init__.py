"""Recurrent layers over a whole sequence: LSTM, GRU and the plain RNN, one layer and direction a call."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ... import checks, dispatch
from .. import python_kernels
from ..differentiation import Tensors
from ..random import draw_seed
from . import autograd, builtin, cuda_kernels, estimates, reference
from .reference import GATES

__all__ = ["gru", "lstm", "rnn"]


class Asked(NamedTuple):
    """What decides which backend serves a call. plain: without recurrent mask, zoneout, projection and layer
    normalisation; beyond: the first thing it asks for that torch's layers lack, in words; recording: whether a gradient
    may be asked of it; heads: 1 for weights that are one matrix."""

    cell: str
    dtype: torch.dtype
    device: torch.device
    batch: int
    time: int
    inputs: int
    hidden: int
    width: int  # P or H
    projected: bool
    normed: bool
    plain: bool
    beyond: str | None
    recording: bool
    heads: int = 1
    layers: int = 1
    directions: int = 1


def beyond_torch(
    weight_hh: torch.Tensor,
    normed: bool,
    lengths: Any,
    reset: Any,
    recurrent_mask: bool,
    zoneout: bool,
    weight_dropout: float,
) -> str | None:
    """What of a call torch's own layers don't have; None where it is plain."""
    if weight_hh.dim() == 3:
        return "heads"
    if lengths is not None:
        return "lengths that may stay on the device"
    if reset is not None:
        return "resets"
    if normed:
        return "layer normalisation"
    return (
        "recurrent mask" if recurrent_mask else "zoneout" if zoneout else "weight dropout" if weight_dropout else None
    )


def recording(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Whether a gradient may be asked of a call on a GPU. Nowhere else does it decide anything."""
    on_gpu = tensors[0] is not None and tensors[0].is_cuda
    return on_gpu and torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors)


def _not_in_cuda(asked: Asked) -> str | None:
    cell = autograd.CELLS.index(asked.cell)
    return cuda_kernels.gap(
        asked.hidden, asked.width, cell, asked.dtype, asked.device, asked.projected, asked.normed
    )  # fmt: skip


def _deferral(backend: str, asked: Asked) -> str | None:
    """Why a backend that covers a call leaves it to a faster one. A compiled call takes the first of the order: its
    sizes are symbols, and to compare them would compile anew for each."""
    if torch.compiler.is_compiling() or 0 in (asked.batch, asked.time, asked.inputs):
        return None
    if asked.device.type != "cuda":
        return "the last bits of torch's layers depend on the number of threads" if backend == "torch" else None
    operator = OPERATORS[asked.cell.partition("_")[0]]
    able = tuple(b for b in COMPARED if dispatch.gap(operator, b, asked.device, asked) is None)
    if len(able) < 2 or backend not in able:
        return None
    seconds, source = estimates.compared(asked, able)
    best = min(able, key=seconds.__getitem__)
    if backend == best:
        return None
    told = f"{source}: {', '.join(f'{name} {seconds[name] * 1e3:.3g} ms' for name in able)}"
    return f"{told}; it serves under torch.compile" if able[0] == best == "torch" and backend == able[1] else told


COMPARED = ("torch", "cuda", "triton")  # the first of equals
# Probabilities have the integer 0 as default: under torch.compile(dynamic=True) a float makes the trace start over.
OPERATORS = {
    name: dispatch.register(
        name,
        {backend: functools.partial(_deferral, backend) for backend in COMPARED},
        cpu=lambda asked: None,
        triton=lambda asked: dispatch.not_in_triton(asked.dtype),
        cuda=_not_in_cuda,
        torch=builtin.gap,
    )
    for name in ("lstm", "gru", "rnn")
}


def chosen(asked: Asked, untouched: bool) -> str:
    """The backend that serves a call, as `dispatch.choose` says: on CUDA tensors that nothing looks at (`untouched`) it
    is known from the call before that asked for the same under the same settings."""
    forced, explaining = dispatch.asked() if untouched else (None, True)
    if explaining or asked.device.type != "cuda":
        return dispatch.choose(OPERATORS[asked.cell.partition("_")[0]], asked.device, asked)
    return _known(asked, forced, builtin.settings(asked.dtype))


@functools.lru_cache(maxsize=1024)
def _known(asked: Asked, forced: str | None, settings: tuple[Any, ...]) -> str:
    """settings: all that the rules read besides the call and what stays as it is in a process."""
    return dispatch.choose(OPERATORS[asked.cell.partition("_")[0]], asked.device, asked)


def lstm(
    x: torch.Tensor,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    bias_ih: torch.Tensor | None = None,
    bias_hh: torch.Tensor | None = None,
    h0: torch.Tensor | None = None,
    c0: torch.Tensor | None = None,
    *,
    lengths: torch.Tensor | None = None,
    reset: torch.Tensor | None = None,
    reverse: bool = False,
    weight_hr: torch.Tensor | None = None,
    recurrent_mask: torch.Tensor | None = None,
    zoneout: float | tuple[float, float] = 0,
    training: bool = False,
    layer_norm: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Long short-term memory (Hochreiter and Schmidhuber 1997; forget gate: Gers et al. 2000).

        i, f, g, o = W_ih x + b_ih + W_hh h + b_hh
        c' = sigmoid(f) * c + sigmoid(i) * tanh(g);   h' = sigmoid(o) * tanh(c')

    Args:
        x: input (B, T, I), any strides; float64, float32, bfloat16 or float16, and so is everything else that floats.
        weight_ih, weight_hh: (4H, I) and (4H, P or H), gates in torch's order i, f, g, o. Of heads, recurrences of
            H / heads units that share their input, weight_hh is (heads, 4H / heads, (P or H) / heads), the gates of
            a head in the same order: the matrix that has these blocks on the diagonal of each gate, and 0 elsewhere,
            W_hh[g H + k H/heads + i, k P/heads + j] = weight_hh[k, g H/heads + i, j].
        bias_ih, bias_hh: (4H,).
        h0, c0: state before the first step, (B, P or H) and (B, H); zeros if none.
        lengths: (B,) int32 or int64, on the CPU or beside x, unsorted. Positions at or past it never matter, and the
            output is 0 there.
        reset: (B, T) bool: a sequence starts at t, no state crosses between t-1 and t in either direction.
        reverse: run from the last present position to position 0; each output stays at its own t.
        weight_hr: (P, H), projects h (Sak et al. 2014).
        recurrent_mask: (B, P or H), multiplies h in the recurrent product only (variational dropout, Gal and
            Ghahramani 2016); already scaled.
        zoneout: p or (p of h, p of c): in training each unit keeps its previous value with probability p, in
            evaluation the expectation of that (Krueger et al. 2017).
        training: what zoneout does.
        layer_norm: (w_ih (4H,), w_hh (4H,), w_c (H,), b_c (H,)): both products and the cell under its tanh are
            normalised, eps 1e-5 (Ba et al. 2016).

    Returns:
        output (B, T, P or H), h_n (B, P or H), c_n (B, H): contiguous, in x's dtype. h_n and c_n are the state after
        the last step that was made, h0 and c0 where the length is 0.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.

    Equivalent to: one layer and direction of ``torch.nn.LSTM(batch_first=True)``.
    """
    output, h_n, c_n = run(
        "lstm",
        x,
        weight_ih,
        weight_hh,
        bias_ih,
        bias_hh,
        h0,
        c0,
        lengths=lengths,
        reset=reset,
        reverse=reverse,
        weight_hr=weight_hr,
        recurrent_mask=recurrent_mask,
        zoneout=zoneout,
        training=training,
        layer_norm=layer_norm,
    )
    assert c_n is not None
    return output, h_n, c_n


def gru(
    x: torch.Tensor,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    bias_ih: torch.Tensor | None = None,
    bias_hh: torch.Tensor | None = None,
    h0: torch.Tensor | None = None,
    *,
    lengths: torch.Tensor | None = None,
    reset: torch.Tensor | None = None,
    reverse: bool = False,
    recurrent_mask: torch.Tensor | None = None,
    zoneout: float = 0,
    training: bool = False,
    layer_norm: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gated recurrent unit (Cho et al. 2014), in torch's form, which resets after the product.

        r = sigmoid(W_ir x + b_ir + W_hr h + b_hr);   z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
        n = tanh(W_in x + b_in + r * (W_hn h + b_hn));   h' = (1 - z) * n + z * h

    Args:
        x: input (B, T, I), any strides; float64, float32, bfloat16 or float16, and so is everything else that floats.
        weight_ih, weight_hh: (3H, I) and (3H, H), gates in torch's order r, z, n; weight_hh of heads, as `lstm`'s,
            (heads, 3H / heads, H / heads).
        bias_ih, bias_hh: (3H,).
        h0, lengths, reset, reverse, recurrent_mask, training: as `lstm`.
        zoneout: the probability p of a unit to keep its previous value, as `lstm`.
        layer_norm: (w_ih (3H,), w_hh (3H,)), as `lstm`.

    Returns:
        output (B, T, H), h_n (B, H): contiguous, in x's dtype.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.

    Equivalent to: one layer and direction of ``torch.nn.GRU(batch_first=True)``.
    """
    output, h_n, _ = run(
        "gru",
        x,
        weight_ih,
        weight_hh,
        bias_ih,
        bias_hh,
        h0,
        lengths=lengths,
        reset=reset,
        reverse=reverse,
        recurrent_mask=recurrent_mask,
        zoneout=zoneout,
        training=training,
        layer_norm=layer_norm,
    )
    return output, h_n


def rnn(
    x: torch.Tensor,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    bias_ih: torch.Tensor | None = None,
    bias_hh: torch.Tensor | None = None,
    h0: torch.Tensor | None = None,
    *,
    lengths: torch.Tensor | None = None,
    reset: torch.Tensor | None = None,
    reverse: bool = False,
    recurrent_mask: torch.Tensor | None = None,
    zoneout: float = 0,
    training: bool = False,
    layer_norm: tuple[torch.Tensor, torch.Tensor] | None = None,
    nonlinearity: str = "tanh",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain recurrence (Elman 1990): h' = tanh(W_ih x + b_ih + W_hh h + b_hh).

    Args:
        x: input (B, T, I), any strides; float64, float32, bfloat16 or float16, and so is everything else that floats.
        weight_ih, weight_hh: (H, I) and (H, H); weight_hh of heads, as `lstm`'s, (heads, H / heads, H / heads).
        bias_ih, bias_hh: (H,).
        h0, lengths, reset, reverse, recurrent_mask, training: as `lstm`.
        zoneout: the probability p of a unit to keep its previous value, as `lstm`.
        layer_norm: (w_ih (H,), w_hh (H,)), as `lstm`.
        nonlinearity: "tanh" or "relu".

    Returns:
        output (B, T, H), h_n (B, H): contiguous, in x's dtype.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.

    Equivalent to: one layer and direction of ``torch.nn.RNN(batch_first=True)``.
    """
    checks.choice("rnn", "nonlinearity", nonlinearity, ("tanh", "relu"))
    output, h_n, _ = run(
        f"rnn_{nonlinearity}",
        x,
        weight_ih,
        weight_hh,
        bias_ih,
        bias_hh,
        h0,
        lengths=lengths,
        reset=reset,
        reverse=reverse,
        recurrent_mask=recurrent_mask,
        zoneout=zoneout,
        training=training,
        layer_norm=layer_norm,
    )
    return output, h_n


def run(
    cell: str,
    x: torch.Tensor,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    bias_ih: torch.Tensor | None = None,
    bias_hh: torch.Tensor | None = None,
    h0: torch.Tensor | None = None,
    c0: torch.Tensor | None = None,
    *,
    lengths: torch.Tensor | None = None,
    reset: torch.Tensor | None = None,
    reverse: bool = False,
    weight_hr: torch.Tensor | None = None,
    recurrent_mask: torch.Tensor | None = None,
    zoneout: float | tuple[float, float] = 0,
    training: bool = False,
    layer_norm: tuple[torch.Tensor, ...] | None = None,
    weight_dropout: float = 0,
    packed: bool = False,
    sharing: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What `lstm`, `gru` and `rnn` are made of, and what the layers call: checks, then dispatches.

    Args:
        cell: "lstm", "gru", "rnn_tanh" or "rnn_relu".
        c0, weight_hr: of an LSTM only.
        weight_dropout: p: each element of weight_hh is dropped with probability p for the whole call, the others are
            scaled by 1 / (1 - p) (DropConnect, Wan et al. 2013; Merity et al. 2018). Applied whenever > 0; the layers
            pass 0 in evaluation.
        packed: x is (N, I), the present positions only, time by time, of rows sorted by lengths, longest first: the
            data of a PackedSequence. The output is then (N, P or H).
        sharing: how many such calls run on the device at once.
        the others: as `lstm`.

    Returns:
        output, h_n, and c_n of an LSTM, else None.
    """
    name, gates = cell.partition("_")[0], GATES[cell]
    checks.tensor(name, "x", x)
    norms = _layer_norm(name, layer_norm)
    floating = (weight_ih, weight_hh, bias_ih, bias_hh, h0, c0, weight_hr, recurrent_mask, *norms)
    x, *cast = checks.autocast(x, *floating)  # type: ignore[assignment]
    checks.data(name, "x", x, 2 if packed else 3, "(N, I)" if packed else "(B, T, I)")
    if packed:
        assert lengths is not None
        batch, (time, inputs) = lengths.shape[0], x.shape  # no row is longer than all of them
    else:
        batch, time, inputs = x.shape
    weight_ih, weight_hh, bias_ih, bias_hh, h0, c0, weight_hr, recurrent_mask, *norms = cast  # type: ignore[assignment]

    rows, suffix = (f"{gates}H", "P or H" if name == "lstm" else "H") if gates > 1 else ("H", "H")
    checks.tensor(name, "weight_ih", weight_ih)
    if weight_ih.dim() != 2 or weight_ih.shape[0] % gates or weight_ih.shape[0] == 0:
        checks.wrong_value(name, "weight_ih", f"({rows}, I)", tuple(weight_ih.shape))
    hidden = weight_ih.shape[0] // gates
    checks.like(name, "weight_ih", weight_ih, x, "x", (gates * hidden, inputs), f"({rows}, I)")
    projected, heads = hidden, 1
    if weight_hr is not None:
        checks.tensor(name, "weight_hr", weight_hr)
        if weight_hr.dim() != 2 or weight_hr.shape[0] == 0:
            checks.wrong_value(name, "weight_hr", "(P, H)", tuple(weight_hr.shape))
        projected = weight_hr.shape[0]
        checks.like(name, "weight_hr", weight_hr, x, "x", (projected, hidden), "(P, H)")
    checks.tensor(name, "weight_hh", weight_hh)
    if weight_hh.dim() == 3:
        heads = weight_hh.shape[0]
        if heads == 0 or hidden % heads or projected % heads:
            expected = f"(heads, {rows} / heads, {suffix} / heads), heads a divisor of {hidden} and {projected}"
            checks.wrong_value(name, "weight_hh", expected, tuple(weight_hh.shape))
        shape = (heads, gates * hidden // heads, projected // heads)
        checks.like(name, "weight_hh", weight_hh, x, "x", shape, f"(heads, {rows} / heads, {suffix} / heads)")
    else:
        checks.like(name, "weight_hh", weight_hh, x, "x", (gates * hidden, projected), f"({rows}, {suffix})")
    checks.like(name, "bias_ih", bias_ih, x, "x", (gates * hidden,), f"({rows},)")
    checks.like(name, "bias_hh", bias_hh, x, "x", (gates * hidden,), f"({rows},)")
    checks.like(name, "h0", h0, x, "x", (batch, projected), f"(B, {suffix})")
    checks.like(name, "c0", c0, x, "x", (batch, hidden), "(B, H)")
    checks.like(name, "recurrent_mask", recurrent_mask, x, "x", (batch, projected), f"(B, {suffix})")
    for norm, size in zip(norms, (gates * hidden, gates * hidden, hidden, hidden), strict=True):
        checks.like(name, "layer_norm", norm, x, "x", (size,), f"({rows},), ({rows},), then (H,), (H,) of an LSTM")
    checks.boolean(name, "reset", reset, x, "x")
    if reset is not None and tuple(reset.shape) != (batch, time):
        checks.wrong_value(name, "reset", f"(B, T) = ({batch}, {time})", tuple(reset.shape))
    lengths = checks.lengths(name, "lengths", lengths, x, batch, time)
    zoneout_h, zoneout_c = _zoneout(name, zoneout)
    checks.probability(name, "weight_dropout", weight_dropout)

    zoned = zoneout_h > 0 or zoneout_c > 0
    random = weight_dropout > 0 or (training and zoned)
    seed = draw_seed(x.device) if random else None
    tensors = (
        x, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0, weight_hr, recurrent_mask, *norms, lengths, reset, seed,
    )  # fmt: skip
    beyond = beyond_torch(
        weight_hh, norms[0] is not None, lengths, reset, recurrent_mask is not None, zoned, weight_dropout
    )
    asked = Asked(
        cell, x.dtype, x.device, batch, time, inputs, hidden, projected, weight_hr is not None, norms[0] is not None,
        not zoned and weight_hr is recurrent_mask is norms[0] is None, beyond, recording(tensors), heads,
    )  # fmt: skip
    backend = chosen(asked, dispatch.untouched(tensors))
    options = (
        cell, bool(reverse), zoneout_h, zoneout_c, bool(training), float(weight_dropout), packed,
        sharing if backend == "cuda" else 0,
    )  # fmt: skip
    if backend == "reference" or dispatch.transformed(*tensors):
        return autograd.reference_of(tensors, options)  # type: ignore[return-value]
    if backend == "torch":
        return builtin.one(tensors, options)  # type: ignore[return-value]
    # What goes across heads, or numbers its random draws by all units, is given the matrix.
    if weight_hh.dim() == 3 and (backend == "cuda" or random or weight_hr is not None or norms[0] is not None):
        tensors = (x, weight_ih, reference.block_diagonal(weight_hh, gates), *tensors[3:])
    return autograd.kernel(tensors, options)  # type: ignore[return-value]


def one_of_a_stack(
    cell: str, tensors: Tensors, reverse: bool, training: bool, backend: str | None = None, sharing: int = 1
) -> Tensors | None:
    """One layer and direction of a call that nothing looks at, in which nothing is random and all tensors have one
    dtype, that of a kernel, and one device, by a kernel, if that is what serves it.

    Args:
        tensors: as `autograd.kernel`'s.
        backend: where it is known already.
        sharing: as `run`'s.

    Returns:
        output, h_n, and c_n of an LSTM, else None. None for all where `run` has to see to the call: another backend's,
        or one that a kernel refuses, for which `run` names the argument.
    """
    x, _, weight_hh, *_, weight_hr, _, norm_ih, _, _, _, lengths, reset, _ = tensors
    assert x is not None and weight_hh is not None
    if weight_hh.dim() != 2:
        return None
    if backend is None:
        (batch, time, inputs), (rows, width), normed = x.shape, weight_hh.shape, norm_ih is not None
        beyond = beyond_torch(weight_hh, normed, lengths, reset, False, False, 0)
        asked = Asked(
            cell, x.dtype, x.device, batch, time, inputs, rows // GATES[cell], width, weight_hr is not None, normed,
            weight_hr is norm_ih is None, beyond, recording(tensors),
        )  # fmt: skip
        backend = chosen(asked, True)
    if backend not in ("cuda", "triton"):
        return None
    try:
        cuda = sharing if backend == "cuda" else 0
        return autograd.kernel(tensors, (cell, reverse, 0.0, 0.0, training, 0.0, False, cuda))
    except autograd.Unfit:
        return None


def step(
    cell: str, x: torch.Tensor, weights: Sequence[torch.Tensor | None], states: Sequence[torch.Tensor | None]
) -> list[torch.Tensor] | None:
    """One step without an option: x (B, I); weight_ih, weight_hh, bias_ih, bias_hh; h and, of an LSTM, c before it.

    Returns:
        h and c after it; None where more surrounds the call than a kernel (`dispatch.is_plain`): it is `run`'s then.

    Raises:
        RuntimeError: the kernel refuses a shape or a dtype. `run` says it in the words of an operator.
    """
    if not dispatch.is_plain(x, *weights, *states, triton=True):
        return None
    h, c = states if len(states) == 2 else (states[0], None)
    tensors = (x, *weights, h, c)
    on_gpu = x.is_cuda and python_kernels.function_of("recurrence_step", x, tensors)
    return (on_gpu or torch.ops.s2s.recurrence_step.default)(*tensors, autograd.CELLS.index(cell))


def _layer_norm(name: str, layer_norm: Any) -> tuple[torch.Tensor | None, ...]:
    """The four of an LSTM; the two of the others and two None."""
    if layer_norm is None:
        return (None,) * 4
    count = 4 if name == "lstm" else 2
    if not isinstance(layer_norm, (tuple, list)) or not all(isinstance(v, torch.Tensor) for v in layer_norm):
        checks.wrong_type(name, "layer_norm", f"a tuple of {count} tensors", type(layer_norm).__name__)
    if len(layer_norm) != count:
        checks.wrong_value(name, "layer_norm", f"a tuple of {count} tensors", f"{len(layer_norm)}")
    return (*layer_norm, *(None,) * (4 - count))


def _zoneout(name: str, zoneout: Any) -> tuple[float, float]:
    """The probabilities of h and of c."""
    pair = zoneout if name == "lstm" and isinstance(zoneout, (tuple, list)) else (zoneout, zoneout)
    if len(pair) != 2 or not all(isinstance(p, (int, float)) for p in pair):
        expected = "a probability or a pair of them" if name == "lstm" else "a probability"
        checks.wrong_type(name, "zoneout", expected, repr(zoneout))
    for p in pair:
        checks.probability(name, "zoneout", p)
    return float(pair[0]), float(pair[1]) if name == "lstm" else 0.0
