"""What users write without this package, in plain PyTorch: the rivals of the benchmarks."""

import contextlib
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import flex_attention


def padded_conv1d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, dilation: int = 1, groups: int = 1
) -> torch.Tensor:
    """Causal convolution by padding the past: x (B, C_in, T) -> (B, C_out, T)."""
    padding = (weight.shape[2] - 1) * dilation
    return F.conv1d(F.pad(x, (padding, 0)), weight, bias, dilation=dilation, groups=groups)


def chomped_conv1d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, dilation: int = 1, groups: int = 1
) -> torch.Tensor:
    """Causal convolution by padding both sides and cutting the future off, as the TCN's authors do."""
    padding = (weight.shape[2] - 1) * dilation
    y = F.conv1d(x, weight, bias, padding=padding, dilation=dilation, groups=groups)
    return y[..., : x.shape[2]].contiguous()


class _DeterministicConv1d(torch.autograd.Function):
    """conv1d whose forward and backward both ask cuDNN for deterministic algorithms: its flag is read in each."""

    @staticmethod
    def forward(ctx, x, weight, bias, dilation, groups):
        ctx.save_for_backward(x, weight)
        ctx.options = dilation, groups
        with _deterministic_cudnn():
            return F.conv1d(x, weight, bias, dilation=dilation, groups=groups)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        dilation, groups = ctx.options
        sizes = ([weight.shape[0]], [1], [0], [dilation], False, [0], groups, [True, True, True])
        with _deterministic_cudnn():
            grads = torch.ops.aten.convolution_backward(grad, x, weight, *sizes)
        return (*grads, None, None)


def _deterministic_cudnn() -> contextlib.AbstractContextManager[None]:
    cudnn = torch.backends.cudnn
    return cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=cudnn.allow_tf32)


def deterministic_conv1d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dilation: int = 1, groups: int = 1
) -> torch.Tensor:
    """padded_conv1d by cuDNN's deterministic algorithms."""
    padding = (weight.shape[2] - 1) * dilation
    return _DeterministicConv1d.apply(F.pad(x, (padding, 0)), weight, bias, dilation, groups)


