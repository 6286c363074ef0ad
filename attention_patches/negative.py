"""Blending of the unconditional and the negative prediction, as the original Plug-and-Play code does it (pure maths and its edit)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .edit import Edit

SCHEDULES = ("constant", "linear", "exp")


def run_position(sigma: float, sigmas: Tensor) -> float:
    """How far a run has come, 0 at its first step and 1 at its last, counted in steps.

    sigmas: [K] ascending, the schedule of the trajectory; its K - 1 upper levels are the steps. Between two of them the
    position follows sigma in a straight line.
    """
    steps = [float(value) for value in sigmas.flip(0)[:-1]]
    if len(steps) < 2 or sigma >= steps[0]:
        return 0.0
    for i in range(len(steps) - 1):
        if sigma >= steps[i + 1]:
            return (i + (steps[i] - sigma) / (steps[i] - steps[i + 1])) / (len(steps) - 1)
    return 1.0


def unconditional_share(alpha: float, schedule: str, position: float) -> float:
    """alpha_i, the share of the unconditional prediction at a position 0..1 of the run.

    "constant": alpha; "linear": alpha falling to 0 at the last step; "exp": alpha exp(-6 u). So the negative prompt
    grows stronger towards the end, also with alpha 1; only alpha 1 with "constant" turns it off.
    """
    factor = {"constant": 1.0, "linear": 1.0 - position, "exp": math.exp(-6.0 * position)}[schedule]
    return alpha * factor


@dataclass(frozen=True, eq=False)
class NegativeBlend(Edit):
    """e~ = alpha_i e_uncond + (1 - alpha_i) e_negative, in place of the negative prediction.

    Linear in eps and therefore, at one x and sigma, in the denoised prediction that the host passes around.
    unconditional: CONDITIONING of the empty prompt. sigmas: [K] ascending, the trajectory's schedule.
    """

    unconditional: list | None = None
    alpha: float = 1.0
    schedule: str = "linear"
    sigmas: Tensor | None = None

    def share(self, sigma: float) -> float:
        """alpha_i at a noise level."""
        return unconditional_share(self.alpha, self.schedule, run_position(sigma, self.sigmas))

    def extra_conditioning(self) -> list | None:
        return self.unconditional

    def wants_extra(self, role: str, sigma: float) -> bool:
        return role == "negative" and self.share(sigma) > 0.0

    def combine(self, role: str, sigma: float, own: Tensor, extra: Tensor) -> Tensor:
        return torch.lerp(own, extra, self.share(sigma))
