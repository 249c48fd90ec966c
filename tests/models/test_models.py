"""The three families of language models: size, causality, learning, round trips."""

import copy
import io

import pytest
import torch

from s2s_kernels.models import LANGUAGE_MODELS, LSTMLanguageModel, TCNLanguageModel, TransformerLanguageModel
from s2s_kernels.models.tcn import TCN
from s2s_kernels.models.transformer import TransformerBlock
from s2s_kernels.training import Trainer

FAMILIES = pytest.mark.parametrize("name", list(LANGUAGE_MODELS))
SMALL = {
    "lstm": lambda: LSTMLanguageModel(32, 16, 24, 2),
    "tcn": lambda: TCNLanguageModel(32, 16, 3, 2),
    "transformer": lambda: TransformerLanguageModel(32, 16, 2, 2),
}


def tokens_of(*shape, vocabulary=32):
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(5))


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_the_families_are_equal_in_parameters_within_a_tenth():
    counts = {name: count(build()) for name, build in LANGUAGE_MODELS.items()}
    assert counts == {"lstm": 860288, "tcn": 856320, "transformer": 859136}
    assert max(counts.values()) <= 1.1 * min(counts.values())


@FAMILIES
def test_logits_have_a_row_for_each_token(name):
    logits = LANGUAGE_MODELS[name]()(tokens_of(2, 7, vocabulary=256))
    assert logits.shape == (2, 7, 256) and logits.dtype == torch.float32 and logits.isfinite().all()
    assert SMALL[name]()(tokens_of(2, 1)).shape == (2, 1, 32)


@FAMILIES
def test_a_later_token_never_changes_an_earlier_logit(name):
    model, tokens = SMALL[name]().eval(), tokens_of(2, 20)
    with torch.no_grad():
        before = model(tokens)
        for position in (0, 7, 19):
            changed = tokens.clone()
            changed[:, position] = (changed[:, position] + 1) % 32
            after = model(changed)
            torch.testing.assert_close(after[:, :position], before[:, :position], rtol=0, atol=0)
            assert (after[:, position] != before[:, position]).any()


@FAMILIES
def test_rows_of_a_batch_do_not_touch(name):
    model, tokens = SMALL[name]().double().eval(), tokens_of(3, 9)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[1:2], model(tokens[1:2]))


@FAMILIES
def test_training_lowers_the_loss(name):
    torch.manual_seed(0)
    text = (
        torch.frombuffer(bytearray(b"to be, or not to be: that is the question. " * 40), dtype=torch.uint8).long() % 32
    )
    trainer = Trainer(SMALL[name](), text, text, batch=8, context=32, learning_rate=1e-2, warmup=0)
    history = trainer.run(steps=60)
    assert sum(history.losses[-5:]) < 0.5 * sum(history.losses[:5])
    assert trainer.evaluate() < 2.5 < history.losses[0]


@FAMILIES
def test_a_saved_model_gives_the_same_logits(name):
    model, tokens = SMALL[name]().eval(), tokens_of(2, 11)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = SMALL[name]().eval()
    other.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    with torch.no_grad():
        expected = model(tokens)
        torch.testing.assert_close(other(tokens), expected, rtol=0, atol=0)
        torch.testing.assert_close(copy.deepcopy(model)(tokens), expected, rtol=0, atol=0)


@FAMILIES
def test_every_parameter_gets_a_gradient(name):
    model = SMALL[name]()
    model(tokens_of(2, 9)).square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name


@pytest.mark.parametrize("build", [LSTMLanguageModel, TCNLanguageModel, TransformerLanguageModel])
def test_dropout_acts_in_training_only(build):
    model, tokens = build(dropout=0.5), tokens_of(1, 12)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    torch.testing.assert_close(model(tokens), model(tokens), rtol=0, atol=0)


def test_tcn_reaches_as_far_back_as_the_paper_says():
    model, taps, blocks = TCNLanguageModel(32, 8, 3, 3).double().eval(), 3, 3
    reach = 1 + 2 * (taps - 1) * (2**blocks - 1)
    tokens = tokens_of(1, reach + 5)
    changed = tokens.clone()
    changed[0, 0] = (changed[0, 0] + 1) % 32
    differs = (model(tokens) != model(changed)).any(-1)[0]
    assert not differs[reach:].any() and differs[:reach].any()


def test_tcn_matches_channels_by_a_convolution_of_one_tap():
    model = TCN(5, [8, 8], kernel_size=2)
    assert model.blocks[0].match.weight.shape == (8, 5, 1) and isinstance(model.blocks[1].match, torch.nn.Identity)
    assert model(torch.randn(2, 5, 9)).shape == (2, 8, 9)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="num_heads"):
        TransformerBlock(10, 3, 40)
