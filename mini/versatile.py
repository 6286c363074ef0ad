"""The mini member of Versatile Diffusion: the text-to-image model with a second attention set, for pictures.

As in the original's lineage, residual blocks, time embedding and the set for texts are those of a text-to-image model. They are read from
that member's own file, so the file of this one holds the set for pictures alone. Contexts of pictures come from the family's image tower.
"""

from __future__ import annotations

import torch

from ..versatile_diffusion.dual import SETS, TWIN
from ..versatile_diffusion.model import build
from .checkpoint import UNET_PREFIX
from .nets import unet_config


def is_image_set(name: str) -> bool:
    """Whether a tensor of `DualUNet`, by its name, belongs to the set for pictures."""
    return TWIN in name.split(".")


def load_model(weights: dict[str, torch.Tensor]):
    """The UNet with both sets as a ModelPatcher, with dtype and devices chosen by the host.

    weights: tensors of the text-to-image member and of this one, keys `model.diffusion_model.` + names of `DualUNet`; floats, any dtype.
    Raises RuntimeError where tensors are missing, strange or of another shape.
    """
    state = {key[len(UNET_PREFIX):]: value for key, value in weights.items() if key.startswith(UNET_PREFIX)}
    model = build(unet_config(), SETS, sum(value.numel() for value in state.values()))
    model.model.diffusion_model.load_state_dict(state)
    model.model.diffusion_model.requires_grad_(False)
    return model
