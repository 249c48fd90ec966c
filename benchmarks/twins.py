"""The language models of `s2s_kernels.models` rebuilt from torch's own layers: their rivals."""

import torch
import torch.nn.functional as F
from torch import nn

from s2s_kernels.models.transformer import TransformerBlock
from s2s_kernels.nn import TCNBlock

from .peers import padded_conv1d


class TorchTCNBlock(TCNBlock):
    """The TCN's block from `F.pad` and `F.conv1d`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = x
        for conv in (self.conv1, self.conv2):
            hidden = self.dropout(F.relu(padded_conv1d(hidden, conv.weight, conv.bias, conv.dilation)))
        match = self.match
        return F.relu(hidden + (x if isinstance(match, nn.Identity) else F.conv1d(x, match.weight, match.bias)))


class TorchTransformerBlock(TransformerBlock):
    """The Transformer's block with torch's attention."""

    @staticmethod
    def mix(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout_p: float) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p, is_causal=True)


def from_built_ins(model: nn.Module) -> nn.Module:
    """Rebuilds a freshly made language model of `s2s_kernels.models` in place, from torch's own layers: the same
    parameters under the same names."""
    for name, module in list(model.named_modules()):
        if type(module) is TCNBlock:
            module.__class__ = TorchTCNBlock
        elif type(module) is TransformerBlock:
            module.__class__ = TorchTransformerBlock
        elif name == "lstm":
            theirs = nn.LSTM(module.input_size, module.hidden_size, module.num_layers, batch_first=True)
            theirs.load_state_dict(module.state_dict(), strict=True)
            model.lstm = theirs
    return model
