"""What backward of a recurrence on CUDA tensors makes of an engine's results: products and sums over all positions."""

import functools

import torch

from .autograd import CELLS, STREAM_WEIGHT
from .device_call import Call, dropout
from .device_heads import together
from .products import product
from .reference import EPS, GATES
from .triton_rows import dropped, recurrent_input, unprojected

Optional = torch.Tensor | None

# The gradients by their places in the operator's `needs`, as `Gradients` names them.
WANTED = (
    "x", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "h0", "c0", "weight_hr", "mask", "norm_ih", "norm_hh",
    "norm_c", "norm_b",
)  # fmt: skip


class Gradients:
    """Each is made when it is first read, float32 or x's dtype."""

    def __init__(
        self, call: Call, x: torch.Tensor, weight_ih: torch.Tensor, gates: Optional, extra: Optional,
        states: torch.Tensor, weight_dropout: float, grad_inputs: torch.Tensor, grad_recurrent: torch.Tensor,
        h0: torch.Tensor, c0: Optional, grad_projected: Optional, norm_c: Optional, norm_b: Optional,
    ) -> None:  # fmt: skip
        self._call, self._x, self._weight_ih, self._weight_dropout = call, x, weight_ih, weight_dropout
        self._gates, self._extra, self._states = gates, extra, states
        self._grad_recurrent, self._grad_projected = grad_recurrent, grad_projected
        self._grad_inputs = self._of_all_heads(grad_inputs)
        self.h0, self.c0 = (v if v is None or call.heads == 1 else together(v, call.heads) for v in (h0, c0))
        self.norm_c, self.norm_b = norm_c, norm_b

    def _of_all_heads(self, grad: torch.Tensor) -> torch.Tensor:
        """Of the gates, from an engine's rows."""
        heads, gates = self._call.heads, GATES[CELLS[self._call.options["cell"]]]
        return grad if heads == 1 else together(grad, heads, gates)

    @functools.cached_property
    def x(self) -> torch.Tensor:
        return product(self._input_product[0], self._weight_ih).view(self._x.shape)

    @functools.cached_property
    def weight_ih(self) -> torch.Tensor:
        return product(self._input_product[0].t(), self._inputs)

    @functools.cached_property
    def weight_hh(self) -> torch.Tensor:
        call = self._call
        seen = recurrent_input(
            self._states, call.h0, call.mask, call.lengths, call.reset, call.options["reverse"], self._x.dtype
        )
        seen = seen.flatten(0, 1)
        if call.apart:
            pairs = zip(self._recurrent_product.chunk(call.heads), seen.chunk(call.heads), strict=True)
            return torch.stack([product(grad.t(), before) for grad, before in pairs])
        grad = product(self._recurrent_product.t(), seen)
        if self._weight_dropout > 0:
            assert call.seed is not None
            grad = dropped(grad, call.seed, *dropout(self._weight_dropout), STREAM_WEIGHT)
        return grad

    @functools.cached_property
    def weight_hr(self) -> torch.Tensor:
        call = self._call
        assert self._gates is not None and self._extra is not None and self._grad_projected is not None
        cells = unprojected(
            self._gates, self._extra, call.c0, call.norm_c, call.norm_b, call.lengths, call.reset,
            call.options["reverse"], self._x.dtype,
        )  # fmt: skip
        return product(self._grad_projected.to(self._x.dtype).flatten(0, 1).t(), cells.flatten(0, 1))

    @functools.cached_property
    def bias_ih(self) -> torch.Tensor:
        return self._grad_inputs.sum((0, 1))

    @functools.cached_property
    def bias_hh(self) -> torch.Tensor:
        if CELLS[self._call.options["cell"]] == "gru":
            return self._recurrent_sum.sum((0, 1))
        # No two results of an operator may be one tensor; those of 16 bits are made of this one by one.
        return self.bias_ih.clone() if self._x.dtype == torch.float32 else self.bias_ih

    @functools.cached_property
    def mask(self) -> torch.Tensor:
        call = self._call
        if call.apart:
            pairs = zip(self._recurrent_product.chunk(call.heads), call.weight_hh, strict=True)
            through = torch.cat([product(grad, weight) for grad, weight in pairs])
        else:
            through = product(self._recurrent_product, call.weight_hh)
        through = through.view(self._states.shape)
        seen = recurrent_input(
            self._states, call.h0, None, call.lengths, call.reset, call.options["reverse"], torch.float32
        )  # fmt: skip
        grad = (through * seen).sum(1)
        return grad if call.heads == 1 else together(grad, call.heads)

    @functools.cached_property
    def norm_ih(self) -> torch.Tensor:
        weight = self._input_product[1]
        assert weight is not None
        return weight

    @functools.cached_property
    def norm_hh(self) -> torch.Tensor:
        call = self._call
        seen = recurrent_input(
            self._states, call.h0, call.mask, call.lengths, call.reset, call.options["reverse"], self._x.dtype
        )
        sums = product(seen.flatten(0, 1), call.weight_hh.t())
        normal = torch.nn.functional.layer_norm(sums, sums.shape[1:], eps=EPS)
        return (self._recurrent_sum.flatten(0, 1) * normal).sum(0)

    @functools.cached_property
    def _inputs(self) -> torch.Tensor:
        """x, a row a position, without what is past a length: a NaN would outlast a gradient of 0."""
        present = None if self._call.packing is not None else self._call.present()
        x = self._x if present is None else torch.where(present, self._x, 0)
        return x.flatten(0, -2)

    @functools.cached_property
    def _input_product(self) -> tuple[torch.Tensor, Optional]:
        """Of W_ih x, a row a position, in x's dtype, and of the weight that normalises it."""
        grad = self._call.packed(self._grad_inputs)
        assert grad is not None
        grad, weight, call = grad.flatten(0, -2), None, self._call
        if call.norm_ih is not None and grad.numel():
            sums = product(self._inputs, self._weight_ih.t())
            _, mean, scale = torch.native_layer_norm(sums, sums.shape[1:], None, None, EPS)
            grad, weight, _ = torch.ops.aten.native_layer_norm_backward(
                grad, sums, sums.shape[1:], mean, scale, call.norm_ih, None, [True, True, False]
            )
        elif call.norm_ih is not None:
            weight = torch.zeros_like(call.norm_ih)
        return grad.to(self._x.dtype), weight

    @functools.cached_property
    def _recurrent_product(self) -> torch.Tensor:
        """Of W_hh h, a row a position, in x's dtype."""
        if self._grad_recurrent is self._grad_inputs and self._call.norm_ih is None and self._call.packing is None:
            return self._input_product[0]
        return self._grad_recurrent.to(self._x.dtype).flatten(0, 1)

    @functools.cached_property
    def _recurrent_sum(self) -> torch.Tensor:
        """Of what the recurrent part adds to the gates, its product after layer normalisation and b_hh."""
        call = self._call
        if CELLS[call.options["cell"]] != "gru":
            return self._grad_inputs
        if call.norm_hh is None:
            return self._of_all_heads(self._grad_recurrent)
        assert self._gates is not None
        units = call.sizes.units
        present, r = call.present(), self._gates[..., :units]
        r = r if present is None else torch.where(present, r, 0)
        return torch.cat([self._grad_inputs[..., : 2 * units], self._grad_inputs[..., 2 * units :] * r], 2)
