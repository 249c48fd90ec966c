"""LSTM, GRU and RNN over whole sequences: torch's interface to this package's operators."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from .. import checks
from ..ops.recurrence.reference import diagonal_blocks
from ..ops.recurrence.stack import States, stack
from .cells import (
    Device,
    Zoneout,
    add_layer_norm,
    check_input,
    check_kind,
    checked_zoneout,
    draw_parameters,
    given_states,
    norm_names,
    parameters_of,
)
from .layer import Layer

_OF_TORCH = (
    "mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size",
)  # fmt: skip


class _Recurrent(Layer):
    """What LSTM, GRU and RNN share.

    Not a subclass of torch's: torch.compile refuses to trace those. `patch` makes an instance of torch's class one of
    these, so whatever torch's constructor doesn't set has a default here.
    """

    mode: str
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int = 0
    layer_norm: bool = False
    zoneout: Zoneout = 0.0
    recurrent_dropout: float = 0.0
    weight_dropout: float = 0.0
    heads: int = 1
    _all_weights: list[list[str]]
    _flat_weights_names: list[str]
    _state_names: tuple[str, ...] = ("hx",)

    def __init__(
        self,
        like: nn.RNNBase,
        layer_norm: bool,
        zoneout: Zoneout,
        recurrent_dropout: float,
        weight_dropout: float,
        heads: int,
    ) -> None:
        """`like` is torch's layer: it has checked the arguments and drawn the weights, so one seed gives the same ones
        here and there."""
        super().__init__()
        name = type(self).__name__
        for attribute in _OF_TORCH:
            setattr(self, attribute, getattr(like, attribute))
        self._all_weights, self._flat_weights_names = like._all_weights, like._flat_weights_names
        self.heads = _checked_heads(name, heads, self.hidden_size, self.proj_size)
        for key, parameter in like.named_parameters():
            if heads > 1 and key.startswith("weight_hh"):
                parameter = nn.Parameter(
                    diagonal_blocks(parameter.detach(), heads, parameter.shape[0] // like.hidden_size)
                )
            self.register_parameter(key, parameter)
        self.layer_norm = layer_norm
        self.zoneout = checked_zoneout(name, zoneout, len(self._state_names))
        checks.probability(name, "recurrent_dropout", recurrent_dropout)
        checks.probability(name, "weight_dropout", weight_dropout)
        self.recurrent_dropout, self.weight_dropout = recurrent_dropout, weight_dropout
        if layer_norm:
            for names in self._all_weights:
                add_layer_norm(self, names[0].removeprefix("weight_ih"), getattr(self, names[0]))

    def reset_parameters(self) -> None:
        """Draws torch's parameters as torch does; those of layer normalisation become 1 and 0."""
        draw_parameters(self)

    def flatten_parameters(self) -> None:
        """Does nothing: no kernel here needs its weights in one block."""

    @property
    def all_weights(self) -> list[list[torch.Tensor]]:
        """torch's parameters, a list for each direction of each layer."""
        return [[getattr(self, name) for name in names] for names in self._all_weights]

    @property
    def _flat_weights(self) -> list[torch.Tensor]:
        return [getattr(self, name) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: Sequence[torch.Tensor]) -> None:
        for name, weight in zip(self._flat_weights_names, weights, strict=True):
            setattr(self, name, weight)

    def forward(
        self,
        input: Any,
        hx: Any = None,
        *,
        lengths: torch.Tensor | None = None,
        reset: torch.Tensor | None = None,
    ) -> Any:
        """Runs all layers over a sequence.

        Args:
            input: (T, B, I), or (B, T, I) if batch_first; (T, I) without a batch; or a PackedSequence.
            hx: the state before the sequence, (D num_layers, B, H_out), for LSTM a pair with (D num_layers, B, H);
                without their B for an input without one; zeros if absent. D is 2 if bidirectional, else 1.
            lengths: (B,) int32 or int64 (no dimension for an input without a batch). Positions at or past it never
                matter; the result is 0 there.
            reset: bool, shaped as the input without its last dimension; no state crosses into a position where it is
                True, in either direction.

        Returns:
            output, in the layout of the input, D H_out wide, and the state after the sequence in the layout of hx.

        Raises:
            TypeError, ValueError: an argument is not as above; the message names it.
        """
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, lengths, reset)
        name = type(self).__name__
        checks.tensor(name, "input", input)
        rank = input.dim()
        if rank not in (2, 3):
            raise ValueError(f"{name}: Expected input to be 2D or 3D, got {rank}D instead")
        batched = rank == 3
        time_first = batched and not self.batch_first
        x = input.transpose(0, 1) if time_first else input if batched else input.unsqueeze(0)
        weights = self._weights()
        check_input(name, "input", input, self.input_size, weights[0])
        states = self._states(name, hx, x, x.shape[0] if batched else None)
        if lengths is not None or reset is not None:
            lengths, reset = _positions(name, lengths, reset, input, batched, time_first)
        output, finals = self._run(x, weights, states, lengths, reset, time_first, False)
        if not batched:
            output, finals = output.squeeze(0), tuple(state.squeeze(1) for state in finals)
        return output, finals if len(finals) == 2 else finals[0]

    def _forward_packed(self, packed: PackedSequence, hx: Any, lengths: Any, reset: Any) -> Any:
        name = type(self).__name__
        for argument, value in (("lengths", lengths), ("reset", reset)):
            if value is not None:
                checks.wrong_value(name, argument, "absent beside a PackedSequence", "one")
        data, batch_sizes, sorted_indices, unsorted_indices = packed
        if data.dim() != 2:
            raise ValueError(f"{name}: input.data must have 2 dimensions, got {data.dim()}")
        if checks.readable(batch_sizes):
            if (batch_sizes[1:] > batch_sizes[:-1]).any():
                checks.wrong_value(name, "input.batch_sizes", "in descending order", batch_sizes.tolist())
            if data.shape[0] != int(batch_sizes.sum()):
                expected = f"of {int(batch_sizes.sum())} rows, the sum of batch_sizes"
                checks.wrong_value(name, "input.data", expected, data.shape[0])
        weights = self._weights()
        check_input(name, "input.data", data, self.input_size, weights[0])
        batch = int(batch_sizes[0])
        lengths = (batch_sizes > torch.arange(batch).unsqueeze(1)).sum(1)
        states = self._states(name, hx, data, batch)
        if sorted_indices is not None:
            states = tuple(state if state is None else state.index_select(1, sorted_indices) for state in states)
        data, finals = self._run(data, weights, states, lengths, None, False, True)
        if unsorted_indices is not None:
            finals = tuple(state.index_select(1, unsorted_indices) for state in finals)
        result = PackedSequence(data, batch_sizes, sorted_indices, unsorted_indices)
        return result, finals if len(finals) == 2 else finals[0]

    def _weights(self) -> list[torch.Tensor]:
        """Those of each direction of each layer, one after another: torch's, then those of layer normalisation."""
        if not self.layer_norm:
            return parameters_of(self, self._flat_weights_names)
        states = len(self._state_names)
        return parameters_of(
            self,
            [
                name
                for names in self._all_weights
                for name in (*names, *norm_names(names[0].removeprefix("weight_ih"), states))
            ],
        )

    def _states(self, name: str, hx: Any, x: torch.Tensor, batch: int | None) -> States:
        """The given state with a batch dimension, checked; None where there is none. batch: None for an input without
        one."""
        if hx is None:
            return (None,) * len(self._state_names)
        given = given_states(name, hx, self._state_names)
        rows = self.num_layers * (2 if self.bidirectional else 1)
        widths = (self.proj_size or self.hidden_size, self.hidden_size)
        for argument, state, width in zip(self._state_names, given, widths, strict=False):
            rank, kind = (2, "unbatched 2-D") if batch is None else (3, "batched 3-D")
            if state.dim() != rank:
                raise ValueError(
                    f"{name}: For {kind} input, {argument} should also be {rank}-D but got {state.dim()}-D tensor"
                )
            expected = (rows, width) if batch is None else (rows, batch, width)
            if tuple(state.shape) != expected:
                raise ValueError(f"{name}: {argument}: Expected hidden size {expected}, got {list(state.shape)}")
            check_kind(name, argument, state, x)
        return tuple(state.unsqueeze(1) for state in given) if batch is None else given

    def _run(
        self,
        x: torch.Tensor,
        weights: list[torch.Tensor],
        states: States,
        lengths: torch.Tensor | None,
        reset: torch.Tensor | None,
        time_first: bool,
        packed: bool,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        return stack(
            self.mode.lower(),
            x,
            weights,
            states,
            directions=2 if self.bidirectional else 1,
            bias=self.bias,
            projected=self.proj_size > 0,
            normed=self.layer_norm,
            lengths=lengths,
            reset=reset,
            dropout=self.dropout,
            recurrent_dropout=self.recurrent_dropout,
            weight_dropout=self.weight_dropout,
            zoneout=self.zoneout,
            training=self.training,
            time_first=time_first,
            packed=packed,
        )

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        for attribute, default in (
            ("proj_size", 0), ("num_layers", 1), ("bias", True), ("batch_first", False), ("dropout", 0),
            ("bidirectional", False), ("layer_norm", False), ("zoneout", 0), ("recurrent_dropout", 0),
            ("weight_dropout", 0), ("heads", 1),
        ):  # fmt: skip
            value = getattr(self, attribute)
            text += "" if value == default else f", {attribute}={value}"
        return text


class LSTM(_Recurrent):
    """`torch.nn.LSTM`: the same arguments, parameters, initialisation and results; not a subclass of it.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype: as
            torch's.
        layer_norm: normalises both products and the cell under its tanh (Ba et al. 2016).
        zoneout: p, or (p of h, p of c): in training each unit keeps its previous value with that probability, in
            evaluation the expectation (Krueger et al. 2017).
        recurrent_dropout: probability of dropping a unit of h in the recurrent product, one mask a sequence (Gal and
            Ghahramani 2016).
        weight_dropout: probability of dropping an element of weight_hh, one mask a call (Merity et al. 2018).
        heads: a divisor of hidden_size, and of proj_size: the recurrent weights are that many blocks on a diagonal, and
            with more than one weight_hh_l0 is (heads, 4H / heads, H_out / heads), as `s2s_kernels.lstm` takes it. Drawn
            as torch draws the matrix, whose other elements are 0.

    Parameters: torch's, then under layer_norm ln_ih_weight_l0 (4H,), ln_hh_weight_l0 (4H,), ln_c_weight_l0 (H,),
    ln_c_bias_l0 (H,), and so on for each layer and, with the suffix _reverse, direction.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """

    _state_names = ("hx[0]", "hx[1]")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        layer_norm: bool = False,
        zoneout: Zoneout = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        heads: int = 1,
    ) -> None:
        like = nn.LSTM(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype
        )
        super().__init__(like, layer_norm, zoneout, recurrent_dropout, weight_dropout, heads)


