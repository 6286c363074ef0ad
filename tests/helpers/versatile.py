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


def tiny(sets: tuple[str, ...] = ("text", "image"), seed: int = 0, width: int = 32, context: int = 64, multipliers: tuple[int, ...] = (1, 1, 1, 1), dtype=torch.float32):
    """A small Versatile Diffusion with random weights as a ModelPatcher: 8 heads, the layout of the real one."""
    from ...versatile_diffusion.model import build, unet_config
    from .models import randomise

    patcher = build(unet_config(width, context, multipliers), sets, 10**6, dtype)
    randomise(patcher.model.diffusion_model, seed)
    patcher.model.diffusion_model.requires_grad_(False)
    return patcher


def common_names(model) -> dict:
    """The tensors of a tiny model with both sets under their common names `keys.Name`."""
    from ...versatile_diffusion.dual import find

    return {find(key): value for key, value in model.model.diffusion_model.state_dict().items()}


def single(model, part: str):
    """The plain SD 1.x model of the host that is one flow of a tiny model: image diffuser with the attention set "text" or "image"."""
    from ...versatile_diffusion.dual import place
    from .models import tiny_sd15

    config = model.model.model_config.unet_config
    plain = tiny_sd15(width=config["model_channels"], context_dim=config["context_dim"], channel_mult=config["channel_mult"])
    placed = {place(name, (part,)): value for name, value in common_names(model).items()}
    plain.model.diffusion_model.load_state_dict({key: value for key, value in placed.items() if key is not None})
    return plain


def context(tokens: int, seed: int = 0, width: int = 64, rows: int = 1) -> torch.Tensor:
    """A random context [rows, tokens, width] whose tokens have norms about 1."""
    return torch.randn(rows, tokens, width, generator=torch.Generator().manual_seed(seed)) / math.sqrt(width)


def dual(ratio: float, text_tokens: int = 77, image_tokens: int = 257, seed: int = 0, width: int = 64) -> list:
    """CONDITIONING of a random text and picture."""
    from ...versatile_diffusion.contexts import dual_conditioning, image_conditioning

    return dual_conditioning([[context(text_tokens, seed, width), {}]], image_conditioning([context(image_tokens, seed + 100, width)]), ratio)


def diffusers_unet(model):
    """Diffusers' UNet with dual attention that holds a tiny model's weights. It rejects a mask that its own blocks pass on; that is dropped (reference sheet, 7.4)."""
    import pytest

    diffusers = pytest.importorskip("diffusers")
    from diffusers.models.transformers.dual_transformer_2d import DualTransformer2DModel

    from ...versatile_diffusion.keys import CONTEXT, DIFFUSERS, Name, group_of, write

    config = model.model.model_config.unet_config
    widths = tuple(config["model_channels"] * n for n in config["channel_mult"])
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=widths, cross_attention_dim=config["context_dim"], attention_head_dim=8, dual_cross_attention=True, layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )
    state = {}
    for name, value in common_names(model).items():
        key = write(Name("image", name.key), DIFFUSERS).removeprefix("image_unet.")
        if group_of(name.key) == CONTEXT:
            key = re.sub(r"(attentions\.\d+)\.", rf"\1.transformers.{('image', 'text').index(name.part)}.", key)
        state[key] = value
    unet.load_state_dict(state)

    def without_mask(module, args, kwargs):
        kwargs.pop("encoder_attention_mask", None)
        return args, kwargs

    for module in unet.modules():
        if isinstance(module, DualTransformer2DModel):
            module.register_forward_pre_hook(without_mask, with_kwargs=True)
    return unet.eval().requires_grad_(False)


def set_mix(unet, ratio: float, lengths: tuple[int, int]) -> None:
    """Share of the text and token counts of [text | image] in a UNet of `diffusers_unet`."""
    for module in unet.modules():
        if hasattr(module, "transformer_index_for_condition"):
            module.mix_ratio, module.condition_lengths = ratio, list(lengths)


TOWER = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4, "projection_dim": 64, "num_channels": 3, "patch_size": 14,
         "image_size": 224, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "model_type": "clip_vision_model"}
TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "projection_dim": 64}


def vision_network(**changes):
    """The host's vision tower with projection, random weights in float32. changes: of TOWER."""
    import comfy.clip_model
    import comfy.ops

    from .models import randomise

    network = comfy.clip_model.CLIPVisionModelProjection({**TOWER, **changes}, torch.float32, "cpu", comfy.ops.manual_cast)
    randomise(network, 11)
    return network.eval().requires_grad_(False)


def clip_vision(folder: Path, context_width: int | None = 64, **changes):
    """A CLIP_VISION of the host around a small tower. folder: where its configuration may be written; context_width: what it says of itself, None for nothing."""
    import json

    import comfy.clip_vision

    path = folder / "tower.json"
    path.write_text(json.dumps({**TOWER, **changes}))
    out = comfy.clip_vision.ClipVisionModel(str(path))
    out.model.to(torch.float32).load_state_dict(vision_network(**changes).state_dict())
    if context_width is not None:
        out.context_width = context_width
    return out


def text_encoder(**changes):
    """Our CLIP-L at a small width, weights not set. changes: of TEXT."""
    from ...versatile_diffusion.contexts import TextContextEncoder

    return TextContextEncoder(dtype=torch.float32, model_options={"clip_l_model_config": {**TEXT, **changes}})


def text_clip(**changes):
    """The same as a CLIP of the host, with random weights and the real tokenizer."""
    import comfy.sd
    import comfy.sd1_clip

    from ...versatile_diffusion.contexts import TextContextEncoder
    from .models import randomise

    class Target:
        params: dict = {}
        clip = comfy.sd1_clip.SD1ClipModel
        tokenizer = comfy.sd1_clip.SD1Tokenizer

    clip = comfy.sd.CLIP(Target, model_options={"clip_l_class": TextContextEncoder, "clip_l_model_config": {**TEXT, **changes}, "dtype": torch.float32})
    randomise(clip.cond_stage_model, 12)
    return clip


def picture(height: int, width: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """IMAGE [batch, height, width, 3] in 0..1 with structure."""
    from .seecoder import random_picture

    return random_picture(height, width, batch, seed=seed)


def write_files(folder: Path, naming: str, names: dict, suffix: str = ".safetensors", extra: dict | None = None) -> Path:
    """Tensors under their common names as a file of an official naming, or as a folder of the diffusers format; the path.

    The text diffuser gets a stem of its own, by which it can be told. extra: more tensors for a single file.
    """
    from safetensors.torch import save_file

    from ...versatile_diffusion.keys import DIFFUSERS, FOLDERS, PARTS, Name, write

    def save(state: dict, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        if suffix == ".safetensors":
            save_file({key: value.contiguous() for key, value in state.items()}, str(path))
        else:
            torch.save(state, path)
        return path

    names = {**names, Name("text", "input_blocks.0.0.weight"): torch.zeros(128, 64)}
    if naming != DIFFUSERS:
        state = {write(name, naming): value for name, value in names.items()}
        return save({**state, "betas": torch.zeros(1000), **(extra or {})}, folder / f"vd-four-flow-v1-0{suffix}")
    for part in PARTS:
        state = {write(name, naming).removeprefix(f"{FOLDERS[part]}."): value for name, value in names.items() if name.part == part}
        save(state, folder / FOLDERS[part] / f"diffusion_pytorch_model{suffix}")
    return folder
