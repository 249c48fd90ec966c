"""LSTM, GRU and RNN cells in torch's interface, and what they share with the layers over whole sequences."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .. import checks
from ..ops import recurrence as ops
from .layer import Layer

Device = torch.device | str | int | None
Zoneout = float | tuple[float, float]


class _Cell(Layer):
    """What the cells share: one step, T = 1 of the operator."""

    input_size: int
    hidden_size: int
    bias: bool
    layer_norm: bool = False
    zoneout: Zoneout = 0.0
    _cell: str
    _state_names: tuple[str, ...] = ("hx",)

    def __init__(self, like: nn.RNNCellBase, layer_norm: bool, zoneout: Zoneout) -> None:
        super().__init__()
        self.input_size, self.hidden_size, self.bias = like.input_size, like.hidden_size, like.bias
        for key in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            self.register_parameter(key, getattr(like, key))
        self.layer_norm = layer_norm
        self.zoneout = checked_zoneout(type(self).__name__, zoneout, len(self._state_names))
        if layer_norm:
            add_layer_norm(self, "", like.weight_ih)

    def reset_parameters(self) -> None:
        """Draws torch's parameters as torch does; those of layer normalisation become 1 and 0."""
        draw_parameters(self)

    def forward(self, input: torch.Tensor, hx: Any = None) -> Any:
        """One step.

        Args:
            input: (B, I), or (I,) without a batch.
            hx: the state before it, (B, H), or (H,) without a batch; for LSTMCell a pair of these; zeros if absent.

        Returns:
            The state after it, in the layout of hx.

        Raises:
            TypeError, ValueError: an argument is not as above; the message names it.
        """
        weights = parameters_of(self, ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        found = self._plain_step(input, hx, weights)
        if found is not None:
            return tuple(found) if len(found) == 2 else found[0]
        name = type(self).__name__
        checks.tensor(name, "input", input)
        rank = input.dim()
        if rank not in (1, 2):
            raise ValueError(f"{name}: Expected input to be 1D or 2D, got {rank}D instead")
        check_input(name, "input", input, self.input_size, weights[0])
        states: tuple[torch.Tensor | None, ...] = (None,) * len(self._state_names)
        if hx is not None:
            states = given = given_states(name, hx, self._state_names)
            expected = (*input.shape[:-1], self.hidden_size)
            for argument, state in zip(self._state_names, given, strict=True):
                if tuple(state.shape) != expected:
                    raise ValueError(f"{name}: {argument}: Expected hidden size {expected}, got {list(state.shape)}")
                check_kind(name, argument, state, input)
            if rank == 1:
                states = tuple(state.unsqueeze(0) for state in given)
        norm = None
        if self.layer_norm:
            norm = tuple(parameters_of(self, norm_names("", len(states))))
        _, *final = ops.run(
            self._cell,
            input.unsqueeze(1) if rank == 2 else input[None, None],
            *weights,
            *states,
            zoneout=self.zoneout,
            training=self.training,
            layer_norm=norm,
        )
        if rank == 1:
            final = [state if state is None else state.squeeze(0) for state in final]
        return tuple(final) if len(states) == 2 else final[0]

    def _plain_step(self, input: Any, hx: Any, weights: list[Any]) -> list[torch.Tensor] | None:
        """The state after a step that asks for nothing but itself; None where anything is out of the ordinary, which is
        `forward`'s to serve or to refuse. Decoding is such steps: what surrounds them must not outlast them."""
        if self.layer_norm or self.zoneout != 0 or not isinstance(input, torch.Tensor) or input.dim() != 2:
            return None
        pair = len(self._state_names) == 2
        states = (None,) * len(self._state_names) if hx is None else hx if pair else (hx,)
        if not isinstance(states, tuple) or len(states) != len(self._state_names):
            return None
        try:
            return ops.step(self._cell, input, weights, states)
        except RuntimeError:  # the kernel's own checks, which cost less than these in Python
            return None

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        text += "" if self.bias else f", bias={self.bias}"
        nonlinearity = getattr(self, "nonlinearity", "tanh")
        text += "" if nonlinearity == "tanh" else f", nonlinearity={nonlinearity}"
        text += "" if not self.layer_norm else f", layer_norm={self.layer_norm}"
        return text + ("" if self.zoneout == 0 else f", zoneout={self.zoneout}")


class LSTMCell(_Cell):
    """`torch.nn.LSTMCell`: the same arguments, parameters, initialisation and results; not a subclass of it.

    Args:
        input_size, hidden_size, bias, device, dtype: as torch's.
        layer_norm, zoneout: as `LSTM`.

    Parameters: torch's, then under layer_norm ln_ih_weight (4H,), ln_hh_weight (4H,), ln_c_weight (H,), ln_c_bias (H,).

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """

    _cell = "lstm"
    _state_names = ("hx[0]", "hx[1]")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        layer_norm: bool = False,
        zoneout: Zoneout = 0.0,
    ) -> None:
        super().__init__(nn.LSTMCell(input_size, hidden_size, bias, device, dtype), layer_norm, zoneout)


