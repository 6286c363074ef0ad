"""Checkpoint files of real shapes with random weights, for running community graphs without their models."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import save_file

# as in every SD1.x checkpoint; the host reads the same figures from the shapes
SD15_UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "transformer_depth_middle": 1,
    "context_dim": 768, "use_spatial_transformer": True, "use_linear_in_transformer": False, "adm_in_channels": None, "use_temporal_attention": False,
    "legacy": False, "num_heads": 8, "num_head_channels": -1,
}
SD_VAE = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2,
          "attn_resolutions": [], "dropout": 0.0}


def sd15_shapes(in_channels: int = 4) -> dict[str, torch.Size]:
    """Every tensor of an SD1.5 checkpoint, by the name it has there. in_channels: of the UNet, 8 for edit models."""
    import comfy.ops
    import comfy.sd1_clip
    from comfy.ldm.models.autoencoder import AutoencoderKL
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    meta = torch.device("meta")
    with meta:
        parts = {
            "model.diffusion_model.": UNetModel(**{**SD15_UNET, "in_channels": in_channels}, dtype=torch.float16, device=meta, operations=comfy.ops.disable_weight_init),
            "cond_stage_model.": comfy.sd1_clip.SD1ClipModel(device=meta, dtype=torch.float16).clip_l,
            "first_stage_model.": AutoencoderKL(ddconfig=dict(SD_VAE), embed_dim=4),
        }
        shapes = {prefix + name: value.shape for prefix, part in parts.items() for name, value in part.state_dict().items()}
    return {name: shape for name, shape in shapes.items() if not name.endswith(("logit_scale", "text_projection.weight", "position_ids"))}


def instruct_pix2pix_shapes() -> dict[str, torch.Size]:
    """The official file of InstructPix2Pix with its EMA set; of the other set, which must not be read, the names only."""
    from ...instruct_pix2pix.weights import UNET, averaged

    shapes = sd15_shapes(in_channels=8)
    unet = [name for name in shapes if name.startswith(UNET)]
    return {**shapes, **{name: torch.Size([1]) for name in unet}, **{averaged(name): shapes[name] for name in unet}}


def controlnet_sd15_shapes() -> dict[str, torch.Size]:
    """Every tensor of an SD1.5 ControlNet file, by the name it has there."""
    import comfy.cldm.cldm
    import comfy.ops

    layout = {key: value for key, value in SD15_UNET.items() if key not in ("out_channels", "transformer_depth_output")}
    network = comfy.cldm.cldm.ControlNet(**layout, hint_channels=3, dtype=torch.float16, device=torch.device("meta"), operations=comfy.ops.disable_weight_init)
    return {f"control_model.{name}": value.shape for name, value in network.state_dict().items()}


def seecoder_shapes() -> dict[str, torch.Size]:
    """A SeeCoder of the official token width with a small backbone: the loader derives every size, and 1.2 GB would take minutes."""
    from ...seecoder.sizes import PREFIX, expected_shapes
    from .seecoder import small

    return {PREFIX + name: torch.Size(shape) for name, shape in expected_shapes(small(width=768)).items()}


def sam_shapes() -> dict[str, torch.Size]:
    """Every tensor of Segment Anything's vit_b, by the name it has in the official file; nothing without the optional package."""
    try:
        from segment_anything import sam_model_registry
    except ImportError:
        return {}
    with torch.device("meta"):
        return {name: value.shape for name, value in sam_model_registry["vit_b"]().state_dict().items()}


def write_random_checkpoint(path: Path, shapes: dict[str, torch.Size], seed: int = 0) -> None:
    """A checkpoint of these shapes in float16 whose layers keep the variance, so that nothing overflows.

    The numbers repeat after about a million: drawing a thousand million would take most of a test's time.
    """
    pool = torch.randn(1_000_003, generator=torch.Generator().manual_seed(seed)).half()
    tensors, offset = {}, 0
    for name, shape in shapes.items():
        if len(shape) < 2:
            tensors[name] = torch.full(shape, float(name.endswith(".weight")), dtype=torch.float16)
            continue
        count = math.prod(shape)
        repeated = pool.repeat(-(-(offset + count) // len(pool)))[offset:offset + count]
        tensors[name] = repeated.div_(math.sqrt(math.prod(shape[1:]))).reshape(shape)
        offset = (offset + count) % len(pool)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(tensors, str(path))
    else:
        torch.save(tensors, path)
