"""What a file or folder is: its naming, the attention sets in it, and where the image model's tensors come from."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field

from . import keys
from .dual import SETS, find, place
from .files import WHERE, TensorFile, weights_in
from .keys import CONTEXT, DIFFUSERS, IMAGE, OFFICIAL_2022, OFFICIAL_2023, TEXT, Name

STORED, CROSSED, AUTO = "as stored", "crossed", "auto"
CROSSINGS = (AUTO, STORED, CROSSED)
HOST = "ComfyUI"
# saving a pipeline of this class of diffusers saves text attention in image_unet: building it swaps the sets in place
SWAPPING = "VersatileDiffusionTextToImagePipeline"
OTHER = (
    ("model.diffusion_model.input_blocks.", "an ordinary Stable Diffusion checkpoint"),
    ("down_blocks.", "one file of a diffusers folder, which may belong to any Stable Diffusion (choose the whole folder)"),
    ("input_blocks.", "an ordinary Stable Diffusion UNet"),
    ("imencoder.", "a SeeCoder"), ("ctx.image.imencoder.", "a SeeCoder"),
    ("encoder.embeddings.word_embeddings.", "the text VAE (Optimus), which Versatile Optimus Loader takes"),
    ("decoder.transformer.", "the text VAE (Optimus), which Versatile Optimus Loader takes"),
    ("encoder.down.", "a VAE, which belongs into models/vae"), ("encoder.down_blocks.", "a VAE, which belongs into models/vae"),
    ("vision_model.", "a CLIP vision model, which belongs into models/clip_vision"), ("text_model.", "a CLIP text encoder, which belongs into models/text_encoders"),
    ("lora_unet_", "a LoRA"), ("control_model.", "a ControlNet"),
)


@dataclass
class Source:
    """A recognised file or folder.

    title: for messages; naming: how its tensors are called; table: tensor in the common form -> (file, its key there);
    extras: "clip", "clip_vision", "vae" -> (file, prefix of its keys); crossed: whether the attention sets were exchanged on reading.
    """

    title: str
    naming: str
    table: dict[Name, tuple[TensorFile, str]] = field(default_factory=dict)
    extras: dict[str, tuple[TensorFile, str]] = field(default_factory=dict)
    crossed: bool = False

    @property
    def sets(self) -> tuple[str, ...]:
        """Attention sets in it, in the order of the model."""
        found = {name.part for name in self.table if keys.group_of(name.key) == CONTEXT}
        return tuple(part for part in SETS if part in found)

    def plan(self, sets: tuple[str, ...]) -> dict[str, tuple[TensorFile, str]]:
        """Tensor of `DualUNet(sets=sets)` -> (file, key) for all that a model with these sets takes from here."""
        placed = ((place(name, sets), where) for name, where in self.table.items())
        return {key: where for key, where in placed if key is not None}


def _cross(name: Name) -> Name:
    """The same place with the other attention set."""
    return Name(TEXT if name.part == IMAGE else IMAGE, name.key) if keys.group_of(name.key) == CONTEXT else name


def recognise(path: str, crossing: str = AUTO) -> Source:
    """The source at a path. crossing: whether the attention sets of text and image are exchanged in the files; auto reads model_index.json.

    Raises ValueError, one sentence, for everything that holds no image diffuser of Versatile Diffusion.
    """
    source = _folder(path) if os.path.isdir(path) else _file(path)
    if crossing == CROSSED or (crossing == AUTO and os.path.isdir(path) and _pipeline(path) == SWAPPING):
        source.crossed = True
        source.table = {_cross(name): where for name, where in source.table.items()}
    stem = Name(IMAGE, "input_blocks.0.0.weight")
    if stem not in source.table:
        raise ValueError(f"{source.title} holds no image diffuser: choose a file that does, or {WHERE}.")
    shape = source.table[stem][0].shapes[source.table[stem][1]]
    if len(shape) == 2:
        raise ValueError(f"{source.title} is the text diffuser of Versatile Diffusion, which Versatile Text Model Loader takes: choose image_unet, or the whole folder.")
    return source


def _pipeline(folder: str) -> str | None:
    """Class name in a folder's model_index.json."""
    try:
        with open(os.path.join(folder, "model_index.json"), encoding="utf-8") as file:
            return json.load(file).get("_class_name")
    except (OSError, ValueError, AttributeError):
        return None


def _folder(path: str) -> Source:
    source = Source(f"The folder {os.path.basename(os.path.normpath(path))}", DIFFUSERS)
    for part, folder in keys.FOLDERS.items():
        if weights := weights_in(os.path.join(path, folder)):
            file = TensorFile(weights)
            named = ((keys.parse_diffusers(key, part), key) for key in file.shapes)
            # image_unet first: saved from a dual pipeline it holds both sets, and then text_unet's is the same or crossed
            for name, key in named:
                if name is not None:
                    source.table.setdefault(name, (file, key))
    for kind, folder in (("clip", "text_encoder"), ("clip_vision", "image_encoder"), ("vae", "vae")):
        if weights := weights_in(os.path.join(path, folder)):
            source.extras[kind] = (TensorFile(weights), "")
    return source


def _file(path: str) -> Source:
    file = TensorFile(path)
    title, names = f"The file {file.name}", file.shapes
    naming = _naming(names)
    if naming is None:
        kind = next((what for prefix, what in OTHER if any(key.startswith(prefix) for key in names)), "something else")
        raise ValueError(f"{title} is no Versatile Diffusion but {kind}: {WHERE}.")
    source = Source(title, naming)
    for key in names:
        if naming == HOST:
            name = find(key.removeprefix(keys.ROOT_2022))
        elif naming == DIFFUSERS:
            name = keys.parse_diffusers(key, IMAGE)
        else:
            name = keys.parse(key, naming)
        if name is not None:
            source.table[name] = (file, key)
    prefixes = {
        "clip": ("ctx.text.model.", "text_projection.weight"), "clip_vision": ("ctx.image.model.", "visual_projection.weight"),
        "vae": ("vae.image.", "decoder.conv_in.weight"),
    }
    for kind, (prefix, key) in prefixes.items():
        if prefix + key in names:
            source.extras[kind] = (file, prefix)
    return source


def _naming(names) -> str | None:
    """How a single file calls the tensors, by the rules of the reference sheet, section 2.3; None for no Versatile Diffusion."""
    if any("unet_image.input_blocks.0.0.weight" in key for key in names):
        return OFFICIAL_2022
    if any(key.startswith(("diffuser.image.data_blocks.", "diffuser.text.data_blocks.")) for key in names):
        return OFFICIAL_2023
    if any(key.endswith("middle_block.1.image.norm.weight") for key in names):
        return HOST
    # one file of a diffusers folder: saved from a dual pipeline, or the text diffuser; the plain image diffuser cannot be told from SD 1.x
    if "conv_in.weight" in names and ("mid_block.attentions.0.transformers.0.norm.weight" in names or len(names["conv_in.weight"]) == 2):
        return DIFFUSERS
    return None