class GRUCell(_Cell):
    """`torch.nn.GRUCell`: the same arguments, parameters, initialisation and results; not a subclass of it.

    Args:
        input_size, hidden_size, bias, device, dtype: as torch's.
        layer_norm, zoneout: as `GRU`.

    Parameters: torch's, then under layer_norm ln_ih_weight (3H,), ln_hh_weight (3H,).

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """

    _cell = "gru"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        layer_norm: bool = False,
        zoneout: float = 0.0,
    ) -> None:
        super().__init__(nn.GRUCell(input_size, hidden_size, bias, device, dtype), layer_norm, zoneout)


class RNNCell(_Cell):
    """`torch.nn.RNNCell`: the same arguments, parameters, initialisation and results; not a subclass of it.

    Args:
        input_size, hidden_size, bias, nonlinearity, device, dtype: as torch's.
        layer_norm, zoneout: as `RNN`.

    Parameters: torch's, then under layer_norm ln_ih_weight (H,), ln_hh_weight (H,).

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        layer_norm: bool = False,
        zoneout: float = 0.0,
    ) -> None:
        checks.choice("RNNCell", "nonlinearity", nonlinearity, ("tanh", "relu"))
        super().__init__(nn.RNNCell(input_size, hidden_size, bias, nonlinearity, device, dtype), layer_norm, zoneout)
        self.nonlinearity = nonlinearity

    @property
    def _cell(self) -> str:  # type: ignore[override]
        return f"rnn_{self.nonlinearity}"


def parameters_of(layer: nn.Module, names: Sequence[str]) -> list[Any]:
    """By name, from the layer's dict of parameters: ten times as fast as the attribute, which is right for what isn't
    there, a parametrised or pruned weight."""
    parameters = layer._parameters
    try:
        return [parameters[name] for name in names]
    except KeyError:
        return [getattr(layer, name) for name in names]


def norm_names(suffix: str, states: int) -> tuple[str, ...]:
    names = (f"ln_ih_weight{suffix}", f"ln_hh_weight{suffix}")
    return (*names, f"ln_c_weight{suffix}", f"ln_c_bias{suffix}") if states == 2 else names


def add_layer_norm(layer: Any, suffix: str, weight_ih: torch.Tensor) -> None:
    names = norm_names(suffix, len(layer._state_names))
    for index, name in enumerate(names):
        size = weight_ih.shape[0] if index < 2 else layer.hidden_size
        fill = torch.zeros if index == 3 else torch.ones
        layer.register_parameter(name, nn.Parameter(fill(size, device=weight_ih.device, dtype=weight_ih.dtype)))


def draw_parameters(layer: Any) -> None:
    bound = layer.hidden_size**-0.5
    for name, parameter in layer.named_parameters():
        if not name.startswith("ln_"):
            nn.init.uniform_(parameter, -bound, bound)
        elif name.startswith("ln_c_bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.ones_(parameter)


def checked_zoneout(name: str, zoneout: Any, states: int) -> Zoneout:
    """The option, checked: p, or for an LSTM (p of h, p of c)."""
    pair = isinstance(zoneout, (tuple, list))
    if pair and (states != 2 or len(zoneout) != 2):
        checks.wrong_value(name, "zoneout", "p or (p of h, p of c)" if states == 2 else "one probability", zoneout)
    for p in zoneout if pair else (zoneout,):
        checks.probability(name, "zoneout", p)
    return tuple(zoneout) if pair else zoneout


def check_input(name: str, argument: str, value: torch.Tensor, width: int, weight: torch.Tensor) -> None:
    if value.dtype != weight.dtype and not checks.autocasts(value):
        raise ValueError(
            f"{name}: {argument} dtype ({value.dtype}) does not match weight dtype ({weight.dtype}). "
            f"Convert input: input.to({weight.dtype}), or convert model: model.to({value.dtype})"
        )
    if value.shape[-1] != width:
        raise ValueError(
            f"{name}: {argument}.size(-1) must be equal to input_size. Expected {width}, got {value.shape[-1]}"
        )


def given_states(name: str, hx: Any, names: tuple[str, ...]) -> tuple[torch.Tensor, ...]:
    """hx as a tuple of tensors, one for each of the names."""
    if len(names) == 2 and not (isinstance(hx, (tuple, list)) and len(hx) == 2):
        what = f"{type(hx).__name__} of {len(hx)}" if isinstance(hx, (tuple, list)) else type(hx).__name__
        checks.wrong_type(name, "hx", "a pair of tensors (h, c)", what)
    given = tuple(hx) if len(names) == 2 else (hx,)
    for argument, state in zip(names, given, strict=True):
        checks.tensor(name, argument, state)
    return given


def check_kind(name: str, argument: str, state: torch.Tensor, x: torch.Tensor) -> None:
    if state.dtype != x.dtype and not checks.autocasts(x):
        checks.wrong_type(name, argument, f"{x.dtype} like input", state.dtype)
    checks.beside(name, argument, state, x, "input")
