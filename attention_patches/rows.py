"""From features of the source's rows to features of the rows of a UNet call (pure torch).

The host puts several pieces of conditioning ("chunks") into one UNet call, each with all latents of the batch, chunk by
chunk. A chunk is the whole picture or, for an area prompt, a rectangle of it. Features are stored once for the whole
picture of the source; here they are cut and repeated to fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Feature:
    """Stored features of one point. tensor: [B, H*W, C] tokens or [B, C, H, W]; size: (H, W)."""

    tensor: Tensor
    size: tuple[int, int]


@dataclass(frozen=True)
class Area:
    """A rectangle of the latent picture, in latent cells."""

    y: int
    x: int
    height: int
    width: int


class LayoutMismatch(Exception):
    """The rows or the picture size of a UNet call are not the ones the source was run with."""


def _cut(feature: Feature, area: Area, picture: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The part of a feature map that lies under `area`; `size` is what the call has at this layer."""
    height, width = feature.size
    if size[0] > height or size[1] > width:
        raise LayoutMismatch(f"{size[0]}x{size[1]} features are asked for, but the source has {height}x{width}")
    # the scale comes from both shapes, because odd sizes are rounded up at each level
    top = min(round(area.y * height / picture[0]), height - size[0])
    left = min(round(area.x * width / picture[1]), width - size[1])
    tensor = feature.tensor
    if tensor.ndim == 4:
        return tensor[:, :, top : top + size[0], left : left + size[1]]
    grid = tensor.unflatten(1, (height, width))[:, top : top + size[0], left : left + size[1]]
    return grid.flatten(1, 2)


def expand(feature: Feature, areas: tuple[Area | None, ...], batch: int, picture: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Features for all rows of a call: chunk by chunk, each with `batch` latents. Always a fresh tensor.

    areas: one per chunk, None for the whole picture. picture: (H, W) of the source latent. size: (H, W) of the call's
    features at this layer. One source row serves every latent; as many source rows as latents are matched one to one.
    Raises LayoutMismatch when neither rows nor sizes fit.
    """
    rows = feature.tensor.shape[0]
    if rows not in (1, batch):
        raise LayoutMismatch(f"the call has {batch} latents, the source {rows}")
    tail = (1,) * (feature.tensor.ndim - 1)
    if all(area is None for area in areas):
        if tuple(feature.size) != tuple(size):
            raise LayoutMismatch(f"the call has {size[0]}x{size[1]} features, the source {feature.size[0]}x{feature.size[1]}")
        # repeat copies even when there is nothing to repeat: later patches may write in place
        return feature.tensor.repeat(len(areas) * batch // rows, *tail)
    whole = Area(0, 0, *picture)
    return torch.cat([_cut(feature, area or whole, picture, size).expand(batch, *[-1] * len(tail)) for area in areas])
