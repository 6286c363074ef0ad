"""Loading the text diffuser: from the official single files, a diffusers folder or its text_unet alone; only its own tensors are read, and each once."""

from __future__ import annotations

import json
import math
import os


from . import keys
from .dual import SETS, find, place
from .files import WHERE, TensorFile, weights_in
from .keys import CONTEXT, DIFFUSERS, GLOBAL, IMAGE, OFFICIAL_2022, OFFICIAL_2023, TEXT, Name
from .loader import PRECISIONS, fill
from .sources import AUTO, CROSSED, HOST, STORED, SWAPPING, Source
from .text_unet import SLOTS, TextConfig, text_config

BOTH = "both"
CONTEXTS = (BOTH, *SETS)
STEM, TIME, HEAD = "input_blocks.0.0.weight", "time_embed.0.weight", "out.2.weight"
READ = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
LEVELS = tuple(f"input_blocks.{number}.0.out_layers.3.bias" for number in (1, 4, 7, 10))
CLIP = "ctx.text.model."  # before the text encoder's tensors where an official file holds it


def recognise(path: str, crossing: str = AUTO) -> Source:
    """The source at a path, with the text diffuser's tensors and both attention sets in its table, and the CLIP in its extras.

    crossing: as in `sources.recognise`. Raises ValueError, one sentence, for everything that holds no text diffuser, and for a
    file of which only a person can tell whose attention it holds.
    """
    source = _folder(path) if os.path.isdir(path) else _file(path)
    if crossing == CROSSED or (crossing == AUTO and os.path.isdir(path) and _saved_crossed(path)):
        source.crossed = True
        other = {TEXT: IMAGE, IMAGE: TEXT}
        source.table = {Name(other[name.part], name.key) if keys.group_of(name.key) == CONTEXT else name: where for name, where in source.table.items()}
    stem = source.table.get(Name(TEXT, STEM))
    if stem is None or len(stem[0].shapes[stem[1]]) != 2:
        raise ValueError(f"{source.title} holds no text diffuser of Versatile Diffusion: choose a four-flow file or a folder with text_unet, or {WHERE}.")
    # the host saves a model of one set under the same names, whichever set it is
    if source.naming == HOST and len(source.sets) == 1 and crossing == AUTO:
        raise ValueError(
            f"{source.title}, saved by ComfyUI, holds one attention set and does not tell whether it reads texts or pictures: "
            f'set attention_sets to "{STORED}" if it reads texts, or to "{CROSSED}" if it reads pictures.'
        )
    return source


def _saved_crossed(folder: str) -> bool:
    try:
        with open(os.path.join(folder, "model_index.json"), encoding="utf-8") as file:
            return json.load(file).get("_class_name") == SWAPPING
    except (OSError, ValueError, AttributeError):
        return False


def _folder(path: str) -> Source:
    source = Source(f"The folder {os.path.basename(os.path.normpath(path))}", DIFFUSERS)
    # image_unet first: saved from a dual pipeline it holds both sets, and then text_unet's is the same or crossed
    for part in keys.PARTS:
        if weights := weights_in(os.path.join(path, keys.FOLDERS[part])):
            file = TensorFile(weights)
            for key in file.shapes:
                if (name := keys.parse_diffusers(key, part)) is not None:
                    source.table.setdefault(name, (file, key))
    if weights := weights_in(os.path.join(path, "text_encoder")):
        source.extras["clip"] = (TensorFile(weights), "")
    return source


def _file(path: str) -> Source:
    file = TensorFile(path)
    naming = _naming(file.shapes)
    source = Source(f"The file {file.name}", naming or "unknown")
    for key in file.shapes if naming else ():
        if naming == HOST:
            name = find(key.removeprefix(keys.ROOT_2022))
            name = name if name is None or keys.group_of(name.key) == CONTEXT else Name(TEXT, name.key)
        else:
            name = keys.parse_diffusers(key, TEXT) if naming == DIFFUSERS else keys.parse(key, naming)
        if name is not None:
            source.table[name] = (file, key)
    if f"{CLIP}text_projection.weight" in file.shapes:
        source.extras["clip"] = (file, CLIP)
    return source


def _naming(shapes: dict[str, tuple[int, ...]]) -> str | None:
    """How a single file calls the text diffuser's tensors; None where it has none."""
    if keys.PREFIX_2022[TEXT] + STEM in shapes:
        return OFFICIAL_2022
    if any(key.startswith("diffuser.text.data_blocks.") for key in shapes):
        return OFFICIAL_2023
    if len(shapes.get("conv_in.weight", ())) == 2:
        return DIFFUSERS
    return HOST if len(shapes.get(keys.ROOT_2022 + HEAD, ())) == 2 else None


