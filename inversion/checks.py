"""What can be inverted: every refusal is one sentence, before the model is loaded."""

from __future__ import annotations

import torch
from torch import Tensor

# FlipSigmas cannot keep a zero and writes this instead
FLIPPED_ZERO = 1e-4


def check_latent(model, latent: dict) -> Tensor:
    """The samples [B, C, H, W] float32 of a LATENT, fit for `model`. Raises ValueError otherwise."""
    samples = latent["samples"]
    if getattr(samples, "is_nested", False) or samples.ndim != 4:
        shape = "several nested tensors" if getattr(samples, "is_nested", False) else list(samples.shape)
        raise ValueError(f"DDIM Invert needs the latent of pictures, [batch, channels, height, width], but got {shape}: connect VAE Encode.")
    if 0 in samples.shape:
        raise ValueError(f"The latent is empty (shape {list(samples.shape)}): connect VAE Encode with at least one picture.")
    channels = model.get_model_object("latent_format").latent_channels
    if samples.shape[1] != channels:
        raise ValueError(
            f"The latent has {samples.shape[1]} channels, but the model works on {channels}: encode the picture with the VAE of this model."
        )
    bad = int((~torch.isfinite(samples)).sum())
    if bad:
        raise ValueError(
            f"The latent holds {bad} NaN or infinite values of {samples.numel()}: check the picture, or run the VAE in a wider "
            "precision (--fp32-vae)."
        )
    return samples.to(torch.float32)


def check_conditioning(model, positive: list | None, negative: list | None, guidance: float, what: str = "positive") -> None:
    """Raises ValueError unless there is a prompt of this MODEL's text encoder, and a negative one where guidance needs it.

    positive, negative: host CONDITIONING. what: where positive comes from, for the message.
    """
    from ..attention_patches import host, source

    if not positive:
        raise ValueError("There is no conditioning to run the model with: connect a prompt that describes the picture (an empty one is fine).")
    if guidance != 1.0 and not negative:
        raise ValueError(
            f"Guidance {guidance:g} needs a negative conditioning, but none is connected: connect one, or set guidance to 1 (recommended for inversion)."
        )
    for conditioning, name in ((positive, what), (negative, "negative")):
        # without their options: an inversion, unlike an edit's source, may be made of areas
        if conditioning:
            source.check_conditioning([(tokens, {}) for tokens, _ in conditioning], host.token_width(model), name)


def inversion_sigmas(model, steps: int, scheduler: str, sigmas: Tensor | None = None) -> tuple[Tensor, list[str]]:
    """The ascending noise levels [K] float32 of an inversion, and remarks for the report.

    Without `sigmas`: the schedule a stock KSampler has at denoise 1, for the model's own model_sampling, turned
    round. With `sigmas` [K]: those, in either direction; steps and scheduler are ignored. Raises ValueError for
    zero steps, an unknown scheduler, and levels that are not finite, not negative and strictly monotonic.
    """
    import comfy.samplers

    notes = []
    if sigmas is None:
        if steps < 1:
            raise ValueError(f"DDIM Invert needs at least 1 step, but steps is {steps}.")
        if scheduler not in comfy.samplers.SCHEDULER_NAMES:
            raise ValueError(f"There is no scheduler called {scheduler}: choose one of {', '.join(comfy.samplers.SCHEDULER_NAMES)}.")
        origin = f"scheduler {scheduler} with {steps} steps"
        levels = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)
        if len(levels) - 1 != steps:
            notes.append(f"{scheduler} makes {len(levels) - 1} steps when asked for {steps}; the sampler must be set to {steps} as well")
    else:
        origin = "SIGMAS input"
        levels = sigmas
    levels = levels.detach().to("cpu", torch.float32).flatten()
    if len(levels) < 2:
        raise ValueError(f"DDIM Invert needs at least two noise levels (one step), but the {origin} gives {len(levels)}.")
    if levels[0] > levels[-1]:
        levels = levels.flip(0)
    elif sigmas is not None and abs(float(levels[0]) - FLIPPED_ZERO) < 1e-8:
        levels = torch.cat([levels.new_zeros(1), levels[1:]])
        notes.append("the first sigma 0.0001 of FlipSigmas was taken as 0 (DDIM Invert turns the schedule round by itself)")
    if not bool(torch.isfinite(levels).all()) or bool((levels < 0).any()):
        raise ValueError(f"The noise levels of the {origin} must be finite and not negative, but they are not: choose another schedule.")
    if not bool((levels[1:] > levels[:-1]).all()):
        raise ValueError(
            f"The noise levels of the {origin} must fall (or rise) strictly from one step to the next, but they repeat or turn back: "
            "use fewer steps or another schedule."
        )
    if float(levels[0]) > 0:
        notes.append(f"the schedule ends at sigma {float(levels[0]):.4g}, not 0; the latent is taken to be at that level")
    return levels, notes
