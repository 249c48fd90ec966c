"""The training loop that the tasks and the benchmark of model families share."""

import math
import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class History:
    """What a training run has done so far.

    Attributes:
        seconds: spent in training steps; evaluation isn't counted.
        tokens: seen in training steps.
        step_seconds: of each step.
        losses: of each step, in bits a token.
        evaluations: (seconds so far, steps so far, bits a token on held-out text), one an evaluation.
    """

    seconds: float = 0.0
    tokens: int = 0
    step_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[float, int, float]] = field(default_factory=list)


def bits_per_token(model: nn.Module, tokens: torch.Tensor, *, context: int = 256, batch: int = 16) -> float:
    """Mean cross-entropy in bits of each token given those before it in its window.

    Args:
        model: tokens (B, T) -> logits (B, T, V).
        tokens: (N,) int64, cut into windows of `context` predictions that don't overlap; a last short one is left out.
        context: predictions a window.
        batch: windows a call.

    Raises:
        ValueError: the tokens don't fill one window.
    """
    windows = (len(tokens) - 1) // context
    if windows < 1:
        raise ValueError(f"tokens must hold at least context + 1 = {context + 1} tokens, got {len(tokens)}")
    inputs = tokens[: windows * context].view(windows, context)
    targets = tokens[1 : windows * context + 1].view(windows, context)
    training = model.training
    model.eval()
    total = 0.0
    with torch.no_grad():
        for rows, wanted in zip(inputs.split(batch), targets.split(batch), strict=True):
            logits = model(rows).flatten(0, 1).float()
            total += F.cross_entropy(logits, wanted.flatten(), reduction="sum").item()
    model.train(training)
    return total / (windows * context) / math.log(2)


class Trainer:
    """Trains a next-token model on a text with Adam, in as many turns as wanted: runs of several models can alternate,
    so that what else happens on the machine falls on all of them alike.

    Args:
        model: tokens (B, T) -> logits (B, T, V).
        tokens: (N,) int64, the training text; each step draws `batch` windows of `context` predictions from it.
        held_out: (M,) int64, the text of the evaluations.
        batch, context: of a step.
        learning_rate: reached after `warmup` steps that raise it linearly, then constant.
        warmup: steps.
        clip: largest norm of the gradient over all parameters (Pascanu et al. 2013).
        seed: of the windows drawn.

    Raises:
        ValueError: the training text doesn't fill one window.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: torch.Tensor,
        held_out: torch.Tensor,
        *,
        batch: int = 16,
        context: int = 256,
        learning_rate: float = 2e-3,
        warmup: int = 20,
        clip: float = 1.0,
        seed: int = 0,
    ) -> None:
        if len(tokens) <= context:
            raise ValueError(f"tokens must hold more than context = {context} tokens, got {len(tokens)}")
        self.model, self.tokens, self.held_out = model, tokens, held_out
        self.batch, self.context, self.warmup, self.clip = batch, context, warmup, clip
        self.learning_rate = learning_rate
        self.optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
        self.generator = torch.Generator().manual_seed(seed)
        self.history = History()

    def step(self) -> float:
        """One step; returns its loss in bits a token."""
        start = time.perf_counter()
        starts = torch.randint(len(self.tokens) - self.context, (self.batch, 1), generator=self.generator)
        window = self.tokens[(starts + torch.arange(self.context + 1)).to(self.tokens.device)]  # (B, context + 1)
        steps = len(self.history.losses)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * min(1.0, (steps + 1) / self.warmup) if self.warmup else group["lr"]
        self.model.train()
        logits = self.model(window[:, :-1]).flatten(0, 1)
        loss = F.cross_entropy(logits.float(), window[:, 1:].flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        bits = loss.item() / math.log(2)  # waits for the device, so the time below is the whole step's
        elapsed = time.perf_counter() - start
        self.history.seconds += elapsed
        self.history.tokens += self.batch * self.context
        self.history.step_seconds.append(elapsed)
        self.history.losses.append(bits)
        return bits

    def run(self, *, seconds: float | None = None, steps: int | None = None) -> History:
        """Trains until the whole run has spent so many seconds in steps, or made so many of them, whichever comes
        first.

        Raises:
            ValueError: neither limit is given.
        """
        if seconds is None and steps is None:
            raise ValueError("run: seconds or steps must be given")
        while (seconds is None or self.history.seconds < seconds) and (
            steps is None or len(self.history.losses) < steps
        ):
            self.step()
        return self.history

    def evaluate(self) -> float:
        """Bits a token on the held-out text; entered in the history."""
        bits = bits_per_token(self.model, self.held_out, context=self.context, batch=self.batch)
        self.history.evaluations.append((self.history.seconds, len(self.history.losses), bits))
        return bits
