"""The mask over the picture, with the box and the points it came from."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..common.pictures import spotlight
from .prompts import Prompt

BOX, WANTED, UNWANTED = (255, 220, 60), (60, 220, 90), (230, 60, 60)


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
