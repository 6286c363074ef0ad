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


def vae_sd15_shapes() -> dict[str, torch.Size]:
    """Every tensor of a VAE of SD 1.x in a file of its own (kl-f8)."""
    return {name.removeprefix("first_stage_model."): shape for name, shape in sd15_shapes().items() if name.startswith("first_stage_model.")}


def versatile_shapes() -> dict[str, torch.Size]:
    """Both diffusers of Versatile Diffusion under the names of the official file of 2023: contexts and text latents of the real width, a small UNet.

    The loaders read every other size from the file, and the real one has 2.6 thousand million numbers.
    """
    from ...versatile_diffusion.keys import OFFICIAL_2023, write
    from ...versatile_diffusion.model import WIDTH
    from ...versatile_diffusion.text_unet import TEXT_LATENT
    from . import versatile, versatile_text

    image = versatile.common_names(versatile.tiny(width=versatile_text.WIDTH, context=WIDTH, multipliers=versatile_text.MULTIPLIERS))
    text = versatile_text.published(versatile_text.tiny_text(latent=TEXT_LATENT, context=WIDTH), OFFICIAL_2023)
    return {key: tensor.shape for key, tensor in ({write(name, OFFICIAL_2023): tensor for name, tensor in image.items()} | text).items()}


def clip_text_shapes() -> dict[str, torch.Size]:
    """The text half of openai/clip-vit-large-patch14, with its projection; the host reads no size of it from the file."""
    import comfy.sd1_clip

    with torch.device("meta"):
        clip = comfy.sd1_clip.SD1ClipModel(device=torch.device("meta"), dtype=torch.float16).clip_l
        return {name: value.shape for name, value in clip.transformer.state_dict().items() if not name.endswith("position_ids")}


def clip_vision_shapes() -> dict[str, torch.Size]:
    """The picture half of openai/clip-vit-large-patch14, with its projection; likewise."""
    import json

    import comfy.clip_model
    import comfy.clip_vision
    import comfy.ops

    config = json.loads(Path(comfy.clip_vision.__file__).with_name("clip_vision_config_vitl.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        tower = comfy.clip_model.CLIPVisionModelProjection(config, torch.float16, torch.device("meta"), comfy.ops.disable_weight_init)
        return {name: value.shape for name, value in tower.state_dict().items() if not name.endswith("position_ids")}


def optimus_shapes() -> dict[str, torch.Size]:
    """A small Optimus whose latents have the real width; the loader reads every other size from the file."""
    from ...versatile_diffusion.text_unet import TEXT_LATENT
    from .versatile_text import optimus_shapes as shapes

    return {name: torch.Size(shape) for name, shape in shapes(latent=TEXT_LATENT).items()}


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
        # a view would take its whole storage along
        torch.save({name: tensor.clone() for name, tensor in tensors.items()}, path)
