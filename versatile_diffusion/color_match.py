"""Colors of a result matched to its reference, as the authors' demo does after an image variation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.pictures import rgb


def match_colors(image: Tensor, reference: Tensor, strength: float = 1.0) -> Tensor:
    """IMAGE [B, H, W, 3] with the mean and the standard deviation of each channel brought to the reference's, clamped to 0..1.

    reference: [1 or B, h, w, C], compared at the image's size. strength: 0 leaves the image, 1 is the demo's "simple"
    adjustment, 0.5 that of the 2022 script. A channel without any spread is only shifted. Raises ValueError when the batches do not fit.
    """
    image, reference = rgb(image), rgb(reference).to(image)
    if len(reference) not in (1, len(image)):
        raise ValueError(f"There are {len(reference)} references for {len(image)} pictures: connect one reference for all, or one per picture.")
    if strength == 0:
        return image
    if reference.shape[1:3] != image.shape[1:3]:
        resized = torch.nn.functional.interpolate(reference.movedim(-1, 1), size=tuple(image.shape[1:3]), mode="bicubic", antialias=True)
        reference = resized.movedim(1, -1).clamp(0, 1)
    mean, spread = image.mean((1, 2), keepdim=True), image.flatten(1, 2).std(1)[:, None, None]
    wanted_mean, wanted_spread = reference.mean((1, 2), keepdim=True), reference.flatten(1, 2).std(1)[:, None, None]
    factor = torch.where(spread > 1e-6, wanted_spread / spread.clamp(min=1e-6), torch.ones_like(spread))
    matched = ((image - mean) * factor + wanted_mean).clamp(0, 1)
    return torch.lerp(image, matched, strength) if strength != 1 else matched