def cell_loop(kind: str, x: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """A recurrent layer as a loop over time of its equations: x (B, T, I) -> (B, T, H), with the weights of torch's
    layer."""
    weight_hh, bias_hh = module.weight_hh_l0, module.bias_hh_l0
    assert isinstance(weight_hh, torch.Tensor)
    entering = F.linear(x, module.weight_ih_l0, module.bias_ih_l0)  # type: ignore[arg-type]  # (B, T, gates H)
    hidden = x.new_zeros(x.shape[0], weight_hh.shape[1])
    cell, outputs = hidden, []
    for gates in entering.unbind(1):
        recurrent = F.linear(hidden, weight_hh, bias_hh)  # type: ignore[arg-type]
        if kind == "LSTM":
            i, f, g, o = (gates + recurrent).chunk(4, 1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
        elif kind == "GRU":
            (r, z, n), (r_h, z_h, n_h) = gates.chunk(3, 1), recurrent.chunk(3, 1)
            update = (z + z_h).sigmoid()
            new = (n + (r + r_h).sigmoid() * n_h).tanh()
            hidden = new + update * (hidden - new)
        else:
            hidden = (gates + recurrent).tanh()
        outputs.append(hidden)
    return torch.stack(outputs, 1)


def layer_norm_lstm_loop(
    x: torch.Tensor,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    bias: torch.Tensor,
    ln_ih: torch.Tensor,
    ln_hh: torch.Tensor,
    ln_c: torch.Tensor,
    ln_c_bias: torch.Tensor,
) -> torch.Tensor:
    """Layer-normalised LSTM as a loop over time: x (B, T, I) -> (B, T, H). `bias` is the sum of both biases."""
    hidden = x.new_zeros(x.shape[0], weight_hh.shape[1])
    cell, outputs = hidden, []
    for x_t in x.unbind(1):
        gates = F.layer_norm(x_t @ weight_ih.t(), ln_ih.shape, ln_ih)
        gates = gates + F.layer_norm(hidden @ weight_hh.t(), ln_hh.shape, ln_hh) + bias
        i, f, g, o = gates.chunk(4, 1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * F.layer_norm(cell, ln_c.shape, ln_c, ln_c_bias).tanh()
        outputs.append(hidden)
    return torch.stack(outputs, 1)


def naive_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(Q K^T / sqrt(D) + bias) V with the matrix of scores written out; query (B, H, T, D)."""
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    return (scores if bias is None else scores + bias).softmax(-1) @ value


def varlen_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, longest: int, causal: bool
) -> torch.Tensor:
    """torch's attention of packed sequences, (T of all, H, D); on a GPU, in 16 bits."""
    from torch.nn.attention.varlen import varlen_attn

    named: dict[str, Any] = {"window_size": (-1, 0 if causal else -1)}
    if "is_causal" in inspect.signature(varlen_attn).parameters:
        named = {"is_causal": causal}
    return varlen_attn(query, key, value, starts, starts, longest, longest, **named)  # type: ignore[return-value]


@functools.cache
def compiled_flex_attention() -> Callable[..., torch.Tensor]:
    """torch's FlexAttention, which is its kernel only when compiled."""
    return torch.compile(flex_attention)  # type: ignore[return-value]


def biased_score(bias: torch.Tensor) -> Callable[..., torch.Tensor]:
    """FlexAttention's way to add a bias (1, H, T, S) to scores."""

    def modified(
        score: torch.Tensor, batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        return score + bias[0, head, query, key]

    return modified


def additive_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, weight: torch.Tensor, hidden: torch.Tensor
) -> torch.Tensor:
    """Bahdanau's attention with the (B, T, S, A) tensor written out; `hidden` (B, 1, S) is True where a key is
    absent."""
    scores = torch.tanh(query[:, :, None] + key[:, None]) @ weight
    return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ value


def attention_pool(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, context: torch.Tensor, hidden: torch.Tensor
) -> torch.Tensor:
    """Hierarchical attention's pooling; `hidden` (B, T) is True where a position is absent."""
    scores = torch.tanh(F.linear(x, weight, bias)) @ context
    return (scores.masked_fill(hidden, float("-inf")).softmax(-1)[:, None] @ x)[:, 0]


class RingWaveNet:
    """Step-by-step WaveNet decoding with a ring buffer a layer; weights of `s2s_kernels.nn.WaveNetStack`, K = 2."""

    def __init__(self, stack: nn.Module, batch: int) -> None:
        weights = dict(stack.named_parameters())
        self.dilations: tuple[int, ...] = stack.dilations  # type: ignore[assignment]
        self.channels = weights["conv.0.weight"].shape[1]
        layers = range(len(self.dilations))
        # Both taps as one matrix, the old one first.
        self.taps = [weights[f"conv.{i}.weight"].permute(2, 1, 0).reshape(2 * self.channels, -1) for i in layers]
        self.bias = [weights[f"conv.{i}.bias"] for i in layers]
        self.out = [weights[f"out.{i}.weight"][..., 0].t() for i in layers]
        self.out_bias = [weights[f"out.{i}.bias"] for i in layers]
        self.rings = [self.bias[0].new_zeros(d, batch, self.channels) for d in self.dilations]
        self.position = 0

    def step(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, C) -> the sum of the skip outputs (B, S)."""
        skip: torch.Tensor | float = 0.0
        for index, dilation in enumerate(self.dilations):
            slot = self.position % dilation
            old = self.rings[index][slot].clone()
            self.rings[index][slot] = x
            a, b = torch.addmm(self.bias[index], torch.cat([old, x], 1), self.taps[index]).chunk(2, 1)
            both = torch.addmm(self.out_bias[index], a.tanh() * b.sigmoid(), self.out[index])
            x, skip = x + both[:, : self.channels], skip + both[:, self.channels :]
        self.position += 1
        assert isinstance(skip, torch.Tensor)
        return skip
