"""One guided step through the host's guider, timed or measured."""

from __future__ import annotations

import time
from dataclasses import dataclass

import comfy.samplers
import torch

from ..tests.helpers.models import tiny_cond, tiny_sd15, tiny_trajectory
from ._protocol import SEED, interleaved, ratio

CFG = 7.5


@dataclass(frozen=True)
class Setting:
    """Size of a measurement. width 320 is SD1.5 itself; size is that of the latents, 1/8 of the picture."""

    width: int = 320
    size: int = 32
    dtype: torch.dtype = torch.float32
    rounds: int = 12
    warm_up: int = 2


class Bench:
    """A model with random weights, a trajectory, and steps over variants of the model."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.model = tiny_sd15(seed=SEED, width=setting.width, dtype=setting.dtype)
        self.trajectory = tiny_trajectory(self.model, steps=50, size=(setting.size, setting.size), seed=SEED)
        self.prompts = tiny_cond(seed=1), tiny_cond(seed=2)

    def sigma(self, step: int) -> float:
        """Noise level of a step of 50, counted from the noisy end."""
        return float(self.trajectory.sigmas[-1 - step])

    def step(self, model, sigma: float) -> tuple[float, torch.Tensor]:
        """Seconds of one guided step on `model`, and the prediction. What a run does once is not counted."""
        result = []

        def once(denoiser, x, sigmas, extra_args=None, callback=None, disable=None):
            self.synchronise(x.device)
            began = time.perf_counter()
            out = denoiser(x, sigma * x.new_ones([x.shape[0]]), **extra_args)
            self.synchronise(x.device)
            result.extend((time.perf_counter() - began, out))
            return x

        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(*self.prompts)
        guider.set_cfg(CFG)
        start = model.model.process_latent_out(self.trajectory.at(sigma))
        levels = torch.tensor([sigma, 0.0])
        with torch.inference_mode():
            guider.sample(torch.zeros_like(start), start, comfy.samplers.KSAMPLER(once), levels, disable_pbar=True, seed=SEED)
        return result[0], result[1]

    @staticmethod
    def synchronise(device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def ratio(self, model, reference, sigma: float) -> dict:
        """Leaf: time of a step on `model` over that on `reference`."""
        return ratio(lambda: self.step(model, sigma)[0], lambda: self.step(reference, sigma)[0], self.setting.rounds, self.setting.warm_up)

    def rounds(self, models: dict, sigma: float, rounds: int, warm_up: int) -> list[dict[str, list[float]]]:
        """Seconds of a step on each of several models, see `_protocol.interleaved`."""
        return interleaved({name: lambda model=model: self.step(model, sigma)[0] for name, model in models.items()}, rounds, warm_up)