def plan(source: Source, sets: tuple[str, ...]) -> dict[str, tuple[TensorFile, str]]:
    """Tensor of `TextUNet(sets=sets)` -> (file, key) for all that a model with these sets takes from a source."""
    out = {}
    # the text diffuser's own time embedding, where a folder has one, over the equal one of the image diffuser
    for name, where in sorted(source.table.items(), key=lambda item: item[0].part):
        group = keys.group_of(name.key)
        if group == CONTEXT:
            key = place(name, sets)
        else:
            key = name.key if group == GLOBAL or name.part == TEXT else None
        if key is not None:
            out[key] = where
    return out


def sizes(shapes: dict[str, tuple[int, ...]], title: str) -> dict:
    """Arguments of the text diffuser whose tensors have these shapes. Raises ValueError, one sentence, where one to tell by is missing."""
    if lacking := [key for key in (STEM, TIME, READ, *LEVELS) if key not in shapes]:
        raise ValueError(f"{title} lacks {len(lacking)} of the tensors that tell its size, {lacking[0]} first: it is damaged or was converted wrongly, so download it again.")
    width = shapes[TIME][1]
    return text_config(shapes[STEM][1], width, shapes[READ][-1], tuple(shapes[key][0] // (SLOTS * width) for key in LEVELS))


def chosen_sets(source: Source, contexts: str) -> tuple[str, ...]:
    """Attention sets to load. Raises ValueError, one sentence, when the source lacks the one asked for."""
    found = source.sets
    if contexts == BOTH and found:
        return found
    if contexts not in found:
        only = f"only for {found[0]} ones" if found else "nor any other"
        raise ValueError(f'{source.title} holds no attention for {"text" if contexts == BOTH else contexts} contexts, {only}: choose the four-flow file or a whole folder.')
    return (contexts,)


def load_model(source: Source, contexts: str = BOTH, precision: str = "auto"):
    """The text diffuser as a ModelPatcher, with progress and cancel.

    contexts: "both" sets that the source holds, or "text" (text variation) or "image" (image-to-text) alone. precision: of the
    weights; auto is the host's choice. Raises ValueError, one sentence, for sets or tensors that are missing or misshapen.
    """
    sets = chosen_sets(source, contexts)
    planned = plan(source, sets)
    shapes = {key: file.shapes[name] for key, (file, name) in planned.items()}
    config = sizes(shapes, source.title)
    file, name = planned[STEM]
    model = build(config, sets, sum(math.prod(shape) for shape in shapes.values()), PRECISIONS[precision], file.dtype(name))
    fill(model, planned, source.title)
    return model


def build(config: dict, sets: tuple[str, ...], parameters: int, dtype=None, stored=None):
    """A ModelPatcher around a text diffuser whose weights are still to be filled in; arguments as in `model.build`, config from `text_config`."""
    import comfy.model_management as mm
    import comfy.model_patcher

    chosen = TextConfig(config, sets)
    load_device, offload_device = mm.get_torch_device(), mm.unet_offload_device()
    supported = list(chosen.supported_inference_dtypes)
    if dtype is None:
        dtype = mm.unet_dtype(model_params=parameters, supported_dtypes=supported, weight_dtype=stored)
    chosen.set_inference_dtype(dtype, mm.unet_manual_cast(dtype, load_device, supported))
    base = chosen.get_model({}, device=offload_device).eval()
    return comfy.model_patcher.ModelPatcher(base, load_device=load_device, offload_device=offload_device)


def describe(source: Source, model, clip=None) -> str:
    """What was loaded, for people. clip: the CLIP that was found or chosen, or None."""
    sets = model.model.sets
    count = sum(parameter.numel() for parameter in model.model.diffusion_model.parameters())
    flows = {TEXT: "text variation", IMAGE: "image-to-text"}
    lines = [
        f"{source.title.removeprefix('The ')}: {source.naming} naming{', attention sets exchanged' if source.crossed else ''}",
        f"text diffuser for {' and '.join(flows[part] for part in sets)}: {count / 1e6:.0f} M parameters, {str(model.model.get_dtype()).removeprefix('torch.')}",
    ]
    if clip is None:
        lines.append("not in there and not chosen: clip, which text variation needs; choose a file for it here or take that of Versatile Diffusion Loader")
    return "\n".join(lines)
