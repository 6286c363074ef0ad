"""Loading: a recognised source to MODEL, CLIP, CLIP_VISION and VAE; only the tensors asked for are read, and each once."""

from __future__ import annotations

import logging
import math
import os

import torch

from ..common.shapes import compare_shapes
from .contexts import TOWER, TextContextEncoder
from .dual import SETS
from .files import TensorFile
from .keys import OFFICIAL_2023, TEXT
from .model import WIDTH, build, unet_config
from .sources import Source

log = logging.getLogger("palimpsest")

ALL = "all"
FLOWS = (ALL, *SETS)
PRECISIONS = {"auto": None, "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
STEM, KEYS = "input_blocks.0.0.weight", "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
LEVELS = (1, 4, 7, 10)  # input blocks that open a level
VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")  # kl-f8.pth holds its training loss too
VAE_SIZES = {
    "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2,
    "attn_resolutions": [], "dropout": 0.0,
}


def sizes(shapes: dict[str, tuple[int, ...]], title: str) -> dict:
    """Arguments of the UNet whose tensors have these shapes. Raises ValueError, one sentence, where one to tell by is missing."""
    needed = [STEM, KEYS, *(f"input_blocks.{number}.0.out_layers.3.bias" for number in LEVELS)]
    if lacking := [key for key in needed if key not in shapes]:
        raise ValueError(f"{title} lacks {len(lacking)} of the tensors that tell its size, {lacking[0]} first: it is damaged or was converted wrongly, so download it again.")
    width = shapes[STEM][0]
    return unet_config(width, shapes[KEYS][-1], tuple(shapes[key][0] // width for key in needed[2:]))


def chosen_sets(source: Source, flows: str) -> tuple[str, ...]:
    """Attention sets to load. Raises ValueError, one sentence, when the source lacks the one asked for."""
    if not source.sets:
        raise ValueError(f"{source.title} holds no attention for texts or pictures: it is damaged or was converted wrongly, so download it again.")
    if flows == ALL:
        return source.sets
    if flows not in source.sets:
        raise ValueError(f'{source.title} holds no attention for {flows} contexts, only for {source.sets[0]} ones: set flows to "{ALL}" or "{source.sets[0]}".')
    return (flows,)


def fill(model, plan: dict[str, tuple[TensorFile, str]], title: str) -> None:
    """Read a diffuser's tensors into the ModelPatcher that was built for them, file by file, with progress and cancel; freezes them.

    plan: tensor of the network -> (file, name there). title: of the source, for errors. Raises ValueError, one sentence, for tensors
    that are missing or misshapen, before any is read.
    """
    import comfy.model_management as mm
    import comfy.utils

    network = model.model.diffusion_model
    targets = dict(network.named_parameters())
    shapes = {key: file.shapes[name] for key, (file, name) in plan.items()}
    compare_shapes(shapes, {key: tuple(value.shape) for key, value in targets.items()}, title.removeprefix("The "))
    bar = comfy.utils.ProgressBar(len(plan))
    by_file: dict[int, tuple[TensorFile, dict[str, str]]] = {}
    for key, (file, name) in plan.items():
        by_file.setdefault(id(file), (file, {}))[1][name] = key
    with torch.no_grad():
        for file, names in by_file.values():
            for name, tensor in file.read(list(names)):
                mm.throw_exception_if_processing_interrupted()
                targets[names[name]].copy_(tensor)
                bar.update(1)
    network.requires_grad_(False)


def load_model(source: Source, flows: str = ALL, precision: str = "auto"):
    """The image diffuser as a ModelPatcher, with progress and cancel.

    flows: "all" sets that the source holds, or "text" or "image" alone (0.5 GB less at fp16). precision: of the weights;
    auto is the host's choice. Raises ValueError, one sentence, for sets or tensors that are missing or misshapen.
    """
    sets = chosen_sets(source, flows)
    plan = source.plan(sets)
    shapes = {key: file.shapes[name] for key, (file, name) in plan.items()}
    config = sizes(shapes, source.title)
    file, name = plan[STEM]
    model = build(config, sets, sum(math.prod(shape) for shape in shapes.values()), PRECISIONS[precision], file.dtype(name))
    fill(model, plan, source.title)
    model.model.prompt_free = source.naming == OFFICIAL_2023 and source.sets == (TEXT,)
    return model


def load_clip(file: TensorFile, prefix: str = ""):
    """A CLIP that gives text contexts, from a CLIP-L text encoder with its projection.

    Raises ValueError, one sentence, for another encoder and for one without projection, as in SD 1.x checkpoints: the
    host would leave uninitialised memory in its place.
    """
    import comfy.sd
    import folder_paths

    names = {key.removeprefix(prefix): shape for key, shape in file.shapes.items() if key.startswith(prefix)}
    table = names.get("text_model.embeddings.token_embedding.weight")
    if table is None:
        raise ValueError(f"The file {file.name} holds no CLIP text encoder: choose text_encoder of the diffusers folder, or clip-vit-large-patch14.")
    projection = names.get("text_projection.weight")
    if projection is None:
        raise ValueError(
            f"The text encoder in {file.name} has no text_projection.weight, without which there are no text contexts (the CLIP of an SD 1.x checkpoint has none): "
            "choose text_encoder of the diffusers folder, or clip-vit-large-patch14."
        )
    if table[-1] != WIDTH or tuple(projection) != (WIDTH, WIDTH):
        raise ValueError(f"The text encoder in {file.name} is {table[-1]} values wide, but Versatile Diffusion's is CLIP ViT-L/14 of {WIDTH}: choose that one.")
    state = file.part(prefix, ("text_model.", "text_projection."))
    stored = set(state)
    clip = comfy.sd.load_text_encoder_state_dicts(
        [state], embedding_directory=folder_paths.get_folder_paths("embeddings"), model_options={"clip_l_class": TextContextEncoder}
    )
    _complete(stored, clip.cond_stage_model.clip_l.transformer, file)
    return clip


def load_clip_vision(file: TensorFile, prefix: str = ""):
    """The CLIP_VISION that image contexts come from. Raises ValueError, one sentence, for another tower and for one without projection."""
    import comfy.clip_vision

    names = {key.removeprefix(prefix): shape for key, shape in file.shapes.items() if key.startswith(prefix)}
    positions = names.get("vision_model.embeddings.position_embedding.weight")
    projection = names.get("visual_projection.weight")
    if positions is None or projection is None:
        lacking = "CLIP vision model" if positions is None else "visual_projection.weight"
        raise ValueError(f"The file {file.name} holds no {lacking}: choose {TOWER}.")
    if tuple(positions) != (257, 1024) or tuple(projection) != (WIDTH, 1024):
        found = f"{positions[0]} tokens of {positions[-1]} values, projected to {projection[0]}"
        raise ValueError(f"The vision model in {file.name} has {found}, but Versatile Diffusion reads pictures through {TOWER}: choose that one.")
    state = file.part(prefix, ("vision_model.", "visual_projection."))
    stored = set(state)
    clip_vision = comfy.clip_vision.load_clipvision_from_sd(state)
    if clip_vision is None:
        raise ValueError(f"The vision model in {file.name} lacks layers: it is damaged or cut off, so download {TOWER} again.")
    _complete(stored, clip_vision.model, file)
    return clip_vision


def _complete(stored: set[str], network: torch.nn.Module, file: TensorFile) -> None:
    """Raises ValueError, one sentence, where the host has loaded a network whose tensors were not all there: it would run on uninitialised memory."""
    if missing := sorted(network.state_dict().keys() - stored):
        raise ValueError(f"The file {file.name} lacks {len(missing)} tensors of its CLIP, {missing[0]} first: it is damaged or was converted wrongly, so download it again.")


def load_vae(file: TensorFile, prefix: str = ""):
    """The VAE of a file. Raises ValueError, one sentence, when it holds none, another kind or only a part: the host would just log what is missing."""
    import comfy.sd

    first = file.shapes.get(f"{prefix}decoder.conv_in.weight")
    if first is None or f"{prefix}encoder.conv_in.weight" not in file.shapes:
        raise ValueError(f"The file {file.name} holds no VAE: choose kl-f8.pth, the folder's vae or a VAE of SD 1.x.")
    if len(first) == 4 and first[1] != VAE_SIZES["z_channels"]:
        raise ValueError(
            f"The VAE in {file.name} has {first[1]} latent channels, but Versatile Diffusion's has 4: choose kl-f8.pth, the folder's vae or a VAE of SD 1.x."
        )
    expected = _vae_shapes()
    stored = _host_named({key.removeprefix(prefix): shape for key, shape in file.shapes.items() if key.startswith(prefix)})
    compare_shapes({key: shape for key, shape in stored.items() if key in expected}, expected, f"VAE in {file.name}")
    return comfy.sd.VAE(sd=file.part(prefix, VAE_PARTS))


def _vae_shapes() -> dict[str, tuple[int, ...]]:
    """Tensors of the VAE of SD 1.x, from the host's own class (no memory)."""
    from comfy.ldm.models.autoencoder import AutoencoderKL

    with torch.device("meta"):
        network = AutoencoderKL(ddconfig=dict(VAE_SIZES), embed_dim=VAE_SIZES["z_channels"])
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


def _host_named(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of a VAE under the host's names, which the host gives those of a diffusers folder on loading."""
    from comfy.diffusers_convert import convert_vae_state_dict

    if not any(key.startswith("decoder.up_blocks.") for key in shapes):
        return shapes
    empty = {key: torch.empty(shape, device="meta") for key, shape in shapes.items() if key.startswith(VAE_PARTS)}
    return {key: tuple(value.shape) for key, value in convert_vae_state_dict(empty).items()}


LOADERS = {"clip": load_clip, "clip_vision": load_clip_vision, "vae": load_vae}


def load_extra(kind: str, source: Source, path: str | None):
    """CLIP, CLIP_VISION or VAE ("clip", "clip_vision", "vae"): of the file at `path`, else of the source; None where neither has one."""
    if path is not None:
        return LOADERS[kind](TensorFile(path))
    return LOADERS[kind](*source.extras[kind]) if kind in source.extras else None


def describe(source: Source, model, found: dict[str, object]) -> str:
    """What was loaded, for people. found: kind -> CLIP, CLIP_VISION, VAE or None."""
    sets = model.model.sets
    count = sum(parameter.numel() for parameter in model.model.diffusion_model.parameters())
    flows = "texts and pictures, blended" if sets == SETS else f"{'texts' if sets[0] == 'text' else 'pictures'} only"
    lines = [
        f"{source.title.removeprefix('The ')}: {source.naming} naming{', attention sets exchanged' if source.crossed else ''}",
        f"image diffuser for {flows}: {count / 1e6:.0f} M parameters, {str(model.model.get_dtype()).removeprefix('torch.')}",
    ]
    missing = [name for name, value in found.items() if value is None]
    if missing:
        lines.append(f"not in there and not chosen: {', '.join(missing)}; choose files for them here, or load them with the host's own nodes (not the CLIP)")
    return "\n".join(lines)


def file_stamp(path: str | None) -> str:
    """Changes when the file does."""
    if path is None or not os.path.isfile(path):
        return ""
    info = os.stat(path)
    return f"{info.st_mtime_ns} {info.st_size}"
