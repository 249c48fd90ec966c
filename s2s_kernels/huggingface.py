"""Models of the `transformers` library on this package's attention. Needs it: pip install s2s_kernels[transformers].

s2s_kernels.huggingface.register()
model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="s2s")
"""

from typing import Any

import torch

from .ops.attention import attention

__all__ = ["attention_forward", "register"]

# What changes the result and has no equivalent here: keys chosen one by one, sequences packed into one row, pages.
UNSUPPORTED = (
    "block_indices",
    "indices",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "block_table",
)


def register(name: str = "s2s") -> None:
    """Enters `attention_forward` into the library's attention functions, and the boolean masks it takes into its mask
    functions: models made with `attn_implementation=name`, or given `model.set_attn_implementation(name)`, use it.

    Raises:
        ImportError: the library is not installed, or too old; the message names the extra that brings it.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        raise ImportError(
            "s2s_kernels.huggingface needs the transformers library: pip install s2s_kernels[transformers]"
        ) from error
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, sdpa_mask)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """`attention` under the library's calling convention.

    Args:
        module: the attention layer; its `is_causal` counts where the argument is None.
        query: (B, H, T, D); key: (B, Hkv, S, D); value: (B, Hkv, S, Dv); grouped heads as they are.
        attention_mask: boolean, True = attend, or floating, added to the scores. Causality and the window are in it.
            None: all keys, or causal from the first key on where there are several queries.
        dropout, scaling, softcap: as `attention`'s dropout_p, scale and softcap.
        sliding_window: how many keys a causal query sees, itself included.
        position_bias: added to the scores, (1 or B, H, T, S).
        s_aux: (H,), the score of a sink: a key without a value.

    Returns:
        out (B, T, H, Dv), None. A row that may attend to nothing gives 0, where eager attention averages all values.

    Raises:
        NotImplementedError: weights are asked for, or an argument is given that this attention can't honour.
    """
    for name in UNSUPPORTED:
        if others.get(name) is not None:
            raise NotImplementedError(f"attention_forward: {name} is not supported")
    if others.get("output_attentions"):
        raise NotImplementedError("attention_forward: output_attentions must be False: the weights don't exist")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    time, source = query.shape[2], key.shape[2]
    mask, bias, causal, window = None, position_bias, False, None
    if attention_mask is None:
        causal = bool(is_causal) if time > 1 else False
        if sliding_window is not None and sliding_window < source:
            if time == 1:  # the query stands at the last key
                key, value = key[:, :, -sliding_window:], value[:, :, -sliding_window:]
                bias = None if bias is None else bias[..., -sliding_window:]
            elif causal:
                window = (sliding_window - 1, None)
            else:
                raise NotImplementedError("attention_forward: sliding_window without causality needs attention_mask")
    elif attention_mask.dtype == torch.bool:
        mask = attention_mask
    else:
        bias = attention_mask if bias is None else bias + attention_mask
    out = attention(
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        causal=causal,
        window=window,
        dropout_p=dropout,
        scale=scaling,
        softcap=softcap,
        enable_gqa=key.shape[1] != query.shape[1],
        return_lse=s_aux is not None,
    )
    if s_aux is not None:
        out, lse = out
        # The sink takes its share of the softmax: exp(lse) / (exp(lse) + exp(s_aux)) is left.
        out = out * torch.sigmoid(lse - s_aux.to(lse.dtype)[:, None])[..., None].to(out.dtype)
    return out.transpose(1, 2).contiguous(), None
