"""The pictures before and after an edit: what is refused, and their latents."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.pictures import rgb
from .instruction import plain


@dataclass(frozen=True, eq=False)
class Pairs:
    """N aligned pairs. before, after: [N, H, W, 3] in 0..1. image: [N, C, h, w], the VAE's latents of before; target: those of after. Both in
    the scaling of a LATENT wire, float32 on the CPU, no inference tensors.
    """

    before: Tensor
    after: Tensor
    image: Tensor
    target: Tensor

    @property
    def hashes(self) -> list[str]:
        """One short hash per picture, all before first."""
        pictures = torch.cat([self.before, self.after])
        return [hashlib.sha256((picture.clamp(0, 1) * 255).round().to(torch.uint8).numpy().tobytes()).hexdigest()[:16] for picture in pictures]


def check_pairs(before: Tensor, after: Tensor) -> None:
    """Raises ValueError, one sentence, unless two IMAGEs are the same number of pictures of one size, and differ."""
    for image, name in ((before, "before"), (after, "after")):
        if image is None or image.ndim != 4 or 0 in image.shape:
            shape = "nothing" if image is None else list(image.shape)
            raise ValueError(f"An instruction is learned from a picture before and a picture after the edit, but {name} is {shape}: connect both.")
    if len(before) != len(after):
        raise ValueError(
            f"Every pair needs a picture before and one after the edit, but there are {len(before)} before and {len(after)} after: "
            "give both inputs as many pictures, in the same order."
        )
    if before.shape[1:3] != after.shape[1:3]:
        sizes = [f"{image.shape[2]} x {image.shape[1]}" for image in (before, after)]
        raise ValueError(f"The pictures of a pair must be of one size and aligned, but before is {sizes[0]} and after {sizes[1]} pixels: scale or crop one of them.")
    if torch.equal(rgb(before), rgb(after)):
        raise ValueError("The pictures before and after are the same, so there is no edit to learn: connect the edited picture to after.")


def encode_pairs(vae, before: Tensor, after: Tensor, channels: int) -> Pairs:
    """Both sides through the VAE's mode. channels: of the model's latents. Raises ValueError, one sentence, as `check_pairs` does, and for a VAE of another model."""
    import comfy.model_management

    check_pairs(before, after)
    found = []
    for image in (before, after):
        comfy.model_management.throw_exception_if_processing_interrupted()
        latents = vae.encode(rgb(image))
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise ValueError(
                f"The VAE gives latents of shape {list(latents.shape)}, but the model works on {channels} channels: connect the VAE of the edit model's checkpoint."
            )
        if not bool(torch.isfinite(latents).all()):
            raise ValueError("The VAE gives NaN or infinite values: check the pictures, or run the VAE in a wider precision (--fp32-vae).")
        found.append(plain(latents))
    return Pairs(plain(rgb(before)), plain(rgb(after)), *found)
