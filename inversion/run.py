"""DDIM inversion through the host's own sampling path, and the way back.

The host's guider gets ascending sigmas, no noise and a sampler that wraps our function. Conditioning, hooks,
ControlNet, model loading and offloading, previews, progress and Cancel are therefore the host's.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import comfy.model_management
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .checks import check_conditioning, check_latent, inversion_sigmas
from .ddim import InversionStep, invert
from .trajectory import Trajectory, describe_model, start_latent

PREVIEWS = 8
MASK_NOTE = (
    "the noise mask is kept in the trajectory and comes out of PnP Injector; the noise output has none, "
    "because a sampler keeps its starting latent outside a mask, and here that is noise"
)
EMPTY_NOTE = "the latent is all zeros, as Empty Latent Image makes it; connect VAE Encode to invert a picture"


@dataclass(frozen=True)
class Inversion:
    """What `run_inversion` found: the trajectory, and frames (sigma, predicted clean latent [B, C, H, W]) for a film strip."""

    trajectory: Trajectory
    frames: list[tuple[float, Tensor]]


class Recorder:
    """Collects what a run produces; one per run."""

    def __init__(self, sigmas: Tensor):
        count = len(sigmas)
        self.wanted = {round(i * (count - 1) / (PREVIEWS - 1)) for i in range(PREVIEWS)}
        self.latents: list[Tensor] = []
        self.frames: list[tuple[float, Tensor]] = []
        self.steps: list[InversionStep] = []
        self.calls = 0

    def add(self, sigma: float, latent: Tensor, denoised: Tensor) -> None:
        position = len(self.latents)
        if not bool(torch.isfinite(latent).all()):
            raise ValueError(
                f"The model produced NaN or infinite values at step {position} (sigma {sigma:.4g}) of the inversion: "
                "run the model in a wider precision (for example --force-fp32) or check its weights."
            )
        self.latents.append(latent.detach().to("cpu", torch.float32, copy=True))
        if position in self.wanted:
            self.frames.append((sigma, denoised.detach().to("cpu", torch.float32, copy=True)))


def input_scale(model_sampling):
    """The host's c_in(sigma), what a latent is multiplied by for the network (Karras et al. 2022, table 1), as a function of one float.

    Asked of the host, because it differs between the kinds of model_sampling.
    """
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)

    def scale(sigma: float) -> float:
        return float(model_sampling.calculate_input(torch.tensor([sigma], dtype=torch.float64), one))

    return scale


def _guider(model, positive: list, negative: list | None, guidance: float):
    guider = comfy.samplers.CFGGuider(model)
    # without a negative the name must be missing: the host cannot take an empty list next to a ControlNet
    guider.inner_set_conds({"positive": positive} if negative is None else {"positive": positive, "negative": negative})
    guider.set_cfg(guidance)
    return guider


@torch.no_grad()
def run_inversion(
    model,
    latent: dict,
    positive: list,
    negative: list | None = None,
    *,
    steps: int = 50,
    scheduler: str = "ddim_uniform",
    sigmas: Tensor | None = None,
    guidance: float = 1.0,
    iterations: int = 2,
    convention: str = "destination",
) -> Inversion:
    """Invert `latent` (LATENT, samples [B, C, H, W]) with `model` (MODEL) and `positive` (CONDITIONING).

    The noise levels are those of a stock sampler with the same steps and scheduler, or `sigmas` [K], turned
    round. negative is needed only for guidance other than 1. iterations and convention: see
    `ddim.invert_step`. A noise_mask does not restrict the inversion: the whole latent is inverted and the mask
    travels on in the trajectory, for the nodes that know how to keep the picture outside it.

    Raises ValueError, one sentence, for input that cannot be inverted, and the host's interrupt on Cancel;
    nothing is left behind in either case.
    """
    described = describe_model(model)
    samples = check_latent(model, latent)
    check_conditioning(model, positive, negative, guidance)
    levels, notes = inversion_sigmas(model, steps, scheduler, sigmas)
    if latent.get("noise_mask") is not None:
        notes.append(MASK_NOTE)
    if not bool(samples.any()):
        notes.append(EMPTY_NOTE)
    if not 0 <= iterations <= 5:
        raise ValueError(f"DDIM Invert takes 0 to 5 refinement iterations, but got {iterations}.")

    model_sampling = model.get_model_object("model_sampling")
    options = {
        "iterations": iterations,
        "convention": convention,
        "input_scale": input_scale(model_sampling),
        "sigma_floor": float(model_sampling.sigma_min),
    }
    calls_per_step = 1 + iterations
    total_calls = (len(levels) - 1) * calls_per_step
    show = latent_preview.prepare_callback(model, total_calls)
    record = Recorder(levels)

    def sample(denoise, y, ascending, extra_args=None, callback=None, disable=None):
        extra_args = extra_args or {}
        record.add(float(ascending[0]), y, y)
        done = shown = 0

        def denoiser(latents: Tensor, level: Tensor) -> Tensor:
            nonlocal done, shown
            comfy.model_management.throw_exception_if_processing_interrupted()
            denoised = denoise(latents, level, **extra_args)
            # asked again here because older hosts do not ask inside the network, and this may have been the last call
            comfy.model_management.throw_exception_if_processing_interrupted()
            show(min(done, total_calls - 1), denoised, latents, total_calls)
            done, shown = done + 1, done + 1
            record.calls += 1
            return denoised

        with tqdm(total=len(ascending) - 1, disable=disable) as bar:
            for step in invert(denoiser, y, ascending, **options):
                y = step.latent
                record.add(float(ascending[step.index + 1]), y, step.denoised)
                record.steps.append(step)
                # a step that stopped early jumps ahead
                done = (step.index + 1) * calls_per_step
                bar.update()
        # the last step may have stopped early, too
        if shown < total_calls:
            show(total_calls - 1, step.denoised, y, total_calls)
        return y

    started = time.perf_counter()
    _guider(model, positive, negative, guidance).sample(
        torch.zeros_like(samples),
        samples,
        comfy.samplers.KSAMPLER(sample),
        levels,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=0,
    )
    seconds = time.perf_counter() - started

    latents = torch.stack(record.latents)
    top = float(levels[-1])
    noise = latents[-1] * options["input_scale"](top)
    info = {
        "steps": len(levels) - 1,
        "scheduler": "SIGMAS input" if sigmas is not None else scheduler,
        "sigma_min": float(levels[0]),
        "sigma_max": top,
        "convention": convention,
        "iterations": iterations,
        "model_calls": record.calls,
        "seconds": round(seconds, 3),
        "noise_std": float(noise.std()) if noise.numel() > 1 else 0.0,
        "notes": notes,
        **refinement_figures(record.steps),
    }
    trajectory = Trajectory(
        sigmas=levels,
        latents=latents,
        conditioning=positive,
        guidance=float(guidance),
        info=info,
        noise_mask=latent.get("noise_mask"),
        **described,
    )
    return Inversion(trajectory, record.frames)


def refinement_figures(steps: list[InversionStep]) -> dict:
    """What the fixed-point repeats gained, from the misses measured on the way (rms, in sampler units).

    step_error_plain: mean miss of one sampling step back after plain DDIM inversion. step_error_refined: the
    same after the repeats; the last repeat itself is never measured, so this is an upper bound. None where
    nothing was measured: 0 repeats measure neither, 1 repeat measures only the first.
    """
    plain = [float(step.corrections[0].nanmean()) for step in steps if step.corrections]
    refined = []
    for step in steps:
        if len(step.corrections) > 1:
            # the smallest miss of each row is the one whose iterate was kept or improved upon
            stacked = torch.stack(step.corrections).nan_to_num(nan=math.inf)
            refined.append(float(stacked.amin(dim=0).mean()))
        elif step.corrections:
            refined.append(float(step.corrections[0].nanmean()))
    measured = any(len(step.corrections) > 1 for step in steps)
    before = sum(plain) / len(plain) if plain else None
    after = sum(refined) / len(refined) if measured else None
    gain = 20 * math.log10(before / after) if before and after else None
    return {
        "step_error_plain": before,
        "step_error_refined": after,
        "refinement_gain_db": gain,
        "steps_stopped_early": sum(bool(step.grew.any()) for step in steps),
    }


@torch.no_grad()
def run_reconstruction(model, trajectory: Trajectory, positive: list | None = None, negative: list | None = None) -> Tensor:
    """Sample back from the trajectory's noisy end with the host's euler (= DDIM), along its own sigmas.

    positive: overrides the conditioning the trajectory holds. Guidance is the trajectory's; other than 1 it
    needs `negative`. Returns samples [B, C, H, W], float32 on the CPU, in the scaling of a LATENT wire.

    Raises ValueError, one sentence, for a model that did not make the trajectory or conditioning that is missing.
    """
    start = start_latent(trajectory, model)["samples"]
    what = "trajectory's" if positive is None else "positive"
    positive = trajectory.conditioning if positive is None else positive
    check_conditioning(model, positive, negative, trajectory.guidance, what)
    levels = trajectory.sigmas.flip(0)
    samples = _guider(model, positive, negative, trajectory.guidance).sample(
        torch.zeros_like(start),
        start,
        comfy.samplers.ksampler("euler"),
        levels,
        callback=latent_preview.prepare_callback(model, len(levels) - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=0,
    )
    return samples.to("cpu", torch.float32)
