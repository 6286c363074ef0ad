"""Learning an instruction: the loop over timesteps, and which of the states it passes through is the result.

`learn` is the method, `learn_run` runs it on a MODEL.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .objective import noise_error, similarity, total_loss

CHOICES = ("validation", "late average", "last", "lowest step loss")
LATE = 0.25  # share of the steps that the late average is taken over
CHECKS = 20  # looks at the validation set during a run

Guided = Callable[[Tensor], Tensor]
Branch = Callable[[int], tuple[Guided, Tensor]]
Validate = Callable[[Tensor], float]


@dataclass(frozen=True)
class Settings:
    """Defaults are the published ones, except for `choice`.

    steps: of the optimiser, one timestep each. learning_rate: AdamW's. text_scale, image_scale: s_T and s_I during training.
    mse_weight, direction_weight: lambdas of the two losses. seed: of timesteps, noise and previews. choice: one of CHOICES. preview_every: steps
    between two previews, 0 for none. checkpointing: "auto", "on" or "off", see inversion.gradients.
    """

    steps: int = 1000
    learning_rate: float = 0.001
    text_scale: float = 7.5
    image_scale: float = 1.5
    mse_weight: float = 4.0
    direction_weight: float = 0.1
    seed: int = 0
    choice: str = "validation"
    preview_every: int = 100
    checkpointing: str = "auto"


@dataclass(frozen=True)
class Learned:
    """One step of `learn`, just after its update. index: from 0. tokens: [1, T, C] now. error: mean squared error of the tokens before the update."""

    index: int
    timestep: int
    tokens: Tensor
    error: float


@dataclass
class Record:
    """What a run of `learn` went through; filled as it goes.

    errors: per step. checks: (steps made, validation error) pairs, the start first. alike: cosine with the direction per step, if there is one.
    best, best_step: the state chosen so far and the number of steps it had seen. stopped: why learning ended early, "" if it did not.
    """

    errors: list[float] = field(default_factory=list)
    checks: list[tuple[int, float]] = field(default_factory=list)
    alike: list[float] = field(default_factory=list)
    best: Tensor | None = None
    best_step: int = 0
    stopped: str = ""


def learn(branch: Branch, order: list[int], start: Tensor, end: int, settings: Settings, record: Record, direction: tuple[Tensor, Tensor] | None = None,
          validate: Validate | None = None) -> Iterator[Learned]:
    """Train positions 1 to end - 1 of start [1, T, C] with AdamW; yields every step. The result is `record.best` afterwards.

    branch(timestep) prepares a step (the two predictions without c) and returns (function of tokens that gives the guided prediction [1, ...], noise
    it should be). order: timestep of each step. direction: (d [1, P], text projection [P, C]). validate(tokens): error on a fixed
    set, needed for the choice "validation". A loss or gradient that is no number ends the loop; the last state whose loss was one then counts as the last.

    To be called outside inference mode. Raises ValueError, one sentence, where nothing was learned before that, and where no gradient arrives.
    """
    vectors = start[:, 1:end].detach().clone().requires_grad_()
    adam = torch.optim.AdamW([vectors], lr=settings.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    choose = _Chooser(settings.choice, len(order), record, validate, start)

    def assembled() -> Tensor:
        return torch.cat([start[:, :1], vectors, start[:, end:]], dim=1)

    for index, timestep in enumerate(order):
        tokens = assembled()
        predict, noise = branch(timestep)
        error = noise_error(predict(tokens), noise).mean()
        alike = None if direction is None else similarity(tokens, *direction)
        loss = total_loss(error, alike, settings.mse_weight, settings.direction_weight)
        (gradient,) = torch.autograd.grad(loss, [vectors], allow_unused=True) if loss.requires_grad else (None,)
        if gradient is None:
            raise ValueError(
                "No gradient reaches the instruction: another node on the MODEL (an attention patch, say) or a fast mode of ComfyUI cuts it off; "
                "connect the MODEL without it, or start ComfyUI without --fast."
            )
        value = float(loss.detach())
        if not math.isfinite(value) or not bool(torch.isfinite(gradient).all()):
            if not record.errors:
                raise ValueError(
                    f"The loss of instruction learning is NaN or infinite at its very first step (timestep {timestep}), so nothing was learned: "
                    "check the pictures and the model's weights."
                )
            record.stopped = f"the loss became NaN or infinite at step {index + 1} of {len(order)} (timestep {timestep})"
            choose.end(index)
            return
        record.errors.append(float(error.detach()))
        if alike is not None:
            record.alike.append(float(alike.detach()))
        choose.before_update(index, tokens.detach(), float(error.detach()))
        vectors.grad = gradient
        adam.step()
        tokens = assembled().detach()
        choose.after_update(index, tokens)
        yield Learned(index, timestep, tokens, record.errors[-1])
    choose.end(len(order))


class _Chooser:
    """Keeps the state that a choice asks for in the record."""

    def __init__(self, choice: str, steps: int, record: Record, validate: Validate | None, start: Tensor):
        self.choice, self.steps, self.record, self.validate = choice, steps, record, validate
        self.every = max(1, round(steps / CHECKS))
        self.good, self.last = start, start
        self.late = max(0, steps - max(1, round(LATE * steps)))
        self.sum, self.summed = torch.zeros_like(start, dtype=torch.float64), 0
        record.best = start
        if validate is not None:
            self._check(0, start)

    def before_update(self, index: int, tokens: Tensor, error: float) -> None:
        """tokens: the state whose loss was just found to be a number."""
        self.good = tokens
        if self.choice == "lowest step loss" and error <= min(self.record.errors):
            self.record.best, self.record.best_step = tokens, index
        if index > self.late:
            self._add(tokens)

    def after_update(self, index: int, tokens: Tensor) -> None:
        self.last = tokens
        if self.validate is not None and ((index + 1) % self.every == 0 or index + 1 == self.steps):
            self._check(index + 1, tokens)

    def end(self, steps: int) -> None:
        """After the loop; steps: made. Where it stopped early the state after the last update gave no number, the one before it did."""
        last, made = (self.good, steps - 1) if self.record.stopped else (self.last, steps)
        if self.choice == "last":
            self.record.best, self.record.best_step = last, made
        elif self.choice == "late average":
            if not self.record.stopped:
                self._add(last)
            self.record.best = (self.sum / self.summed).to(last) if self.summed else last
            self.record.best_step = made

    def _add(self, tokens: Tensor) -> None:
        self.sum += tokens
        self.summed += 1

    def _check(self, made: int, tokens: Tensor) -> None:
        error = self.validate(tokens)
        if not math.isfinite(error):
            return
        if not self.record.checks or error < min(value for _, value in self.record.checks):
            if self.choice == "validation":
                self.record.best, self.record.best_step = tokens, made
        self.record.checks.append((made, error))
