"""Launchers of the Triton kernels of causal convolution, under the schemas of csrc/operators.cpp.

Imported by the first call on a CUDA tensor.
"""

import functools
from typing import Any

import torch

from ...dispatch import TRITON_DTYPES
from ..triton_common import device_of, power, precision, reduce, strides_of
from . import triton_epilogue as epilogue
from .reference import padding
from .triton_dense import bias_kernel, dense_kernel, dense_weight_kernel
from .triton_depthwise import depthwise_kernel, depthwise_weight_kernel
from .triton_lines import line_kernel, line_weight_kernel
from .triton_toeplitz import toeplitz_kernel, toeplitz_weight_kernel

STRIDED, TIME, CHANNEL = (unit.value for unit in (epilogue.STRIDED, epilogue.TIME, epilogue.CHANNEL))
GATES = (epilogue.GLU.value, epilogue.GATED_TANH.value)
# Programs among which the sum over batch and time is split. A constant: the bits must not depend on the GPU.
PROGRAMS = 512
LONG = 256  # positions from which on lines are worth kernels of their own
FEW = 8  # taps that are worth a vector each
TOEPLITZ = {"ROWS": 32, "BLOCK": 64, "num_warps": 4, "num_stages": 3, "maxnreg": 128}
TOEPLITZ_WEIGHT = {"ROWS": 32, "BLOCK": 64, "num_warps": 8, "num_stages": 3, "maxnreg": 128}
LINE = {"POSITIONS": 1024, "num_warps": 4}
LINE_WEIGHT = {"POSITIONS": 1024, "num_warps": 4}
# Of what is read along one dimension and written along another.
SQUARE = {"CHANNELS": 64, "POSITIONS": 64, "num_warps": 4}


def _unit(tensor: torch.Tensor | None) -> int:
    """The dimension of a (B, C, T) tensor along which it is dense in memory."""
    if tensor is None:
        return STRIDED
    return TIME if tensor.stride(2) == 1 else CHANNEL if tensor.stride(1) == 1 else STRIDED


