"""The mask over the picture, with the box and the points it came from."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .prompts import Prompt

DIMMED = 0.3  # brightness of what the mask leaves out
EDGE = (1.0, 0.45, 0.1)
BOX, WANTED, UNWANTED = (255, 220, 60), (60, 220, 90), (230, 60, 60)


def spotlight(picture: Tensor, mask: Tensor) -> Tensor:
    """The picture [H, W, 3] in 0..1, dark where the mask [H, W] in 0..1 is black, with a line along the mask's edge."""
    mask = mask.to(picture)
    lit = picture * (DIMMED + (1 - DIMMED) * mask)[..., None]
    reach = 1 + max(picture.shape[:2]) // 400
    # what the widened mask has besides the mask itself
    inside = (mask > 0.5).to(picture)
    line = torch.nn.functional.max_pool2d(inside[None, None], 2 * reach + 1, 1, reach)[0, 0] - inside
    return torch.lerp(lit, torch.tensor(EDGE).to(picture).expand_as(lit), line[..., None])


def draw_prompt(picture: Tensor, prompt: Prompt) -> Tensor:
    """The picture [H, W, 3] with the prompt's box and points drawn on it: green is wanted, red is not."""
    image = Image.fromarray((picture.clamp(0, 1) * 255).round().to("cpu", torch.uint8).numpy())
    draw, size = ImageDraw.Draw(image), max(image.size)
    if prompt.box is not None:
        x1, y1, x2, y2 = prompt.box
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), outline=BOX, width=1 + size // 400)
    radius = 2 + size // 100
    for (x, y), wanted in zip(prompt.points, prompt.wanted):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=WANTED if wanted else UNWANTED, outline=(255, 255, 255))
    return torch.from_numpy(np.asarray(image).copy()).float() / 255


def previews(pictures: Tensor, masks: Tensor, prompt: Prompt) -> Tensor:
    """IMAGE [B, H, W, 3]: each picture [B, H, W, 3] under its mask [B, H, W], with the prompt."""
    return torch.stack([draw_prompt(spotlight(picture.cpu().float(), mask.cpu()), prompt) for picture, mask in zip(pictures, masks)])