class GRU(_Recurrent):
    """`torch.nn.GRU`: the same arguments, parameters, initialisation and results; not a subclass of it.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as torch's.
        layer_norm, recurrent_dropout, weight_dropout, heads: as `LSTM`; layer normalisation is of the products only.
        zoneout: p, as `LSTM`.

    Parameters: torch's, then under layer_norm ln_ih_weight_l0 (3H,), ln_hh_weight_l0 (3H,), and so on.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        layer_norm: bool = False,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        heads: int = 1,
        **unsupported: Any,
    ) -> None:
        _refuse("GRU", unsupported)
        like = nn.GRU(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device=device, dtype=dtype
        )
        super().__init__(like, layer_norm, zoneout, recurrent_dropout, weight_dropout, heads)


class RNN(_Recurrent):
    """`torch.nn.RNN`: the same arguments, parameters, initialisation and results; not a subclass of it.

    Args:
        input_size, hidden_size, num_layers, nonlinearity, bias, batch_first, dropout, bidirectional, device, dtype: as
            torch's.
        layer_norm, zoneout, recurrent_dropout, weight_dropout, heads: as `GRU`.

    Parameters: torch's, then under layer_norm ln_ih_weight_l0 (H,), ln_hh_weight_l0 (H,), and so on.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        layer_norm: bool = False,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        heads: int = 1,
        **unsupported: Any,
    ) -> None:
        _refuse("RNN", unsupported)
        like = nn.RNN(
            input_size, hidden_size, num_layers, nonlinearity, bias, batch_first, dropout, bidirectional,
            device=device, dtype=dtype,
        )  # fmt: skip
        super().__init__(like, layer_norm, zoneout, recurrent_dropout, weight_dropout, heads)
        self.nonlinearity = nonlinearity


