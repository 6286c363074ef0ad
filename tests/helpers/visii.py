"""Edit models with random weights, and what learning on them takes."""

from __future__ import annotations

import torch

from ...visii.instruction import Instruction
from ...visii.pairs import Pairs
from .models import SD15_LAYOUT, SDXL_LAYOUT, _build

WIDTH = 48  # of the text tokens


def tiny_edit(seed=0, width=32, context_dim=WIDTH, dtype=torch.float32, channel_mult=(1, 1, 1, 1)):
    """An InstructPix2Pix model of the SD1.5 layout: 8 input channels, the host's own class."""
    import comfy.model_base
    import comfy.supported_models

    layout = {**SD15_LAYOUT, "in_channels": 8, "model_channels": width, "context_dim": context_dim, "channel_mult": list(channel_mult)}
    return _build(comfy.supported_models.SD15_instructpix2pix, layout, dtype, "eps", seed, comfy.model_base.SD15_instructpix2pix)


def tiny_edit_sdxl(seed=0, width=32, context_dim=2048):
    """The same of the SDXL layout."""
    import comfy.model_base
    import comfy.supported_models

    layout = {**SDXL_LAYOUT, "in_channels": 8, "model_channels": width, "context_dim": context_dim}
    return _build(comfy.supported_models.SDXL_instructpix2pix, layout, torch.float32, "eps", seed, comfy.model_base.SDXL_instructpix2pix)


def random_pairs(count=1, size=(16, 16), seed=0) -> Pairs:
    """Pairs of random pictures and unrelated random latents, of the scale that SD's autoencoder gives."""
    generator = torch.Generator().manual_seed(seed)
    pictures = [torch.rand(count, 8 * size[0], 8 * size[1], 3, generator=generator) for _ in range(2)]
    return Pairs(*pictures, *(4 * torch.randn(count, 4, *size, generator=generator) for _ in range(2)))


def random_instruction(end=6, tokens=12, width=WIDTH, seed=0, encoder=0, pooled=None) -> Instruction:
    """An instruction of random vectors; those of one `encoder` have the same empty text, and share its vectors from the end on."""
    null = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(1000 + encoder))
    generator = torch.Generator().manual_seed(seed)
    words = torch.randn(1, end - 1, width, generator=generator)
    vector = None if pooled is None else torch.randn(1, pooled, generator=generator)
    return Instruction(torch.cat([null[:, :1], words, null[:, end:]], 1), null, end, f"text {seed}", vector)
