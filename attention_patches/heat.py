"""Heat maps over pictures, as sheets with captions."""

from __future__ import annotations

import torch
from torch import Tensor

from ..inversion.filmstrip import strip

# dark violet over red to pale yellow: readable in print and without red-green vision
COLORS = ((0.0, 0.0, 0.02), (0.34, 0.06, 0.43), (0.73, 0.21, 0.33), (0.98, 0.55, 0.04), (0.99, 1.0, 0.64))
LONGEST = 512  # pixels of a picture before it becomes a tile


def colored(values: Tensor) -> Tensor:
    """Colours [..., 3] of values in 0..1."""
    stops = torch.tensor(COLORS)
    position = values.clamp(0, 1) * (len(COLORS) - 1)
    low = position.floor().long().clamp(max=len(COLORS) - 2)
    return torch.lerp(stops[low], stops[low + 1], (position - low)[..., None])


def over(picture: Tensor, values: Tensor, strength: float = 0.65) -> Tensor:
    """A picture [H, W, 3], grey, under the colours of values [h, w] in 0..1, stretched to its size."""
    height, width = picture.shape[:2]
    stretched = torch.nn.functional.interpolate(values[None, None].float(), size=(height, width), mode="bilinear", align_corners=False)[0, 0]
    grey = picture.float().mean(-1, keepdim=True).expand(-1, -1, 3)
    return ((1 - strength) * grey + strength * colored(stretched)).clamp(0, 1)


def shrunk(picture: Tensor) -> Tensor:
    """A picture [H, W, 3] no longer than a tile needs."""
    height, width = picture.shape[:2]
    scale = min(1.0, LONGEST / max(height, width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return torch.nn.functional.interpolate(picture.movedim(-1, 0)[None].float(), size=size, mode="area")[0].movedim(0, -1)


def sheet(pictures: Tensor, maps: Tensor, names: list[str], columns: int = 5) -> Tensor:
    """One labelled sheet [1, H', W', 3]: per picture [B, H, W, 3] itself and the map of each name, maps [B, K, h, w] scaled by each one's largest value."""
    rows = []
    for number, (picture, own) in enumerate(zip(pictures.cpu(), maps.cpu()), 1):
        small = shrunk(picture[..., :3])
        tiles = [(small, f"picture {number}" if len(pictures) > 1 else "picture")]
        for values, name in zip(own, names):
            peak = float(values.max())
            tiles.append((over(small, values / peak if peak > 0 else values), f"{name}  (peak {peak:.2g})"))
        rows += [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    return strip(rows)
