"""Which regions of a reference picture SeeCoder's queries read, as pictures."""

from __future__ import annotations

import torch
from torch import Tensor

from ..inversion.filmstrip import strip
from .sizes import GLOBAL

GLOW = (1.0, 0.45, 0.1)
STRIDES = {"res3": 8, "res4": 16, "res5": 32}


def heat(maps: Tensor) -> Tensor:
    """[h, w] in 0..1 from the maps [n, h, w] of several queries: their mean, its largest value 1."""
    mean = maps.float().mean(0)
    return mean / mean.max().clamp(min=1e-12)


def overlay(picture: Tensor, shares: Tensor) -> Tensor:
    """The picture [H, W, 3], dark where little is read and glowing where most is; shares [h, w] in 0..1."""
    size = picture.shape[:2]
    shares = torch.nn.functional.interpolate(shares[None, None], size=tuple(size), mode="bilinear", align_corners=False)[0, 0, ..., None]
    return (picture * (0.2 + 0.6 * shares) + 0.45 * shares * torch.tensor(GLOW)).clamp(0, 1)


def comparison(pictures: Tensor, readings: list[list[tuple[str, Tensor]]]) -> Tensor:
    """A sheet [1, H', W', 3], one row per reference: picture, what the local queries read per level, what the global ones do.

    pictures: RGB [B, H, W, 3] in 0..1. readings: per picture, (level, maps [1, queries, h, w]) as `encode_pictures` collects them.
    """
    rows = []
    for number, (picture, maps) in enumerate(zip(pictures.cpu().float(), readings), 1):
        row = [(picture, f"reference {number}: {picture.shape[1]} x {picture.shape[0]} px")]
        for level, seen in maps:
            row.append((overlay(picture, heat(seen[0, GLOBAL:])), f"local queries, 1/{STRIDES[level]} size"))
        # a level's cells differ in number, so their maps are added at the finest size
        finest = max((seen.shape[-2:] for _, seen in maps), key=lambda size: size[0] * size[1])
        whole = sum(torch.nn.functional.interpolate(seen[:, :GLOBAL].float(), size=tuple(finest), mode="bilinear", align_corners=False)[0] for _, seen in maps)
        row.append((overlay(picture, heat(whole)), "global queries, all levels"))
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
            parts.append(f"1/{STRIDES[level]} size {100 * half / len(shares):.0f} %")
        lines.append(f"reference {number}: half of the reading falls on " + ", ".join(parts) + " of the cells")
    return "\n".join(lines)
