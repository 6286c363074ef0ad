"""Names of UNet layers: which model family this is, and which layers a user means.

Layers are written `d2,m0,u1-8`: down, middle, up, and the n-th layer *with attention* of that part, counted
in the order the UNet runs them, as in other attention packs. `u1.0-3` picks transformer blocks inside a layer
(SDXL has up to ten). `input7`, `middle0`, `output4` name the host's own block numbers, which also reaches
ResBlocks without attention. `preset NAME` is a named choice per model family; an empty text is no layer at all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

SD1 = "SD1.x"
SD2 = "SD2.x"
SDXL = "SDXL"
SDXL_REFINER = "SDXL Refiner"

PARTS = ("input", "middle", "output")
LETTERS = {"d": "input", "m": "middle", "u": "output"}

# What Plug-and-Play (Tumanyan et al., CVPR 2023, section 4) calls "layer 4" and "layers 4 to 11" of SD's decoder are
# the second to the ninth decoder layer with attention. There is no published choice for SDXL: its feature layer is the
# one at the same place, its attention layers are those Ctrl-X (NeurIPS 2024) takes q and k from.
FEATURE_PRESETS = {
    "default": {SD1: "u1", SD2: "u1", SDXL: "u1"},
    "none": {SD1: "", SD2: "", SDXL: ""},
}
ATTENTION_PRESETS = {
    "default": {SD1: "u1-8", SD2: "u1-8", SDXL: "u0-2"},
    "coarse": {SD1: "u1-5", SD2: "u1-5", SDXL: "u0-1"},
    "decoder": {SD1: "u0-8", SD2: "u0-8", SDXL: "u0-5"},
    "ctrl-x": {SDXL: "u0-2"},
    "none": {SD1: "", SD2: "", SDXL: ""},
}

_RANGE = r"(\d+)(?:-(\d+))?"
_ITEM = re.compile(rf"(d|m|u|input|middle|output){_RANGE}(?:\.{_RANGE})?", re.ASCII)


class Point(NamedTuple):
    """One place in the UNet whose features an edit reads and rewrites.

    kind "resblock": the residual branch of a ResBlock, after its last convolution, before the skip is added, [B, C, H, W].
    kind "attn1": the input of a self-attention (normed tokens before to_q, to_k, to_v), [B, H*W, C].
    kind "attn2": the query side of a cross-attention (normed tokens before to_q), [B, H*W, C].
    part, number: the host's block, e.g. ("output", 4). index: the transformer block inside it (attention only).
    """

    kind: str
    part: str
    number: int
    index: int = 0

    @property
    def order(self) -> tuple[int, int, int]:
        """Sorts points in the order the UNet reaches them."""
        place = {"resblock": 0, "attn1": 1 + 2 * self.index, "attn2": 2 + 2 * self.index}[self.kind]
        return (PARTS.index(self.part), self.number, place)


@dataclass(frozen=True)
class UNetLayers:
    """What a UNet has: transformer depth of each block with attention, and the blocks that start with a ResBlock.

    halvings: how often the picture has been halved where a block's attention sits: 0 at the size of the latent.
    """

    architecture: str
    attention: dict[tuple[str, int], int]
    resblocks: frozenset[tuple[str, int]]
    halvings: dict[tuple[str, int], int]

    def by_letter(self, letter: str) -> list[tuple[str, int]]:
        """Blocks with attention of one part, in running order: the n of `u<n>` counts this list."""
        part = LETTERS[letter]
        return [block for block in self.attention if block[0] == part]

    def points(self, kind: str) -> frozenset[Point]:
        """Every attention point of a kind ("attn1" or "attn2")."""
        return frozenset(Point(kind, *block, index) for block, depth in self.attention.items() for index in range(depth))

    def size(self, block: tuple[str, int], latent: tuple[int, int]) -> tuple[int, int]:
        """(H, W) of the maps at a block's attention for latents of (H, W): every halving rounds up."""
        height, width = latent
        for _ in range(self.halvings[block]):
            height, width = (height + 1) // 2, (width + 1) // 2
        return height, width


