"""The transformers library's models on our attention, against its own eager attention: random weights, tiny models."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch

from s2s_kernels import huggingface
from s2s_kernels.testing import Draw

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "max_position_embeddings": 64,
}  # fmt: skip


def build(name, implementation):
    import transformers

    torch.manual_seed(0)
    huggingface.register()
    if name == "llama":
        config = transformers.LlamaConfig(**SIZES)
    elif name == "mistral":
        config = transformers.MistralConfig(**SIZES, sliding_window=6)
    elif name == "gemma2":
        options = {"sliding_window": 6, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 3}
        config = transformers.Gemma2Config(**SIZES, **options)
    else:
        sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        config = transformers.GPT2Config(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():  # larger than the library draws them, so that attention matters
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model.eval()


def padded_tokens(left=True):
    tokens = Draw().integers(3, 64, 3, 12)
    attend = torch.ones_like(tokens)
    for row, count in enumerate((0, 5, 9)):
        attend[row, slice(0, count) if left else slice(12 - count, 12)] = 0
    return torch.where(attend == 1, tokens, 0), attend


MODELS = ["llama", "mistral", "gemma2", "gpt2"]


@needs_transformers
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padding", ["left", "right", None])
def test_prefill(name, padding):
    tokens, attend = padded_tokens(padding == "left")
    arguments = (
        {"input_ids": tokens, "attention_mask": attend} if padding else {"input_ids": tokens + 3 * (tokens == 0)}
    )
    with torch.no_grad():
        ours, eager = (build(name, implementation)(**arguments).logits for implementation in ("s2s", "eager"))
    present = attend.bool() if padding else torch.ones_like(attend, dtype=torch.bool)
    assert ours.isfinite().all() and eager.std() > 0.1
    torch.testing.assert_close(ours[present], eager[present], rtol=1e-4, atol=1e-4)


@needs_transformers
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cache", [None, "static"])
def test_cached_generation(name, cache):
    tokens, attend = padded_tokens()
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True, "cache_implementation": cache, "disable_compile": True}
    ours, eager = (
        build(name, implementation).generate(input_ids=tokens, attention_mask=attend, **options)
        for implementation in ("s2s", "eager")
    )
    assert torch.equal(ours.sequences, eager.sequences)
    for a, b in zip(ours.logits, eager.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@needs_transformers
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_gradients(name):
    tokens, attend = padded_tokens(left=False)
    grads = []
    for implementation in ("s2s", "eager"):
        model = build(name, implementation)
        model(input_ids=tokens, attention_mask=attend, labels=torch.where(attend == 1, tokens, -100)).loss.backward()
        grads.append({key: parameter.grad for key, parameter in model.named_parameters()})
    for key, grad in grads[1].items():
        torch.testing.assert_close(grads[0][key], grad, rtol=1e-3, atol=1e-4, msg=key)


@needs_transformers
def test_an_encoder():
    import transformers

    huggingface.register()
    outputs = []
    tokens, attend = padded_tokens(left=False)
    for implementation in ("s2s", "eager"):
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
        )
        model = transformers.AutoModel.from_config(config, attn_implementation=implementation).eval()
        with torch.no_grad():
            outputs.append(model(input_ids=tokens, attention_mask=attend).last_hidden_state[attend.bool()])
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


@needs_transformers
def test_dropout_is_that_of_the_layer_in_training():
    import transformers

    huggingface.register()
    config = transformers.LlamaConfig(**SIZES, attention_dropout=0.5)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="s2s").train()
    first, second = (model(input_ids=padded_tokens()[0]).logits for _ in range(2))
    assert not torch.equal(first, second)
    first, second = (model.eval()(input_ids=padded_tokens()[0]).logits for _ in range(2))
    assert torch.equal(first, second)


# The function itself, which needs no library


def plain(query, key, value, hidden, bias=0.0, sink=None):
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    scores = (query @ key.mT * 0.3 + bias).masked_fill(hidden, float("-inf"))
    if sink is not None:
        scores = torch.cat([scores, sink[:, None, None].expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2)


@pytest.mark.parametrize("time", [1, 7])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("extra", [None, "position_bias", "s_aux"])
def test_without_a_mask(time, window, extra):
    draw = Draw()
    query, key, value = draw(2, 4, time, 8), draw(2, 2, 7, 8), draw(2, 2, 7, 5)
    given = {"position_bias": {"position_bias": draw(1, 4, time, 7)}, "s_aux": {"s_aux": draw(4)}}.get(extra, {})
    ours, nothing = huggingface.attention_forward(
        SimpleNamespace(is_causal=True), query, key, value, None, scaling=0.3, sliding_window=window, **given
    )
    behind = torch.arange(7 - time, 7)[:, None] - torch.arange(7)
    hidden = (behind < 0) | (behind >= (window or 7))
    expected = plain(query, key, value, hidden, given.get("position_bias", 0.0), given.get("s_aux"))
    assert nothing is None and ours.is_contiguous()
    torch.testing.assert_close(ours, expected)


def test_floating_masks_and_layers_that_are_not_causal():
    draw = Draw()
    query, key, value, bias = draw(2, 4, 7, 8), draw(2, 4, 7, 8), draw(2, 4, 7, 5), draw(1, 4, 7, 7)
    mask = torch.where(draw.mask(2, 1, 7, 7, p=0.7) | torch.eye(7, dtype=torch.bool), 0.0, float("-inf"))
    layer, nothing = SimpleNamespace(is_causal=False), torch.zeros(7, 7, dtype=torch.bool)
    ours, _ = huggingface.attention_forward(layer, query, key, value, mask, scaling=0.3, position_bias=bias)
    torch.testing.assert_close(ours, plain(query, key, value, nothing, mask + bias))
    ours, _ = huggingface.attention_forward(layer, query, key, value, None, scaling=0.3)
    torch.testing.assert_close(ours, plain(query, key, value, nothing))
    ours, _ = huggingface.attention_forward(layer, query, key, value, None, scaling=0.3, is_causal=True)
    torch.testing.assert_close(ours, plain(query, key, value, ~torch.ones(7, 7, dtype=torch.bool).tril()))


@pytest.mark.parametrize("argument", [*huggingface.UNSUPPORTED, "output_attentions", "sliding_window"])
def test_refuses_by_name(argument):
    x = torch.randn(1, 2, 5, 4)
    value = {"output_attentions": True, "sliding_window": 2}.get(argument, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(NotImplementedError, match=argument):
        huggingface.attention_forward(SimpleNamespace(is_causal=False), x, x, x, None, **{argument: value})


def test_names_the_extra_where_the_library_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install s2s_kernels\[transformers\]"):
        huggingface.register()