def _checked_heads(name: str, heads: Any, hidden: int, projection: int) -> int:
    if not isinstance(heads, int) or isinstance(heads, bool):
        checks.wrong_type(name, "heads", "an integer", type(heads).__name__)
    if heads < 1 or hidden % heads or projection % heads:
        given = f"{hidden} and proj_size {projection}" if projection else f"{hidden}"
        checks.wrong_value(name, "heads", f"a divisor of hidden_size {given}", heads)
    return heads


def _refuse(name: str, arguments: dict[str, Any]) -> None:
    if "proj_size" in arguments:
        raise ValueError(f"{name}: proj_size argument is only supported for LSTM, not RNN or GRU")
    for argument in arguments:
        raise TypeError(f"{name}.__init__() got an unexpected keyword argument {argument!r}")


def _positions(
    name: str, lengths: Any, reset: Any, data: torch.Tensor, batched: bool, time_first: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """lengths (B,) and reset (B, T) as the operator takes them, from the layout of the input."""
    if lengths is not None and not batched:
        checks.tensor(name, "lengths", lengths)
        if lengths.dim() != 0:
            checks.wrong_value(name, "lengths", "() for an input without a batch", tuple(lengths.shape))
        lengths = lengths.unsqueeze(0)
    if reset is not None:
        checks.boolean(name, "reset", reset, data, "input")
        if reset.shape != data.shape[:-1]:
            expected = f"{tuple(data.shape[:-1])} like input"
            checks.wrong_value(name, "reset", expected, tuple(reset.shape))
        reset = reset.transpose(0, 1) if time_first else reset if batched else reset.unsqueeze(0)
    time = data.shape[0] if time_first or not batched else data.shape[1]
    batch = 1 if not batched else data.shape[1] if time_first else data.shape[0]
    return checks.lengths(name, "lengths", lengths, data, batch, time), reset
