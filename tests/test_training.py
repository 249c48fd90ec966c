import math

import pytest
import torch
from torch import nn

from s2s_kernels.training import Trainer, bits_per_token


class Constant(nn.Module):
    """Gives every token the same learnt scores, whatever came before."""

    def __init__(self, vocabulary):
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, tokens):
        return self.scores.expand(*tokens.shape, -1)


def test_bits_of_a_uniform_guess():
    tokens = torch.randint(16, (1000,), generator=torch.Generator().manual_seed(0))
    assert bits_per_token(Constant(16), tokens, context=50) == pytest.approx(4.0)


def test_bits_count_each_token_once_whatever_the_batch():
    model, tokens = Constant(4), torch.tensor([0, 1, 2, 3] * 20)
    with torch.no_grad():
        model.scores.copy_(torch.tensor([0.5, 0.25, 0.125, 0.125]).log())
    # Targets are tokens 1 ... 70: 17 of token 0, 18 of tokens 1 and 2, 17 of token 3.
    expected = (17 * 1 + 18 * 2 + 18 * 3 + 17 * 3) / 70
    for batch in (1, 3, 100):
        assert bits_per_token(model, tokens, context=10, batch=batch) == pytest.approx(expected)


def test_evaluation_leaves_the_mode_alone():
    model = Constant(4)
    bits_per_token(model.train(), torch.arange(20) % 4, context=5)
    assert model.training
    bits_per_token(model.eval(), torch.arange(20) % 4, context=5)
    assert not model.training


def test_a_constant_learns_the_frequencies():
    tokens = torch.tensor([0, 0, 0, 1] * 100)
    trainer = Trainer(Constant(2), tokens, tokens, batch=8, context=16, learning_rate=0.1)
    trainer.run(steps=200)
    assert trainer.evaluate() == pytest.approx(-0.75 * math.log2(0.75) - 0.25 * math.log2(0.25), abs=0.01)
    assert trainer.history.evaluations[0][1:] == (200, trainer.history.evaluations[0][2])


def test_history_counts_what_was_done():
    trainer = Trainer(Constant(4), torch.arange(200) % 4, torch.arange(50) % 4, batch=3, context=10)
    trainer.run(steps=2)
    history = trainer.run(steps=5)
    assert len(history.losses) == len(history.step_seconds) == 5 and history.tokens == 150
    assert history.seconds == pytest.approx(sum(history.step_seconds))
    assert trainer.run(seconds=0.0) is history and len(history.losses) == 5


def test_a_time_budget_ends_the_run():
    trainer = Trainer(Constant(4), torch.arange(200) % 4, torch.arange(50) % 4, batch=1, context=10)
    history = trainer.run(seconds=0.05)
    assert history.seconds >= 0.05 > history.seconds - history.step_seconds[-1]


def test_the_seed_fixes_the_windows():
    def losses(seed):
        trainer = Trainer(Constant(7), torch.arange(300) ** 2 % 7, torch.arange(50) % 7, context=9, seed=seed)
        return trainer.run(steps=5).losses

    assert losses(1) == losses(1) != losses(2)


def test_the_gradient_is_clipped():
    trainer = Trainer(Constant(2), torch.zeros(100, dtype=torch.int64), torch.zeros(20).long(), context=9, clip=1e-3)
    trainer.step()
    assert trainer.model.scores.grad.norm() <= 1.001e-3


def test_the_rate_warms_up():
    trainer = Trainer(Constant(2), torch.arange(100) % 2, torch.arange(20) % 2, context=9, learning_rate=1.0, warmup=4)
    rates = []
    for _ in range(6):
        trainer.step()
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_texts_too_short_are_refused():
    with pytest.raises(ValueError, match="tokens"):
        Trainer(Constant(2), torch.zeros(10).long(), torch.zeros(10).long(), context=10)
    with pytest.raises(ValueError, match="tokens"):
        bits_per_token(Constant(2), torch.zeros(10).long(), context=10)
    with pytest.raises(ValueError, match="seconds or steps"):
        Trainer(Constant(2), torch.zeros(20).long(), torch.zeros(10).long(), context=10).run()
