"""Inversions of random pictures with small random models, for the tests of inversion/."""

import comfy.sample
import torch

from ...inversion.run import run_inversion
from .models import tiny_cond

STEPS = 5


def smooth(model):
    """Random weights answer a change of their input far more sharply than trained ones; a smaller output makes steps invertible."""
    with torch.no_grad():
        model.model.diffusion_model.out[2].weight.mul_(0.05)
    return model


def picture(batch=1, height=16, width=16, seed=0):
    # the scale of SD's latents before the latent scale factor
    return {"samples": torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(seed)) * 4}


def invert(model, latent=None, positive=None, **options):
    options = {"steps": STEPS, "iterations": 0, **options}
    return run_inversion(model, latent or picture(), positive or tiny_cond(), **options).trajectory


def stock_sampler(model, latent, sampler="euler", scheduler="ddim_uniform", cfg=1.0, steps=STEPS, **options):
    """The host's KSampler with added noise disabled."""
    samples = latent["samples"]
    return comfy.sample.sample(
        model, torch.zeros_like(samples), steps, cfg, sampler, scheduler, tiny_cond(), tiny_cond(seed=1), samples, disable_noise=True, seed=0, **options
    )
