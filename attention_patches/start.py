"""Where a run starts: the trajectory's own noise instead of the sampler's.

Stock KSampler always adds noise. When the latent it is given *is* noise that an inversion found, adding more would
destroy it, so the noise is replaced by zeros; KSampler, KSamplerAdvanced and SamplerCustomAdvanced then agree bit for bit.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from . import host

SAME_LATENT = 1e-4  # of the largest value; a LATENT on the wire went through the latent scale factor and back
GOING_ON = 0.9  # of the model's largest noise level: below, a run without added noise is the second part of one
NEAR_STEP = 0.84  # of the trajectory's first step, see `near_top`


def near_top(run: Tensor, sigmas: Tensor, timestep) -> bool:
    """Whether a run over the noise levels `run` [n + 1], descending, is a whole run of the model that made a trajectory.

    dpm_2 and uni_pc make a schedule of one step more and drop one, so with some schedulers (ddim_uniform) their first
    noise level lies up to a step above, or most of a step below, the trajectory's. denoise < 1 starts at least
    (n - 1) / n of a step below. sigmas: the trajectory's. timestep: model_sampling.timestep, in whose units
    steps are about even.
    """
    at, top, second = (float(timestep(torch.tensor(float(value)))) for value in (run[0], sigmas[-1], sigmas[-2]))
    steps = len(sigmas) - 1
    # a run of more steps has shorter ones, or 50 steps with denoise 0.95 would pass for a whole run of 20
    shorter = min(1.0, steps / (len(run) - 1))
    below = min(NEAR_STEP, (steps - 1) / steps - 0.01) * shorter
    return abs(float(run[0] / sigmas[-1]) - 1) <= host.SAME_SIGMA or -below * (top - second) <= at - top <= (top - second)


def find_level(trajectory, latents: Tensor) -> int | None:
    """Index of the stored noise level whose latents [B, C, H, W] these are (sampler scaling), None for any other latent.

    0 is the clean end: a picture, not a start. One stored picture matches any number of copies.
    """
    for level in range(len(trajectory.sigmas) - 1, -1, -1):
        stored = trajectory.latents[level]
        if stored.shape[0] in (1, latents.shape[0]) and bool((latents - stored).abs().max() <= SAME_LATENT * stored.abs().max()):
            return level
    return None


def prepare_start(patcher, sources: list, noise: Tensor, latent_image: Tensor, sampler, sigmas: Tensor, denoise_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The (noise, latent_image) that a run over `sigmas` [n + 1] is to start with; both [B, C, H, W] in LATENT scaling.

    Noise becomes zero when latent_image is a stored latent of a source's trajectory. With a noise mask, latent_image
    becomes the picture that was inverted and noise what leads from it to the start: the host keeps latent_image outside
    the mask, and that must be the picture, not its noise. Raises ValueError, one sentence, when start and schedule
    do not belong together (denoise < 1).
    """
    if not sources or len(sigmas) == 0:
        return noise, latent_image
    model_sampling = patcher.get_model_object("model_sampling")
    first, silent = float(sigmas[0]), torch.count_nonzero(noise) == 0
    latents = patcher.model.process_latent_in(latent_image.to("cpu", torch.float32))
    for source in sources:
        level = find_level(source.trajectory, latents)
        if level == 0 and silent and first > float(source.trajectory.sigmas[1]):
            raise ValueError(
                f"The sampler starts at noise level {first:.3f} without added noise, but its latent is the clean picture: "
                "connect the LATENT of the node that got the trajectory, which is that picture's noise."
            )
        if level:
            return _from_level(patcher, source.trajectory, level, model_sampling, noise, latent_image, sampler, sigmas, denoise_mask)
    low = next((source.trajectory for source in sources if not near_top(sigmas, source.trajectory.sigmas, model_sampling.timestep)), None)
    if silent:
        host.log.info("Palimpsest: noise is disabled and the latent is not the inversion's: going on from it as it is.")
    elif low is None:
        host.log.info("Palimpsest: the latent is not the inversion's noise: the run starts from random noise, with the source's structure injected.")
    else:
        raise ValueError(
            f"The sampler starts at noise level {first:.3f} while the trajectory starts at {float(low.sigmas[-1]):.3f}: "
            "set denoise to 1 and start from the LATENT of the node that got the trajectory."
        )
    return noise, latent_image


def check_beginning(patcher, noise: Tensor, sigmas: Tensor) -> None:
    """For a source that is generated beside the run: says so when the run seems to go on with what an earlier sampler left."""
    if len(sigmas) == 0 or torch.count_nonzero(noise) > 0:
        return
    if float(sigmas[0]) < GOING_ON * float(patcher.get_model_object("model_sampling").sigma_max):
        host.log.warning(
            "Palimpsest: this sampler goes on from a half-done latent, so the source starts there too and the windows count its own steps: "
            "edit in one sampler, or connect a TRAJECTORY."
        )


def _from_level(patcher, trajectory, level, model_sampling, noise, latent_image, sampler, sigmas, denoise_mask):
    first, stored = float(sigmas[0]), float(trajectory.sigmas[level])
    start = trajectory.latents[level]
    if abs(first / stored - 1) > host.SAME_SIGMA:
        whole = level == len(trajectory.sigmas) - 1 and near_top(sigmas, trajectory.sigmas, model_sampling.timestep)
        if not whole:
            raise ValueError(
                f"The sampler starts at noise level {first:.3f}, but its latent is the trajectory's noise of level {stored:.3f}: "
                "set denoise to 1, start_at_step to 0, and the steps and scheduler of the inversion."
            )
        host.log.info("Palimpsest: this sampler and scheduler start at noise level %.3f, the inversion ended at %.3f; its path is extended.", first, stored)
        start = trajectory.at(first)
        latent_image = patcher.model.process_latent_out(start.to(noise)).expand_as(noise).clone()
    if denoise_mask is not None:
        return _masked(patcher, trajectory.latents[0], start, model_sampling, noise, sampler, sigmas)
    if torch.count_nonzero(noise) > 0:
        host.log.info("Palimpsest: starting from the inversion's noise, no other noise is added.")
    return torch.zeros_like(noise), latent_image


def _masked(patcher, clean, start, model_sampling, noise, sampler, sigmas):
    clean, start = clean.to(noise), start.to(noise)
    # max_denoise asks the sampler's model for nothing but its model_sampling, which is not loaded at this point
    asked = SimpleNamespace(inner_model=SimpleNamespace(model_sampling=model_sampling))
    largest = sampler.max_denoise(asked, sigmas)
    ones, zeros = torch.ones_like(start), torch.zeros_like(start)
    scale = model_sampling.noise_scaling(sigmas[:1].to(noise), ones, zeros, largest)
    host.log.info("Palimpsest: starting from the inversion's noise; outside the noise mask the inverted picture is kept.")
    latent = patcher.model.process_latent_out(clean)
    return ((start - clean) / scale).expand_as(noise).clone(), latent.expand_as(noise).clone()
