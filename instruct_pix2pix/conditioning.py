"""The picture of an edit: encoded, attached to the prompts, and the latent to start from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention_patches.host import log
from ..common.pictures import rgb
from .size import edit_size, fit_mask, fit_picture, kept_size

IMAGE_KEY = "concat_latent_image"  # under which the host's edit models look for the picture's latent
LATENT_CHANNELS = 4


@dataclass(frozen=True)
class EditInputs:
    """What a sampler needs for an edit.

    positive, negative: the prompts with the picture. no_image: the negative without it, the third conditioning of InstructPix2Pix.
    latent: LATENT to start from. picture: IMAGE [B, height, width, 3] that was encoded.
    """

    positive: list
    negative: list
    no_image: list
    latent: dict
    picture: Tensor

    def describe(self) -> str:
        """A line for people."""
        count, height, width = self.picture.shape[:3]
        masked = ""
        if "noise_mask" in self.latent:
            share = 100 * float(self.latent["noise_mask"].mean())
            masked = f", {share:.0f} % of the picture may change"
        return f"{count} picture{'s' if count > 1 else ''} edited at {width} x {height} px{masked}"


def with_image(conditioning: list, latent: Tensor) -> list:
    """CONDITIONING that carries the picture's latent [B, 4, h, w], as the VAE gives it; in place of one it carried."""
    import node_helpers

    return node_helpers.conditioning_set_values(conditioning, {IMAGE_KEY: latent})


def without_image(conditioning: list) -> list:
    """CONDITIONING without a picture; the model then sees zeros."""
    return [[tokens, {key: value for key, value in extra.items() if key != IMAGE_KEY}] for tokens, extra in conditioning]


def encode_picture(vae, picture: Tensor) -> Tensor:
    """The latent [B, 4, height / 8, width / 8] that the VAE of an edit checkpoint gives, not scaled by 0.18215: what the model was trained on (section 3.2).

    Raises ValueError, one sentence, for a VAE of another family and for latents that are not finite.
    """
    latent = vae.encode(picture)
    if latent.ndim != 4 or latent.shape[1] != LATENT_CHANNELS:
        raise ValueError(
            f"The VAE gives latents of shape {list(latent.shape)}, but edit models read pictures of {LATENT_CHANNELS} channels: connect the VAE of the edit checkpoint."
        )
    if not bool(torch.isfinite(latent).all()):
        raise ValueError("The VAE gives NaN or infinite values for this picture: check the picture, or run the VAE in a wider precision (--fp32-vae).")
    return latent


def start_latent(encoded: Tensor, mask: Tensor | None) -> dict:
    """LATENT to sample from at denoise 1. encoded: [B, 4, h, w]. mask: [1 or B, H, W] in 0..1 at the picture's size, white may change.

    Without a mask zeros, so that the run starts from noise alone, as published. With one the picture, which the host keeps where the mask is
    black, and zeros in every cell that is wholly white.
    """
    if mask is None:
        return {"samples": torch.zeros_like(encoded)}
    if not bool((mask > 0).any()):
        log.warning("Palimpsest: the mask is black everywhere, so the edit changes nothing; paint white where the picture may change.")
    cell = mask.shape[-1] // encoded.shape[-1]
    # a cell's smallest value: the host's resized mask is 1 there as well
    free = -torch.nn.functional.max_pool2d(-mask[:, None].to(encoded), cell) >= 1
    return {"samples": torch.where(free, torch.zeros_like(encoded), encoded), "noise_mask": mask[:, None]}


def edit_inputs(positive: list, negative: list, vae, image: Tensor, longer_side: int = 512, mask: Tensor | None = None) -> EditInputs:
    """Encode pictures for an edit model and attach them to its prompts.

    positive, negative: host CONDITIONING, the instruction and what takes its place in guidance (an empty prompt as published).
    image: IMAGE [B, H, W, 1, 3 or 4] in 0..1, one latent of the run per picture. longer_side: pixels, by `size.edit_size`; 0 keeps the size but
    for a multiple of the VAE's cells. mask: MASK [1 or B, h, w], white may change.
    Raises ValueError, one sentence: no picture, no prompt, another count of masks than of pictures, and what `edit_size`, `encode_picture` and `rgb` refuse.
    """
    if 0 in image.shape:
        raise ValueError(f"There is no picture to edit (shape {list(image.shape)}): connect one.")
    for name, conditioning in (("positive", positive), ("negative", negative)):
        if not conditioning:
            raise ValueError(f"The {name} holds no prompt: connect a CLIP Text Encode (an empty text is fine).")
    if mask is not None:
        mask = mask.reshape(-1, *mask.shape[-2:])
        if len(mask) not in (1, len(image)):
            raise ValueError(f"There are {len(mask)} masks for {len(image)} picture{'s' if len(image) > 1 else ''}: give one mask, or one for each picture.")
    whole = (int(image.shape[2]), int(image.shape[1]))
    resample = longer_side > 0
    size = edit_size(*whole, longer_side) if resample else kept_size(*whole, int(vae.spacial_compression_encode()))
    picture = fit_picture(rgb(image), size, resample)
    if mask is not None:
        mask = fit_mask(mask, whole, size, resample)
    encoded = encode_picture(vae, picture)
    return EditInputs(with_image(positive, encoded), with_image(negative, encoded), without_image(negative), start_latent(encoded, mask), picture)
