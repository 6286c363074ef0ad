"""Versatile Diffusion at full and at toy size: names and shapes, models, towers, files."""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch

from .checkpoints import SD15_UNET


def image_shapes() -> dict[str, torch.Size]:
    """Every tensor of the full-size image diffuser by its ldm name, from the host's own UNet (no memory)."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    meta = torch.device("meta")
    return {key: value.shape for key, value in UNetModel(**SD15_UNET, dtype=torch.float16, device=meta, operations=comfy.ops.disable_weight_init).state_dict().items()}


def text_shapes() -> dict[str, torch.Size]:
    """The same of the text diffuser: four slots per channel, square linear samplers without a name of their own, attention as in the image one.

    Reference sheet, section 3.3; an independent derivation from the image diffuser's shapes.
    """
    out = {}
    for key, shape in image_shapes().items():
        attention = re.search(r"\.1\.(norm|proj_in|proj_out|transformer_blocks)", key)
        if key.startswith("time_embed") or attention or key.startswith("out.0."):
            out[key] = shape
        elif key.startswith("input_blocks.0.0."):
            out[key] = torch.Size([1280, 768] if len(shape) > 1 else [1280])
        elif key.startswith("out.2."):
            out[key] = torch.Size([768, 1280] if len(shape) > 1 else [768])
        elif re.search(r"\.(op|conv)\.", key):
            # square linear layers
            out[re.sub(r"\.(op|conv)\.", ".", key)] = torch.Size([4 * n for n in shape[:2]])
        elif ".emb_layers." in key:
            out[key] = torch.Size([4 * shape[0], *shape[1:]])
        else:
            out[key] = torch.Size([4 * n for n in shape[:2]] + [1] * (len(shape) - 2))
    return out


def key_table(folder: Path, part: str) -> list[dict[str, str]]:
    """Rows of the reference table of a diffuser ("image" or "text"): diffusers_key, shape, group, ldm_key, official_2022_key, official_2023_key."""
    lines = (folder / f"vd_{part}_unet_keys.tsv").read_text().splitlines()
    names = lines[0].split("\t")
    return [dict(zip(names, line.split("\t"))) for line in lines[1:]]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative L2 error of a against b."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def random_state(shapes: dict[str, torch.Size], seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Tensors of these shapes whose layers keep the variance."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for key, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            value = noise / math.sqrt(math.prod(shape[1:]))
        else:
            value = 0.05 * noise if key.endswith("bias") else 1 + 0.1 * noise
        out[key] = value.to(dtype)
    return out
