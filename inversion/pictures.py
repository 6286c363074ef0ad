"""Latents of a run as pictures: through a VAE, or the host's quick preview."""

from __future__ import annotations

import torch
from torch import Tensor

from .filmstrip import latent_to_rgb
from .trajectory import sampler_to_latent


def to_pictures(model, latents: Tensor, vae=None) -> Tensor:
    """Pictures [N, H, W, 3] in 0..1 (CPU, float32) of latents [N, C, h, w] in sampler scaling.

    vae: the host's VAE, which batches and offloads by itself; None gives the host's latent preview, at latent
    size. Raises ValueError, one sentence, when the VAE does not fit the model's latents.
    """
    if vae is None:
        return latent_to_rgb(model.get_model_object("latent_format"), latents)
    channels = getattr(vae, "latent_channels", latents.shape[1])
    if channels != latents.shape[1]:
        raise ValueError(
            f"The VAE decodes latents of {channels} channels, but the model's have {latents.shape[1]}: connect the VAE of this model's checkpoint."
        )
    pictures = vae.decode(sampler_to_latent(model, latents))
    return pictures.reshape(-1, *pictures.shape[-3:])[..., :3].to("cpu").float().clamp(0, 1)


def decode_frames(model, frames: list[Tensor], vae=None) -> Tensor:
    """Pictures [sum of N, H, W, 3] of several latents [N, C, h, w], one after the other.

    With a VAE, under a progress bar of its own, and Cancel is heard between two of them. Raises as `to_pictures`
    does, and the host's interrupt.
    """
    import comfy.model_management
    import comfy.utils

    bar = comfy.utils.ProgressBar(len(frames)) if vae is not None else None
    pictures = []
    for latents in frames:
        comfy.model_management.throw_exception_if_processing_interrupted()
        pictures.append(to_pictures(model, latents, vae))
        if bar is not None:
            bar.update(1)
    return torch.cat(pictures)
