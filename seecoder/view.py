"""Which regions of a reference picture SeeCoder's queries read, as pictures."""

from __future__ import annotations

import torch
from torch import Tensor

from ..inversion.filmstrip import strip
from .sizes import GLOBAL, LEVELS, STRIDES

GLOW = (1.0, 0.45, 0.1)
PIXELS = dict(zip(LEVELS, STRIDES))
LONGEST = 512  # pixels of a picture on the sheet, before it is scaled to a tile


def heat(maps: Tensor) -> Tensor:
    """[h, w] in 0..1 from the maps [n, h, w] of several queries: their mean, its largest value 1."""
    mean = maps.float().mean(0)
    return mean / mean.max().clamp(min=1e-12)


def overlay(picture: Tensor, shares: Tensor, cell: float) -> Tensor:
    """The picture [H, W, 3], dark where little is read and glowing where most is; shares [h, w] in 0..1, `cell` pixels per share."""
    height, width = picture.shape[:2]
    size = (max(height, round(shares.shape[0] * cell)), max(width, round(shares.shape[1] * cell)))
    # cells are counted from the top left, the last ones reach over the border
    shares = torch.nn.functional.interpolate(shares[None, None], size=size, mode="bilinear", align_corners=False)[0, 0, :height, :width, None]
    return (picture * (0.2 + 0.6 * shares) + 0.45 * shares * torch.tensor(GLOW)).clamp(0, 1)


def comparison(pictures: Tensor, readings: list[list[tuple[str, Tensor]]], encoded: tuple[int, int]) -> Tensor:
    """A sheet [1, H', W', 3], one row per reference: picture, what the local queries read per level, what the global ones do.

    pictures: RGB [B, H, W, 3] in 0..1. readings: per picture, (level, maps [1, queries, h, w]) as `encode_pictures` collects them.
    encoded: (height, width) at which they were encoded.
    """
    rows = []
    for number, (picture, maps) in enumerate(zip(pictures.cpu().float(), readings), 1):
        height, width = picture.shape[:2]
        scale = min(1.0, LONGEST / max(height, width))
        small = torch.nn.functional.interpolate(picture.movedim(-1, 0)[None], size=(max(1, round(height * scale)), max(1, round(width * scale))), mode="area")[0].movedim(0, -1)
        # `maps` belong to the encoded picture, which may have another size than the one shown
        unit = small.shape[1] / encoded[1]
        row = [(small, f"reference {number}: {width} x {height} px")]
        for level, seen in maps:
            row.append((overlay(small, heat(seen[0, GLOBAL:]), PIXELS[level] * unit), f"local queries, 1/{PIXELS[level]} size"))
        # a level's cells differ in number, so their maps are added at the finest size
        finest = max((seen.shape[-2:] for _, seen in maps), key=lambda size: size[0] * size[1])
        whole = sum(torch.nn.functional.interpolate(seen[:, :GLOBAL].float(), size=tuple(finest), mode="bilinear", align_corners=False)[0] for _, seen in maps)
        row.append((overlay(small, heat(whole), min(PIXELS[level] for level, _ in maps) * unit), "global queries, all levels"))
        rows.append(row)
    return strip(rows)


def describe(readings: list[list[tuple[str, Tensor]]]) -> str:
    """How much each picture is concentrated on: the share of cells that takes half of what the local queries read."""
    lines = []
    for number, maps in enumerate(readings, 1):
        parts = []
        for level, seen in maps:
            shares = seen[0, GLOBAL:].float().mean(0).flatten().sort(descending=True).values
            half = int((shares.cumsum(0) < 0.5 * shares.sum()).sum()) + 1
            parts.append(f"1/{PIXELS[level]} size {100 * half / len(shares):.0f} %")
        lines.append(f"reference {number}: half of the reading falls on " + ", ".join(parts) + " of the cells")
    return "\n".join(lines)