def architecture_name(model) -> str:
    """Family of the UNet behind a MODEL: "SD1.x", "SD2.x", "SDXL" or "SDXL Refiner".

    model: a ModelPatcher. Raises ValueError (one sentence, naming the model class) for anything
    that is not an image UNet of these families: Flux, SD3, Wan, video UNets, upscalers, Versatile Diffusion's text diffuser.
    """
    import comfy.model_base
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    base = model.model
    name = type(base).__name__
    unet = getattr(base, "diffusion_model", None)
    if not isinstance(unet, UNetModel):
        raise ValueError(
            f"This node edits the UNet of SD1.x, SD2.x and SDXL models, but the connected model is a {name} "
            f"(network {type(unet).__name__}): connect a checkpoint of one of these families."
        )
    if getattr(unet, "makes_text", False):
        raise ValueError(
            "The connected model is the text diffuser of Versatile Diffusion, whose latents are texts and no pictures: connect the model of Versatile Diffusion Loader instead."
        )
    config = base.model_config.unet_config
    temporal = config.get("use_temporal_attention", False) or config.get("use_temporal_resblock", False)
    output_blocks = len(unet.output_blocks)
    if not temporal and not isinstance(unet.num_classes, int):
        if isinstance(base, comfy.model_base.SDXLRefiner):
            return SDXL_REFINER
        if output_blocks == 9 and unet.num_classes is not None:
            return SDXL
        if output_blocks == 12:
            return SD2 if config.get("use_linear_in_transformer", False) else SD1
    raise ValueError(
        f"This node edits the UNet of SD1.x, SD2.x and SDXL image models, but the connected model is a {name} "
        f"of another layout ({output_blocks} output blocks{', video' if temporal else ''}): "
        "connect a checkpoint of one of these families."
    )


