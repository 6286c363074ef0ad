"""Masks of FreeCustom's reference concepts: from a painted mask to tokens of each attention layer (pure torch).

Multi-reference self-attention (Ding et al., CVPR 2024) lets a picture attend to masked tokens of reference pictures. The
authors' code squashes picture and mask to a square, keeps mask pixels that are exactly 255, and takes the top left pixel of
each cell; that is kept here as an option. By default the aspect is kept and a token is kept when enough of its cell is masked.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

CROP, WHOLE, SQUASH = RESIZES = ("crop", "whole", "squash (published)")
AREA, PUBLISHED = MASK_POLICIES = ("area", "255 only (published)")
PUBLISHED_SIDE = 128  # the authors' code takes every mask through this size
CELL = 8  # pixels per latent cell


class Fit(NamedTuple):
    """The part of a picture that is used, and the size (height, width) it gets. All in pixels."""

    top: int
    left: int
    height: int
    width: int
    size: tuple[int, int]

    def part(self, tensor: Tensor) -> Tensor:
        """That part of a tensor [..., H, W]."""
        return tensor[..., self.top : self.top + self.height, self.left : self.left + self.width]


class Selection(NamedTuple):
    """What the mask of one reference says about the n tokens of a layer, row by row.

    weighted: [n] float32, weight times mask. indices: [m] int64, tokens where that is not zero. bias: [m] float32, the
    product there.
    """

    weighted: Tensor
    indices: Tensor
    bias: Tensor


def _start(length: int, part: int, marked: Tensor) -> int:
    """Where a part begins along one axis, so that the marked stretch (bool [length]) lies in its middle, or else the axis's middle."""
    found = marked.nonzero()
    middle = (float(found[0]) + float(found[-1]) + 1) / 2 if len(found) else length / 2
    return min(max(0, round(middle - part / 2)), length - part)


def fit(picture: tuple[int, int], size: tuple[int, int], resize: str = CROP, mask: Tensor | None = None) -> Fit:
    """How a picture of (height, width) pixels becomes one of `size`.

    crop: its largest part of the wanted aspect, placed so that what the mask [height, width] marks (0.5 and more) lies in
    its middle. whole: all of it, with its own aspect and about as many pixels as `size` has. squash: all of it, stretched to
    `size`, as in the authors' code. Raises ValueError, one sentence, for an unknown resize.
    """
    height, width = picture
    if resize == SQUASH:
        return Fit(0, 0, height, width, tuple(size))
    if resize == WHOLE:
        scale = math.sqrt(size[0] * size[1] / (height * width))
        return Fit(0, 0, height, width, tuple(max(CELL, round(side * scale / CELL) * CELL) for side in picture))
    if resize != CROP:
        raise ValueError(f'There is no way to resize called "{resize}": choose one of {", ".join(RESIZES)}.')
    part_height = min(height, max(1, round(width * size[0] / size[1])))
    part_width = min(width, max(1, round(height * size[1] / size[0])))
    marked = torch.zeros(height, width, dtype=torch.bool) if mask is None else mask.cpu() >= 0.5
    return Fit(_start(height, part_height, marked.any(1)), _start(width, part_width, marked.any(0)), part_height, part_width, tuple(size))


def resize_picture(image: Tensor, chosen: Fit, resize: str = CROP) -> Tensor:
    """IMAGE [B, H, W, C] in 0..1 cut and resized to [B, *chosen.size, C]: bicubic with antialiasing, or nearest where it is squashed as published."""
    part = chosen.part(image.movedim(-1, 1).float())
    if resize == SQUASH:
        part = torch.nn.functional.interpolate(part, size=chosen.size, mode="nearest")
    elif tuple(part.shape[-2:]) != tuple(chosen.size):
        part = torch.nn.functional.interpolate(part, size=chosen.size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return part.movedim(1, -1)


def match(mask: Tensor, picture: tuple[int, int], policy: str = AREA) -> Tensor:
    """A mask [h, w] at the size of its picture. The published way has no such step; nearest adds no grey to it."""
    if tuple(mask.shape) == tuple(picture):
        return mask.float()
    return torch.nn.functional.interpolate(mask.float()[None, None], size=picture, mode="area" if policy == AREA else "nearest")[0, 0]


def prepare_mask(mask: Tensor, chosen: Fit, policy: str = AREA) -> Tensor:
    """A MASK [H, W] in 0..1 of the whole picture, cut as its picture was: what `layer_mask` starts from.

    area: mean coverage, at the size of the resized picture. published: 0 or 1, [128, 128], 1 only where the nearest pixel has the
    8-bit value 255. Raises ValueError, one sentence, for an unknown policy.
    """
    part = chosen.part(mask.float())[None, None]
    if policy == AREA:
        return torch.nn.functional.interpolate(part, size=chosen.size, mode="area")[0, 0]
    if policy != PUBLISHED:
        raise ValueError(f'There is no mask policy "{policy}": choose one of {", ".join(MASK_POLICIES)}.')
    grey = (part * 255).round()
    return (torch.nn.functional.interpolate(grey, size=(PUBLISHED_SIDE, PUBLISHED_SIDE), mode="nearest")[0, 0] == 255).float()


def layer_mask(prepared: Tensor, size: tuple[int, int], policy: str = AREA, threshold: float = 0.5) -> Tensor:
    """The mask of a layer with (height, width) tokens, float32 of 0 and 1, from `prepare_mask`.

    area: 1 where at least `threshold` of the token's cell is covered (and anything at all). published: the value at the top
    left of the cell.
    """
    if policy == PUBLISHED:
        return torch.nn.functional.interpolate(prepared[None, None], size=tuple(size), mode="nearest")[0, 0]
    covered = torch.nn.functional.interpolate(prepared[None, None], size=tuple(size), mode="area")[0, 0]
    # means of float32 may fall short of what they stand for by a rounding
    return ((covered >= threshold - 1e-6) & (covered > 0)).float()


def attention_sizes(latent: tuple[int, int], levels: int = 4) -> list[tuple[int, int]]:
    """(height, width) in tokens of the UNet's levels, finest first: each half of the one above, rounded up.

    latent: (height, width) in latent cells.
    """
    return [tuple(-(-side // 2**level) for side in latent) for level in range(levels)]


def select(mask: Tensor, weight: float) -> Selection:
    """The kept tokens of a layer mask [h, w] and their additive bias on the logits (the rule of the authors' code).

    A product of exactly 0 counts as masked out, so weight 0 keeps nothing; negative weights attenuate. Grey masks give grey biases.
    """
    weighted = mask.float().flatten() * weight
    indices = weighted.nonzero()[:, 0]
    return Selection(weighted, indices, weighted[indices])
