"""Layers."""

from .additive_attention import AdditiveAttention, AttentionPool, LuongAttention
from .attention import MultiheadAttention
from .cells import GRUCell, LSTMCell, RNNCell
from .convolution import CausalConv1d, GatedCausalConv1d, TCNBlock, TCNStack, WaveNetStack
from .positions import LearnedPositions, RotaryPositions, SinusoidalPositions
from .recurrence import GRU, LSTM, RNN
from .state import AttentionKeys, ConvStackState, ConvState, KVCache

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "AdditiveAttention",
    "AttentionKeys",
    "AttentionPool",
    "CausalConv1d",
    "ConvStackState",
    "ConvState",
    "GRUCell",
    "GatedCausalConv1d",
    "KVCache",
    "LSTMCell",
    "LearnedPositions",
    "LuongAttention",
    "MultiheadAttention",
    "RNNCell",
    "RotaryPositions",
    "SinusoidalPositions",
    "TCNBlock",
    "TCNStack",
    "WaveNetStack",
]
