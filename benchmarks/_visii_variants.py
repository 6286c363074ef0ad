"""Ways of computing one training step of instruction learning: ours, and the released code's three rows, which exist only for comparison."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import comfy.samplers
import torch

from ..inversion.gradients import differentiable_options, private_model
from ..tests.helpers.visii import random_instruction, random_pairs, tiny_edit
from ..visii.learn import Settings
from ..visii.learn_run import prepare
from ..visii.objective import guided, noise_error
from ..visii.step import Step
from ._protocol import SEED

TIMESTEP = 500


@dataclass(frozen=True)
class Setting:
    """Size of a measurement. width 320 is SD1.5 itself; size is that of the latents, 1/8 of the picture."""

    width: int = 128
    size: int = 32
    dtype: torch.dtype = torch.float32
    rounds: int = 12
    warm_up: int = 2


class _Inside(comfy.samplers.Sampler):
    """Stands where a sampler stands in the host's run: gives `work` what a training step is made of."""

    def __init__(self, work: Callable, settings: Settings):
        self.work, self.settings, self.found = work, settings, None

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
        with torch.inference_mode(False), torch.enable_grad():
            options = differentiable_options(extra_args["model_options"])

            def step(checkpointing: bool = False) -> Step:
                return Step(model_wrap, private_model(model_wrap.inner_model, checkpointing), options, latent_image.clone(), self.settings)

            self.found = self.work(step)
        return latent_image


class Bench:
    """An edit model with random weights of the SD1.5 layout, one pair, one start text of ten words."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.model = tiny_edit(seed=SEED, width=setting.width, context_dim=768, dtype=setting.dtype, channel_mult=(1, 2, 4, 4))
        self.pairs = random_pairs(size=(setting.size, setting.size), seed=SEED)
        self.start = random_instruction(end=11, tokens=77, width=768, seed=SEED)

    @torch.inference_mode()
    def inside(self, work: Callable):
        """What `work(step)` returns, called within the host's run; step(checkpointing) makes a `Step` of a private model."""
        training = _Inside(work, Settings(seed=SEED))
        guider = comfy.samplers.CFGGuider(self.model)
        guider.inner_set_conds(prepare(self.model, self.start, self.pairs, (self.start.null, {})))
        guider.set_cfg(7.5)
        latent = self.pairs.target.clone()
        guider.sample(torch.zeros_like(latent), latent, training, torch.tensor([10.0, 0.0]), disable_pbar=True, seed=SEED)
        return training.found


def vectors(step: Step, start, rows: int = 1) -> torch.Tensor:
    """What learns: the start text's row, and with it, in the released code, both rows of the empty text."""
    device = step.targets.device
    return torch.cat([start.tokens.to(device), *[start.null.to(device)] * (rows - 1)]).requires_grad_()


def ours(step: Step, tokens: torch.Tensor) -> torch.Tensor:
    """Gradient of one step: two rows without gradient, one with."""
    predict, noise = step.branch(TIMESTEP)
    return torch.autograd.grad(4.0 * noise_error(predict(tokens), noise).mean(), tokens)[0]


def three_rows(step: Step, tokens: torch.Tensor) -> torch.Tensor:
    """Gradient of one step: text, empty and empty without picture in one call of three rows, all with gradient."""
    y, levels, noise, rows = step.noisy(torch.tensor([TIMESTEP]))
    parts = zip((step.text, step.empty, step.empty), tokens.split(1), (True, True, False))
    full, image, none = step.predict([step.entry(entry, rows, row, picture) for entry, row, picture in parts], y, levels)
    denoised = guided(full, image, none, step.settings.text_scale, step.settings.image_scale)
    return torch.autograd.grad(4.0 * noise_error((y - denoised) / levels[:, None, None, None], noise).mean(), tokens)[0]


# name: (function, rows of what learns, gradient checkpointing)
VARIANTS = {"ours": (ours, 1, False), "three_rows": (three_rows, 3, False), "checkpointed": (ours, 1, True)}


def once(bench: Bench, step, name: str) -> Callable[[], float]:
    """A function that makes one training step of a variant and returns its seconds."""
    compute, rows, checkpointing = VARIANTS[name]
    made = step(checkpointing)
    tokens = vectors(made, bench.start, rows)

    def run() -> float:
        _synchronise(tokens.device)
        began = time.perf_counter()
        compute(made, tokens)
        _synchronise(tokens.device)
        return time.perf_counter() - began

    return run


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
