"""A concept as a picture: what each attention resolution keeps of it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.pictures import spotlight
from ..inversion.filmstrip import strip
from .mrsa_concept import Concept


def sheet(concept: Concept) -> Tensor:
    """IMAGE [1, H', W', 3]: the picture, then the picture dark where a level's mask drops its tokens, labelled with size and share."""
    picture = concept.picture
    height, width = picture.shape[:2]
    row = [(picture, f"{width} x {height} px")]
    for size in concept.sizes:
        mask = concept.layer_mask(size)
        # every pixel shows the token whose cell it lies in
        cells = torch.nn.functional.interpolate(mask[None, None], size=(height, width), mode="nearest")[0, 0]
        row.append((spotlight(picture, cells), f"{size[1]} x {size[0]} tokens, {100 * float(mask.mean()):.1f} % kept"))
    return strip([row])