def _reduced(size: int, most: int) -> int:
    """Channels of a product at a time: many, unless that pads them by more than a quarter."""
    least = -(-size // 16) * 16
    return next(r for r in (64, 32, 16) if r == 16 or (r <= most and -(-size // r) * r <= 1.25 * least))


@functools.lru_cache(256)
def _dense_tiles(
    dtype: torch.dtype, inputs: int, results: int, gate: bool, extras: bool, aligned: bool, products: str
) -> list[dict[str, Any]]:  # fmt: skip
    """Of the tiles whose positions have all taps, and of the others. `extras`: a condition or a residual is added,
    whose addresses take registers too."""
    wide = dtype == torch.float32
    positions = 64 if wide else 128
    reduced = _reduced(inputs, 16 if wide and products == "ieee" else 64 if aligned and not wide else 32)
    tiles = []
    widest = 128 >> (gate + wide + (extras and not wide))
    for most, edge in ((widest, 0), (16 if gate else 32, 16)):
        channels = power(results, 16, most)
        # Warps and registers with which the compiler doesn't spill, on any of the architectures.
        warps = 4 if not edge and channels * (2 if gate else 1) <= 32 else 8
        stages = 3 if reduced > 16 else 4
        tiles.append(
            {
                "POSITIONS": positions, "CHANNELS": channels, "REDUCED": reduced, "EDGE": edge, "num_warps": warps,
                "num_stages": stages, "maxnreg": None if edge and (wide or not gate) else 255,
            }
        )  # fmt: skip
    return tiles


def _weight_tiles(dtype: torch.dtype, inputs: int, outputs: int, aligned: bool) -> dict[str, int]:
    wide = dtype == torch.float32
    warps = 4 if (aligned and not wide) or max(inputs, outputs) <= 32 else 8
    return {
        "ROWS": power(outputs, 16, 64), "COLUMNS": power(inputs, 16, 64),
        "POSITIONS": 16 if wide else 64 if aligned else 32, "num_warps": warps, "num_stages": 3,
    }  # fmt: skip


def _line_tiles(channels: int, unit: int) -> dict[str, int]:
    """Of what is read and written once: long in the dimension that is dense in memory."""
    if unit == CHANNEL:
        return {"CHANNELS": power(channels, 1, 64), "POSITIONS": 16, "num_warps": 4}
    return {"CHANNELS": power(channels, 1, 4), "POSITIONS": 256, "num_warps": 4}


def _heavy(x: torch.Tensor, inputs: int, results: int, taps: int) -> bool:
    """Whether the products are many enough to pay for channels that lie side by side. Positions can't be loaded in
    vectors, since the taps shift them; 16-bit ones then can't be copied asynchronously either."""
    return x.element_size() == 2 and inputs >= 64 and results * taps >= 512


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 else _activation_gradient(x, None, None, x, x.shape[1], 0, False, True, False)


def _aligned(x: torch.Tensor) -> bool:
    """Whether every position of a channels-last tensor begins where a vector may be loaded."""
    return x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.stride(2) % 8 == 0 and x.data_ptr() % 16 == 0


def _packed(weight: torch.Tensor, groups: int, reduced: int, turned: bool) -> torch.Tensor:
    """(groups, results, taps, inputs), the inputs rounded up to `reduced` with zeros. Turned: the outputs are the
    inputs."""
    outputs = weight.shape[0]
    if not turned:
        weight = weight.transpose(1, 2)
    elif groups == 1:
        weight = weight.permute(1, 2, 0)
    else:
        weight = weight.unflatten(0, (groups, outputs // groups)).permute(0, 2, 3, 1)
    inputs = weight.shape[-1]
    if inputs % reduced == 0 and inputs:
        return weight.contiguous()
    packed = weight.new_zeros(*weight.shape[:-1], max(1, -(-inputs // reduced)) * reduced)
    packed[..., :inputs] = weight
    return packed


def _dense(
    x: torch.Tensor, weight: torch.Tensor, groups: int, y: torch.Tensor, begin: int, origin: int, dilation: int,
    *, turned: bool = False, clip: bool = False, lengths: torch.Tensor | None = None, state: torch.Tensor | None = None,
    bias: torch.Tensor | None = None, condition: torch.Tensor | None = None, residual: torch.Tensor | None = None,
    saved: torch.Tensor | None = None, activation: int = 0,
) -> None:  # fmt: skip
    """Starts dense_kernel for the results y (B, C, n) at positions begin..begin + n."""
    if not y.numel():
        return
    outputs, channels, taps = weight.shape
    inputs, results = (outputs // groups, channels) if turned else (channels, y.shape[1] // groups)
    products = precision()
    if _heavy(x, inputs, results, taps):
        x = _channels_last(x)
    extras, aligned = condition is not None or residual is not None, _aligned(x)
    whole, edge = _dense_tiles(x.dtype, inputs, results, activation in GATES, extras, aligned, products)
    packed = _packed(weight, groups, whole["REDUCED"], turned)
    (batch, _, time), count, size = x.shape, y.shape[2], whole["POSITIONS"]
    # Tiles at the start that reach before x, and at the end that reach past it; all may, where only a tensor says how
    # long a row is.
    tiles, reach = -(-count // size), origin + (taps - 1) * dilation
    before = min(tiles, max(0, -(-(-origin - begin) // size)))
    last_whole = max(before, tiles if begin + count + reach <= time else max(0, time - reach - begin) // size)
    flags = None
    if state is None and taps > 1:
        blocks = -(-results // whole["CHANNELS"])
        flags = x.new_empty(batch * tiles * groups * blocks, dtype=torch.int32)
    edges = [(edge, 0, before), (edge, last_whole, tiles)]
    if lengths is not None and reach > 0:
        last_whole, edges = tiles, [(edge, 0, tiles)]
    spans = [(whole, before, last_whole) if flags is None else (whole, 0, tiles), *edges]
    shared = (
        x, state, packed, bias, condition, residual, lengths, saved, y, flags,
        *x.stride(), *strides_of(state), *strides_of(condition), *strides_of(residual),
        time, begin, begin + count, origin, dilation, 0 if state is None else -state.shape[2],
    )  # fmt: skip
    constants = {
        "INPUTS": inputs, "RESULTS": results, "GROUPS": groups, "TAPS": taps, "ACTIVATION": activation,
        "TURNED": turned, "CLIP": clip, "X_UNIT": _unit(x), "CONDITION_UNIT": _unit(condition),
        "RESIDUAL_UNIT": _unit(residual), "ALIGNED": aligned, "PRECISION": products, "FLAGGED": whole["CHANNELS"],
    }  # fmt: skip
    with device_of(x):
        for chosen, first, stop in spans:
            if stop > first:
                programs = -(-results // chosen["CHANNELS"]) * groups * (stop - first) * batch
                dense_kernel[(programs,)](*shared, first, stop - first, **constants, **chosen)


def _depthwise(
    x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, begin: int, origin: int, dilation: int,
    *, backward: bool = False, clip: bool = False, lengths: torch.Tensor | None = None,
    state: torch.Tensor | None = None, bias: torch.Tensor | None = None, condition: torch.Tensor | None = None,
    residual: torch.Tensor | None = None, saved: torch.Tensor | None = None, activation: int = 0,
) -> None:  # fmt: skip
    """Starts depthwise_kernel for the results y (B, C, n) at positions begin..begin + n."""
    if not y.numel():
        return
    outputs, _, taps = weight.shape
    multiple = outputs // (y.shape[1] if backward else x.shape[1])
    unit, count = _unit(x), y.shape[2]
    line = _line(x, weight, origin, dilation)
    if line is not None and y.shape == x.shape and begin == 0 and activation not in GATES:
        batch, channels, time = x.shape
        extras = not (state is condition is residual is None)  # whose addresses take registers too
        chosen: dict[str, Any] = {**LINE, **({"maxnreg": 255} if extras else {"maxnreg": 96} if clip else {})}
        line_of, size, wanted = line_kernel, LINE["POSITIONS"], 16 * PROGRAMS
        if line:
            chosen = {**TOEPLITZ, "HEAD": line}
            if extras or lengths is not None or activation or line > 64:
                chosen |= {"ROWS": 16, "maxnreg": 168 if line <= 64 else 255}
            line_of, size, wanted = toeplitz_kernel, chosen["ROWS"] * chosen["BLOCK"], 4 * PROGRAMS
        splits = max(1, min(wanted // channels, batch * -(-time // size)))
        with device_of(x):
            line_of[(channels * splits,)](
                x, state, weight.contiguous(), bias, condition, residual, lengths, saved, y,
                *x.stride()[:2], *strides_of(state), *strides_of(condition), *strides_of(residual),
                batch, time, origin, dilation, 0 if state is None else -state.shape[2], splits,
                RESULTS=channels, TAPS=taps, ACTIVATION=activation, REVERSED=backward, CLIP=clip,
                CONDITION_UNIT=_unit(condition), RESIDUAL_UNIT=_unit(residual), **chosen,
            )  # fmt: skip
        return
    even = unit == TIME and not (begin % 8 or origin % 8 or dilation % 8)
    tiles = _line_tiles(y.shape[1], unit)
    programs = -(-y.shape[1] // tiles["CHANNELS"]) * -(-count // tiles["POSITIONS"]) * y.shape[0]
    with device_of(x):
        depthwise_kernel[(programs,)](
            x, state, weight.contiguous(), bias, condition, residual, lengths, saved, y,
            *strides_of(x), *strides_of(state), *strides_of(condition), *strides_of(residual),
            x.shape[2], begin, begin + count, origin, dilation, 0 if state is None else -state.shape[2],
            RESULTS=y.shape[1], MULTIPLE=multiple, TAPS=taps, ACTIVATION=activation, BACKWARD=backward, CLIP=clip,
            X_UNIT=unit, ALIGNED=_aligned(x), EVEN=even, CONDITION_UNIT=_unit(condition),
            RESIDUAL_UNIT=_unit(residual), **tiles,
        )  # fmt: skip


def _line(x: torch.Tensor, weight: torch.Tensor, origin: int, dilation: int) -> int | None:
    """Whether a depthwise convolution is one of long lines, dense in time: None if not; 0 for the kernels of
    triton_lines; for those of triton_toeplitz, how many inputs more than results a block sees."""
    outputs, _, taps = weight.shape
    time, reach = x.shape[2], (taps - 1) * dilation
    if outputs != x.shape[1] or time < LONG or x.stride(2) != 1:
        return None
    few = taps <= FEW and x.shape[0] * time + reach < 2**30
    head = power(origin % 8 + reach, 16, 256)
    # Products need vectors, which the tiles of rows that begin anywhere can't load, and grow with the head.
    if x.element_size() == 2 and taps > 1 and head <= 128 and not (few and (time % 8 or head > 64)):
        return head
    return 0 if few else None


def _line_gradients(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, lengths: torch.Tensor | None,
    state: torch.Tensor | None, origin: int, dilation: int, head: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Those of the weight and of the bias; head: what `_line` says."""
    (batch, channels, time), taps = x.shape, weight.shape[2]
    grad_weight, grad_bias = weight.new_empty(weight.shape), weight.new_empty(channels)
    if not batch:
        return grad_weight.zero_(), grad_bias.zero_()
    chosen: dict[str, Any] = LINE_WEIGHT
    gradients_of, size, wanted = line_weight_kernel, LINE_WEIGHT["POSITIONS"], max(1, 8 * PROGRAMS // channels)
    if head:
        chosen = {**TOEPLITZ_WEIGHT, "LAGS": power(taps, 2, 128), "HEAD": head}
        if state is not None or head > 64:  # registers for addresses, or for sums
            chosen["maxnreg"] = 255
        gradients_of, size = toeplitz_weight_kernel, TOEPLITZ_WEIGHT["ROWS"] * TOEPLITZ_WEIGHT["BLOCK"]
        wanted = max(1, 2 * PROGRAMS // channels)
    splits = min(wanted, batch * -(-time // size))
    sums, behind = (grad_weight, grad_bias), 0
    if wanted > 1:  # not by the splits, which depend on the time: a dtype is compiled for
        behind = splits * channels * taps
        shares = x.new_empty(behind + splits * channels, dtype=torch.float32)
        sums = shares, shares
    with device_of(x):
        gradients_of[(channels * splits,)](
            grad, x, state, lengths, *sums, *grad.stride()[:2], *x.stride()[:2], *strides_of(state),
            batch, time, origin, dilation, 0 if state is None else -state.shape[2], splits, behind,
            OUTPUTS=channels, TAPS=taps, **chosen,
        )  # fmt: skip
        if behind:
            reduce(sums[0], grad_weight, splits, grad_bias, splits)
    return grad_weight, grad_bias


def causal_conv1d_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None,
    lengths: torch.Tensor | None, initial_state: torch.Tensor | None, condition: torch.Tensor | None,
    dilation: int, groups: int, activation: int, causal: bool, save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    _check("causal_conv1d_forward", x, weight, lengths, initial_state, dilation, groups, activation)
    _check_added(x, weight, bias, residual, condition, activation)
    batch, _, time = x.shape
    outputs, channels, taps = weight.shape
    left, _ = padding(taps, dilation, causal)
    state = initial_state if taps > 1 else None
    gate = activation in GATES
    y = x.new_empty(batch, outputs // 2 if gate else outputs, time)
    apart = gate and groups > 1 and channels > 1  # the halves of the gate come of different groups
    sums = x.new_empty((batch, outputs, time) if save or apart else (0,), dtype=torch.float32)
    bias = None if bias is None else bias.contiguous()
    condition = None if condition is None else condition.expand(-1, -1, time)  # one position stands for all
    if channels == 1:
        _depthwise(
            x, weight, y, 0, -left, dilation, clip=lengths is not None, lengths=lengths, state=state, bias=bias,
            condition=condition, residual=residual, saved=sums if save else None, activation=activation,
        )  # fmt: skip
    elif not apart:
        _dense(
            x, weight, groups, y, 0, -left, dilation, clip=lengths is not None, lengths=lengths, state=state,
            bias=bias, condition=condition, residual=residual, saved=sums if save else None, activation=activation,
        )  # fmt: skip
    else:
        _dense(
            x, weight, groups, sums, 0, -left, dilation, clip=lengths is not None, lengths=lengths, state=state,
            bias=bias, condition=condition,
        )  # fmt: skip
        if y.numel():
            tiles = _line_tiles(y.shape[1], TIME)
            programs = -(-y.shape[1] // tiles["CHANNELS"]) * -(-time // tiles["POSITIONS"]) * batch
            with device_of(x):
                epilogue.finish_kernel[(programs,)](
                    sums, residual, lengths, y, *strides_of(residual), time, RESULTS=y.shape[1], ACTIVATION=activation,
                    RESIDUAL_UNIT=_unit(residual), **tiles,
                )  # fmt: skip
    return y, sums if save or not apart else x.new_empty(0, dtype=torch.float32)


def causal_conv1d_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, saved: torch.Tensor | None,
    lengths: torch.Tensor | None, initial_state: torch.Tensor | None, dilation: int, groups: int, activation: int,
    causal: bool, saved_output: bool, need_x: bool, need_weight: bool, need_bias: bool, need_state: bool,
    need_condition: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    _check("causal_conv1d_backward", x, weight, lengths, initial_state, dilation, groups, activation)
    batch, inputs, time = x.shape
    outputs, channels, taps = weight.shape
    shapes = (batch, outputs // 2 if activation in GATES else outputs, time), (batch, outputs, time)
    fits = grad.shape == shapes[0] and grad.dtype == x.dtype and (saved is not None or not activation)
    if fits and activation:
        assert saved is not None
        fits = saved.shape == shapes[not saved_output] and saved.dtype in TRITON_DTYPES
    if not fits:
        given = tuple(None if t is None else (tuple(t.shape), t.dtype) for t in (grad, saved))
        raise RuntimeError(f"causal_conv1d_backward: the gradient and what is saved don't fit x and weight: {given}")
    left, right = padding(taps, dilation, causal)

    def nothing() -> torch.Tensor:  # no two results of an operator may share memory
        return x.new_empty(0)

    into = None
    depthwise = channels == 1
    heavy = not depthwise and _heavy(x, channels, outputs // groups, taps)
    if activation or need_condition:
        into = _activation_gradient(grad, saved, lengths, x, outputs, activation, saved_output, heavy, need_condition)
        grad = into
    elif heavy:
        grad = _channels_last(grad)
    grad_x = x.new_empty(batch, inputs, time) if need_x else nothing()
    grad_state = nothing()
    if need_state:
        assert initial_state is not None
        grad_state = x.new_empty(initial_state.shape)
    for result, begin in ((grad_x, 0), (grad_state, -grad_state.shape[-1])):
        clip = lengths is not None and begin == 0
        if depthwise and result.dim() == 3:
            _depthwise(grad, weight, result, begin, -right, dilation, backward=True, clip=clip, lengths=lengths)
        elif result.dim() == 3:
            _dense(grad, weight, groups, result, begin, -right, dilation, turned=True, clip=clip, lengths=lengths)
    state = initial_state if taps > 1 else None
    if depthwise and need_weight and time >= LONG and _unit(x) == CHANNEL and grad.stride(2) == 1:
        x = _activation_gradient(x, None, None, x, inputs, 0, False, False, False)  # turned: cheaper than to read so
    head = _line(x, weight, -left, dilation) if depthwise and grad.stride(2) == 1 else None
    if need_weight and head is not None:
        grad_weight, grad_bias = _line_gradients(grad, x, weight, lengths, state, -left, dilation, head)
        grad_bias = grad_bias if need_bias else nothing()
        return grad_x, grad_weight, grad_bias, grad_state, into if into is not None and need_condition else nothing()
    grad_weight, grad_bias = _weight_gradients(
        grad, x, weight, lengths, state, groups, -left, dilation, heavy, need_weight, need_bias
    )
    return grad_x, grad_weight, grad_bias, grad_state, into if into is not None and need_condition else nothing()


def _activation_gradient(
    grad: torch.Tensor, saved: torch.Tensor | None, lengths: torch.Tensor | None, x: torch.Tensor, outputs: int,
    activation: int, from_output: bool, channels_last: bool, returned: bool,
) -> torch.Tensor:  # fmt: skip
    """(B, C_out, T); channels-last where the products want that and nobody else gets it."""
    batch, results, time = grad.shape
    if channels_last and not returned:
        into = x.new_empty(batch, time, outputs).transpose(1, 2)
    else:
        into = x.new_empty(batch, outputs, time)
    if into.numel():
        unit = _unit(grad)
        turned = unit != STRIDED and unit != _unit(into)
        tiles = SQUARE if turned and results >= 64 else _line_tiles(results, min(unit, _unit(into)))
        programs = -(-results // tiles["CHANNELS"]) * -(-time // tiles["POSITIONS"]) * batch
        with device_of(x):
            epilogue.activation_gradient_kernel[(programs,)](
                grad, None if saved is None else saved.contiguous(), lengths, into, *strides_of(grad),
                *strides_of(into), time, RESULTS=results, ACTIVATION=activation, FROM_OUTPUT=from_output,
                GRAD_UNIT=unit, INTO_UNIT=_unit(into), **tiles,
            )  # fmt: skip
    return into


def _splits(batch: int, time: int, tiles: int, positions: int) -> tuple[int, int, int]:
    """Over how many rows of the batch and chunks of the time a sum is split, and the length of a chunk."""
    wanted = max(1, PROGRAMS // tiles)
    rows = min(batch, wanted)
    chunks = max(1, min(wanted // rows, time // (4 * positions)))
    chunk = -(-time // (chunks * positions)) * positions
    return rows, -(-time // chunk), chunk


def _weight_gradients(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, lengths: torch.Tensor | None,
    state: torch.Tensor | None, groups: int, origin: int, dilation: int, heavy: bool, need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Those of the weight and of the bias that are needed; the others are empty."""
    (batch, _, time), (outputs, channels, taps) = x.shape, weight.shape
    grad_weight = weight.new_empty(weight.shape if need_weight else 0)
    grad_bias = weight.new_empty(outputs if need_bias else 0)
    if not (batch and time):
        return grad_weight.zero_(), grad_bias.zero_()
    need_weight, need_bias = grad_weight.numel() > 0, grad_bias.numel() > 0
    if need_weight and heavy:
        x = _channels_last(x)
    unit, of_grad, low = _unit(grad), grad.stride(), 0 if state is None else -state.shape[2]
    bias_splits = bias_programs = bias_rows = bias_chunk = 0
    of_bias = _line_tiles(outputs, unit)
    if need_bias:
        tiles = -(-outputs // of_bias["CHANNELS"])
        bias_rows, chunks, bias_chunk = _splits(batch, time, tiles, of_bias["POSITIONS"])
        bias_splits = bias_rows * chunks
        bias_programs = tiles * bias_splits
    with device_of(x):
        if not need_weight:
            if need_bias:
                sums = x.new_empty(bias_splits * outputs, dtype=torch.float32)
                bias_kernel[(bias_programs,)](
                    grad, lengths, sums, *of_grad, batch, time, bias_chunk, bias_rows, OUTPUTS=outputs, GRAD_UNIT=unit,
                    **of_bias,
                )  # fmt: skip
                reduce(sums, grad_bias, bias_splits)
            return grad_weight, grad_bias
        aligned = _aligned(x) and _aligned(grad)
        constants: dict[str, Any] = {
            "TAPS": taps, "GRAD_UNIT": unit, "X_UNIT": _unit(x), "ALIGNED": aligned,
            "BIAS_CHANNELS": of_bias["CHANNELS"], "BIAS_POSITIONS": of_bias["POSITIONS"],
        }  # fmt: skip
        if channels == 1:
            several, lines = power(taps, 1, 4), _line_tiles(outputs, constants["X_UNIT"])
            lines["POSITIONS"] //= 2
            constants |= {"OUTPUTS": outputs, "MULTIPLE": outputs // groups, "SEVERAL": several, **lines}
            tiles = -(-outputs // lines["CHANNELS"]) * -(-taps // several)
        else:
            blocks = _weight_tiles(x.dtype, channels, outputs // groups, aligned)
            constants |= {
                "INPUTS": channels, "OUTPUTS": outputs // groups, "GROUPS": groups, "PRECISION": precision(), **blocks
            }  # fmt: skip
            tiles = -(-channels // blocks["COLUMNS"]) * -(-(outputs // groups) // blocks["ROWS"]) * taps * groups
        rows, chunks, chunk = _splits(batch, time, tiles, constants["POSITIONS"])
        splits = rows * chunks
        sums = x.new_empty(splits * grad_weight.numel() + bias_splits * outputs, dtype=torch.float32)
        (depthwise_weight_kernel if channels == 1 else dense_weight_kernel)[(tiles * splits + bias_programs,)](
            grad, x, state, lengths, sums, *of_grad, *x.stride(), *strides_of(state),
            batch, time, chunk, rows, origin, dilation, low, splits, bias_chunk, bias_rows, **constants,
        )  # fmt: skip
        reduce(sums, grad_weight, splits, grad_bias if need_bias else None, bias_splits)
    return grad_weight, grad_bias


def _check(
    operator: str, x: torch.Tensor, weight: torch.Tensor, lengths: torch.Tensor | None,
    state: torch.Tensor | None, dilation: int, groups: int, activation: int,
) -> None:  # fmt: skip
    """What a raw call could get wrong about the sizes by which the kernels read."""
    fits = x.dim() == weight.dim() == 3 and min(dilation, groups, weight.shape[2]) >= 1 and 0 <= activation <= 6
    fits = fits and weight.shape[0] % groups == 0 and x.shape[1] == weight.shape[1] * groups
    fits = fits and not (activation in GATES and weight.shape[0] % 2)
    fits = fits and x.dtype == weight.dtype != torch.float64
    fits = fits and (lengths is None or (lengths.shape == x.shape[:1] and lengths.is_contiguous()))
    fits = fits and (lengths is None or lengths.dtype in (torch.int32, torch.int64))
    if fits and state is not None:
        fits = state.shape == (*x.shape[:2], (weight.shape[2] - 1) * dilation) and state.dtype == x.dtype
    if not fits:
        raise RuntimeError(
            f"{operator}: the arguments don't fit together: x {tuple(x.shape)} {x.dtype}, "
            f"weight {tuple(weight.shape)} {weight.dtype}, groups {groups}"
        )


def _check_added(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None,
    condition: torch.Tensor | None, activation: int,
) -> None:  # fmt: skip
    (batch, _, time), outputs = x.shape, weight.shape[0]
    results = outputs // 2 if activation in GATES else outputs
    fits = bias is None or (bias.shape == (outputs,) and bias.dtype == x.dtype)
    fits = fits and (residual is None or (residual.shape == (batch, results, time) and residual.dtype == x.dtype))
    if fits and condition is not None:
        fits = condition.shape in ((batch, outputs, time), (batch, outputs, 1)) and condition.dtype == x.dtype
    if not fits:
        given = tuple(None if t is None else (tuple(t.shape), t.dtype) for t in (bias, residual, condition))
        raise RuntimeError(f"causal_conv1d_forward: bias, residual and condition don't fit x and weight: {given}")
