"""Pictures of a path: latents to colors, tiles with captions, strips, comparisons."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

TILE = 192
CAPTION = 18


def latent_to_rgb(latent_format, latents: Tensor) -> Tensor:
    """Colors of latents [N, C, H, W] in sampler scaling, without a VAE: [N, H, W, 3] in 0..1 at latent size.

    Uses the host's latent previewer and the factors of the model's latent format; a format without factors
    shows its first three channels.
    """
    import latent_preview

    latents = latents.detach().to("cpu", torch.float32)
    factors = latent_format.latent_rgb_factors
    if factors is None:
        colors = latents[:, [0, min(1, latents.shape[1] - 1), min(2, latents.shape[1] - 1)]].movedim(1, -1)
        return (colors / (colors.flatten(1).std(dim=1).view(-1, 1, 1, 1) * 4 + 1e-6) + 0.5).clamp(0, 1)
    previewer = latent_preview.Latent2RGBPreviewer(factors, latent_format.latent_rgb_factors_bias)
    pictures = [np.asarray(previewer.decode_latent_to_preview(latent[None])) for latent in latents]
    return torch.from_numpy(np.stack(pictures)).float() / 255.0


def tile(picture: Tensor, caption: str, longest: int = TILE) -> Image.Image:
    """One picture [H, W, 3] in 0..1 scaled to `longest` pixels on its longer side, with a caption under it."""
    image = Image.fromarray((picture.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())
    scale = longest / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.NEAREST if scale >= 4 else Image.Resampling.LANCZOS)
    framed = Image.new("RGB", (image.width + 2, image.height + CAPTION + 2), (24, 24, 24))
    framed.paste(image, (1, 1))
    ImageDraw.Draw(framed).text((4, image.height + 4), caption, fill=(225, 225, 225), font=ImageFont.load_default())
    return framed


def strip(rows: list[list[tuple[Tensor, str]]]) -> Tensor:
    """Rows of (picture [H, W, 3], caption) as one picture [1, H', W', 3] in 0..1; all pictures of one size."""
    drawn = [[tile(picture, caption) for picture, caption in row] for row in rows]
    width = max(sum(image.width for image in row) for row in drawn)
    height = sum(row[0].height for row in drawn)
    sheet = Image.new("RGB", (width, height), (24, 24, 24))
    y = 0
    for row in drawn:
        x = 0
        for image in row:
            sheet.paste(image, (x, y))
            x += image.width
        y += row[0].height
    return torch.from_numpy(np.asarray(sheet).copy()).float()[None] / 255.0
