"""Layers."""

from .convolution import CausalConv1d, GatedCausalConv1d, WaveNetStack
from .state import ConvStackState, ConvState

__all__ = ["CausalConv1d", "ConvStackState", "ConvState", "GatedCausalConv1d", "WaveNetStack"]