def unet_layers(model) -> UNetLayers:
    """The layers of the UNet behind a MODEL. Raises ValueError like `architecture_name`, and for a Versatile Diffusion with both attention sets."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock, Upsample

    architecture = architecture_name(model)
    unet = model.model.diffusion_model
    if getattr(unet, "paired", False):
        raise ValueError(
            "The connected model is a Versatile Diffusion with an attention for texts and one for pictures in every layer, and edits of attention know one: "
            "set flows to text or image in Versatile Diffusion Loader."
        )
    attention, resblocks, halvings, level = {}, set(), {}, 0
    middle = [] if unet.middle_block is None else [unet.middle_block]
    for part, blocks in zip(PARTS, (unet.input_blocks, middle, unet.output_blocks)):
        for number, block in enumerate(blocks):
            if len(block) and isinstance(block[0], ResBlock):
                resblocks.add((part, number))
            depths = [len(layer.transformer_blocks) for layer in block if hasattr(layer, "transformer_blocks")]
            if depths and depths[0] > 0:
                attention[(part, number)] = depths[0]
                halvings[(part, number)] = level
            # both stand alone or last in their block
            level += any(isinstance(layer, Downsample) for layer in block) - any(isinstance(layer, Upsample) for layer in block)
    return UNetLayers(architecture, attention, frozenset(resblocks), halvings)


def check_reads_words(model) -> None:
    """Raises ValueError, one sentence, for a MODEL whose cross-attention reads pictures alone, where there are no words to follow."""
    if getattr(model.model.diffusion_model, "sets", None) == ("image",):
        raise ValueError(
            "The connected Versatile Diffusion reads pictures alone, and this node follows the words of a prompt: set flows to text in Versatile Diffusion Loader."
        )


class Item(NamedTuple):
    """One item of the notation: `u1-8.0-3` is ("u", 1, 8, 0, 3); without a dot the last two are None."""

    name: str
    first: int
    last: int
    index_first: int | None
    index_last: int | None


def parse_blocks(text: str, what: str = "layers") -> tuple[Item, ...]:
    """Read the layer notation, without looking at a model.

    text: e.g. "d2,m0,u1-8". what: how messages call the input. Raises ValueError, one sentence, naming what cannot be read.
    """
    items = []
    for word in re.split(r"[,\s]+", text.strip().lower()):
        if not word:
            continue
        found = _ITEM.fullmatch(word)
        numbers = [None if number is None else int(number) for number in found.groups()[1:]] if found else []
        if found and numbers[1] is None:
            numbers[1] = numbers[0]
        if found and numbers[3] is None:
            numbers[3] = numbers[2]
        if not found or numbers[1] < numbers[0] or (numbers[2] is not None and numbers[3] < numbers[2]):
            raise ValueError(
                f'Cannot read "{word}" in the {what}: write layers like d2, m0, u1-8, u1.0-3 or output4, separated by commas, '
                'or "preset default".'
            )
        items.append(Item(found[1], *numbers))
    return tuple(items)


def _expand_preset(text: str, presets: dict, architecture: str, what: str) -> str:
    words = text.strip().lower().split(None, 1)
    if not words or words[0] != "preset":
        return text
    name = words[1].strip() if len(words) > 1 else ""
    if name not in presets:
        raise ValueError(f'There is no preset "{name}" for the {what}: choose one of {", ".join(sorted(presets))}, or write layers like u1-8.')
    if architecture not in presets[name]:
        known = ", ".join(presets[name])
        raise ValueError(f'The preset "{name}" of the {what} is for {known}, but the connected model is {architecture}: write the layers yourself, like u1-8.')
    return presets[name][architecture]


def _blocks_of(item: Item, layers: UNetLayers, what: str) -> list[tuple[str, int]]:
    wanted = range(item.first, item.last + 1)
    if item.name not in LETTERS:
        return [(item.name, number) for number in wanted]
    known = layers.by_letter(item.name)
    if item.last >= len(known):
        has = f"{item.name}0 to {item.name}{len(known) - 1}" if len(known) > 1 else (f"only {item.name}0" if known else f"none of part {item.name}")
        raise ValueError(f"The {what} name {item.name}{item.last}, but this {layers.architecture} model has {has}: choose layers of this model.")
    return [known[number] for number in wanted]


def attention_points(text: str, layers: UNetLayers, what: str = "attention layers", kind: str = "attn1", presets: dict = ATTENTION_PRESETS) -> frozenset[Point]:
    """Attention points of a kind that `text` (notation or preset) selects. Raises ValueError, one sentence."""
    points = set()
    for item in parse_blocks(_expand_preset(text, presets, layers.architecture, what), what):
        for block in _blocks_of(item, layers, what):
            depth = layers.attention.get(block)
            if depth is None:
                raise ValueError(f"The {what} name {block[0]}{block[1]}, but that block of this {layers.architecture} model has no attention: choose another layer.")
            first, last = (0, depth - 1) if item.index_first is None else (item.index_first, item.index_last)
            if last >= depth:
                raise ValueError(
                    f"The {what} name transformer block {last} of {block[0]}{block[1]}, but that layer of this {layers.architecture} model has "
                    f"{depth}, counted from 0: choose one of them."
                )
            points.update(Point(kind, *block, index) for index in range(first, last + 1))
    return frozenset(points)


def feature_points(text: str, layers: UNetLayers, what: str = "feature layers") -> frozenset[Point]:
    """ResBlock points that `text` (notation or preset) selects. Raises ValueError, one sentence."""
    points = set()
    for item in parse_blocks(_expand_preset(text, FEATURE_PRESETS, layers.architecture, what), what):
        if item.index_first is not None:
            raise ValueError(f"The {what} name a transformer block (.{item.index_first}), but features are taken from ResBlocks: leave the dot out.")
        for block in _blocks_of(item, layers, what):
            if block not in layers.resblocks:
                raise ValueError(f"The {what} name {block[0]}{block[1]}, but this {layers.architecture} model has no ResBlock there: choose another layer.")
            points.add(Point("resblock", *block))
    return frozenset(points)
