"""Pictures on the wire: channels, and masks over them (pure torch)."""

from __future__ import annotations

import torch
from torch import Tensor

DIMMED = 0.3  # brightness of what the mask leaves out
EDGE = (1.0, 0.45, 0.1)


def rgb(image: Tensor) -> Tensor:
    """IMAGE [B, H, W, 1 | 3 | 4] -> RGB [B, H, W, 3]; grey is repeated, transparency laid on white.

    Values stay as they are. Raises ValueError for other channel counts.
    """
    channels = image.shape[-1]
    if channels == 3:
        return image
    if channels == 1:
        return image.expand(*image.shape[:-1], 3)
    if channels == 4:
        return image[..., :3] * image[..., 3:] + (1 - image[..., 3:])
    raise ValueError(f"A reference picture has 1, 3 or 4 channels, but this one has {channels}: connect a plain IMAGE.")


def spotlight(picture: Tensor, mask: Tensor) -> Tensor:
    """The picture [H, W, 3] in 0..1, dark where the mask [H, W] in 0..1 is black, with a line along the mask's edge."""
    mask = mask.to(picture)
    lit = picture * (DIMMED + (1 - DIMMED) * mask)[..., None]
    reach = 1 + max(picture.shape[:2]) // 400
    # what the widened mask has besides the mask itself
    inside = (mask > 0.5).to(picture)
    line = torch.nn.functional.max_pool2d(inside[None, None], 2 * reach + 1, 1, reach)[0, 0] - inside
    return torch.lerp(lit, torch.tensor(EDGE).to(picture).expand_as(lit), line[..., None])
