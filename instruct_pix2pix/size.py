"""The size at which a picture is edited, and bringing pictures and masks to it."""

from __future__ import annotations

import torch
from torch import Tensor

CELL = 64  # both sides are multiples of this: what the UNet halves three times in latents of 1/8 size
MOST = 4  # times the longer side that was asked for, at which a picture is too narrow for the rule


def edit_size(width: int, height: int, longer_side: int = 512) -> tuple[int, int]:
    """(width, height) in pixels at which the authors' program edits a picture of width x height pixels, in whole numbers.

    The shorter side becomes the next multiple of 64 above its share of `longer_side`, the longer side what that leaves, cut to a multiple
    of 64; small pictures are enlarged. In floating point, as published (edit_cli.py), 6 % of sizes come out 64 pixels short.
    Raises ValueError, one sentence, for a longer side below 64 and for a picture so narrow that its longer side would pass 4 x longer_side.
    """
    if longer_side < CELL:
        raise ValueError(f"longer_side is {longer_side} px, but a picture is edited at {CELL} px or more: set it to {CELL} or more (512 is published), or to 0 to keep the size.")
    long, short = max(width, height), min(width, height)
    fitted_short = -(-short * longer_side // (CELL * long)) * CELL
    fitted_long = long * fitted_short // (short * CELL) * CELL
    if fitted_long > MOST * longer_side:
        raise ValueError(
            f"A picture of {width} x {height} px is too narrow for the published size rule, which would make it {fitted_long} px long: crop it, or set longer_side to 0 "
            "to keep its size."
        )
    return (fitted_long, fitted_short) if width >= height else (fitted_short, fitted_long)


def kept_size(width: int, height: int, multiple: int) -> tuple[int, int]:
    """(width, height) of a picture that keeps its size, cut to multiples of so many pixels. Raises ValueError, one sentence, when nothing is left."""
    if width < multiple or height < multiple:
        raise ValueError(f"A picture of {width} x {height} px is too small to be edited: both sides need {multiple} px or more, so enlarge it.")
    return width - width % multiple, height - height % multiple


def _cut(planes: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle (width, height) of [B, C, H, W]."""
    (width, height), (left, top) = size, ((planes.shape[3] - size[0]) // 2, (planes.shape[2] - size[1]) // 2)
    return planes[:, :, top : top + height, left : left + width]


def fit_picture(image: Tensor, size: tuple[int, int], resample: bool) -> Tensor:
    """IMAGE [B, H, W, 3] in 0..1 at (width, height): the middle part of its shape, resized by Lanczos as published, or cut where nothing is to be resampled."""
    import comfy.utils

    planes = image.movedim(-1, 1)
    if not resample or tuple(planes.shape[2:]) == (size[1], size[0]):
        return _cut(planes, size).movedim(1, -1).contiguous()
    # the host resizes in 8 bits and cuts fractions off: half a step more makes it round
    return comfy.utils.common_upscale(planes + 0.5 / 255, size[0], size[1], "lanczos", "center").movedim(1, -1)


def fit_mask(mask: Tensor, picture: tuple[int, int], size: tuple[int, int], resample: bool) -> Tensor:
    """MASK [B, h, w] in 0..1 of a picture of (width, height), brought along to `size` as `fit_picture` brings the picture: [B, height, width].

    A mask of another size than its picture is stretched over it first.
    """
    import comfy.utils

    planes = mask[:, None].float()
    if tuple(planes.shape[2:]) != (picture[1], picture[0]):
        planes = torch.nn.functional.interpolate(planes, (picture[1], picture[0]), mode="bilinear")
    if not resample or picture == size:
        return _cut(planes, size)[:, 0].contiguous()
    return comfy.utils.common_upscale(planes, size[0], size[1], "area", "center")[:, 0]
