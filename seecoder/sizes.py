"""Sizes of a SeeCoder, read from the shapes of its state dict, and the list of tensors such a file must hold."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from ..common.shapes import compare_shapes

PREFIX = "ctx.image."  # official files carry it, copies from other tools may not
LEVELS = ("res3", "res4", "res5")
STRIDES = (8, 16, 32)  # pixels per cell of each level
GLOBAL = 4  # the first queries see the picture only through the others
QUERY_HEADS = 8  # heads leave no trace in a state dict; every published file has eight
CONV_GROUPS = 32


@dataclass(frozen=True)
class Sizes:
    """Everything that the shapes tell.

    embed: channels of the first Swin stage; depths and heads per stage; window in cells; width of a token; hidden widths
    and layers of decoder and query transformer; queries in total; position: the position-aware variant.
    """

    embed: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int
    mlp: tuple[int, ...]
    width: int
    decoder_hidden: int
    decoder_layers: int
    queries: int
    query_hidden: int
    query_layers: int
    position: bool

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of every stage."""
        return tuple(self.embed * 2**stage for stage in range(len(self.depths)))


def without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the names without `ctx.image.`; what is not SeeCoder's in a whole-model file is left out."""
    if any(key.startswith(PREFIX) for key in state):
        return {key[len(PREFIX):]: tensor for key, tensor in state.items() if key.startswith(PREFIX)}
    return dict(state)


def _count(state: dict[str, Tensor], pattern: str) -> int:
    """One more than the largest number that fills the pattern's group."""
    return 1 + max((int(match[1]) for key in state if (match := re.match(pattern, key))), default=-1)


def read_sizes(state: dict[str, Tensor]) -> Sizes:
    """Sizes from a state dict without prefix. Raises ValueError, one sentence, when it is no SeeCoder."""
    try:
        stages = _count(state, r"imencoder\.layers\.(\d+)\.")
        block = "imencoder.layers.{}.blocks.0."
        tables = [state[block.format(s) + "attn.relative_position_bias_table"] for s in range(stages)]
        sizes = Sizes(
            embed=state["imencoder.patch_embed.proj.weight"].shape[0],
            depths=tuple(_count(state, rf"imencoder\.layers\.{s}\.blocks\.(\d+)\.") for s in range(stages)),
            heads=tuple(table.shape[1] for table in tables),
            window=(round(tables[0].shape[0] ** 0.5) + 1) // 2,
            mlp=tuple(state[block.format(s) + "mlp.fc1.weight"].shape[0] for s in range(stages)),
            width=state["imdecoder.level_embed"].shape[1],
            decoder_hidden=state["imdecoder.transformer.layers.0.linear1.weight"].shape[0],
            decoder_layers=_count(state, r"imdecoder\.transformer\.layers\.(\d+)\."),
            queries=state["qtransformer.init_query.weight"].shape[0],
            query_hidden=state["qtransformer.transformer_feedforward_layers.0.linear1.weight"].shape[0],
            query_layers=_count(state, r"qtransformer\.transformer_crossatt_layers\.(\d+)\."),
            position=any(key.startswith("qtransformer.pe_layer.") for key in state),
        )
    # IndexError: no stage at all, or tensors with fewer dimensions
    except (KeyError, IndexError) as error:
        raise ValueError(f"The file is no SeeCoder: {describe_other(state)}; choose seecoder-v1-0, seecoder-pa-v1-0 or seecoder-anime-v1-0.") from error
    odd = len(sizes.depths) != len(LEVELS) + 1 or sizes.width % CONV_GROUPS or any(c % n for c, n in zip(sizes.channels, sizes.heads)) or sizes.query_layers < len(LEVELS)
    if odd or sizes.queries <= GLOBAL or not all(tensor.is_floating_point() for key, tensor in state.items() if not key.endswith("relative_position_index")):
        raise ValueError(
            f"The file looks like a SeeCoder of {len(sizes.depths)} stages, {sizes.width} values per token and {sizes.query_layers} query layers, which cannot be run: "
            "choose seecoder-v1-0, seecoder-pa-v1-0 or seecoder-anime-v1-0."
        )
    return sizes


def describe_other(names: Iterable[str]) -> str:
    """What a file with tensors of these names, which is no SeeCoder, seems to be; for the error message."""
    keys = list(names)
    for words, marks in (
        ("it holds an IP-Adapter", ("image_proj.", "ip_adapter.")),
        ("it holds a CLIP vision model", ("vision_model.", "visual.")),
        ("it holds a whole checkpoint", ("model.diffusion_model.", "first_stage_model.")),
        ("it holds a ControlNet", ("control_model.", "controlnet_")),
        ("parts of SeeCoder are missing", ("imencoder.", "imdecoder.", "qtransformer.")),
        ("it holds a LoRA", ("lora_",)),
    ):
        if any(key.startswith(marks) for key in keys):
            return words
    return f"its first tensor is called {keys[0]}" if keys else "it holds no tensor"


def expected_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a file of these sizes, index buffers left out (they can be computed)."""
    out: dict[str, tuple[int, ...]] = {}

    def norm(name: str, channels: int) -> None:
        out.update({f"{name}.weight": (channels,), f"{name}.bias": (channels,)})

    def linear(name: str, inner: int, outer: int, bias: bool = True, tail: tuple[int, ...] = ()) -> None:
        out[f"{name}.weight"] = (outer, inner, *tail)
        if bias:
            out[f"{name}.bias"] = (outer,)

    def attention(name: str) -> None:
        out.update({f"{name}.in_proj_weight": (3 * width, width), f"{name}.in_proj_bias": (3 * width,)})
        linear(f"{name}.out_proj", width, width)

    width, offsets = sizes.width, (2 * sizes.window - 1) ** 2
    linear("imencoder.patch_embed.proj", 3, sizes.embed, tail=(4, 4))
    norm("imencoder.patch_embed.norm", sizes.embed)
    for s, channels in enumerate(sizes.channels):
        for b in range(sizes.depths[s]):
            name = f"imencoder.layers.{s}.blocks.{b}"
            norm(f"{name}.norm1", channels)
            out[f"{name}.attn.relative_position_bias_table"] = (offsets, sizes.heads[s])
            linear(f"{name}.attn.qkv", channels, 3 * channels)
            linear(f"{name}.attn.proj", channels, channels)
            norm(f"{name}.norm2", channels)
            linear(f"{name}.mlp.fc1", channels, sizes.mlp[s])
            linear(f"{name}.mlp.fc2", sizes.mlp[s], channels)
        if s + 1 < len(sizes.depths):
            norm(f"imencoder.layers.{s}.downsample.norm", 4 * channels)
            linear(f"imencoder.layers.{s}.downsample.reduction", 4 * channels, 2 * channels, bias=False)
        norm(f"imencoder.norm{s}", channels)
    out["imdecoder.level_embed"] = (len(LEVELS), width)
    for level, channels in zip(LEVELS, sizes.channels[1:]):
        linear(f"imdecoder.inproj_layers.{level}.0", channels, width, tail=(1, 1))
        norm(f"imdecoder.inproj_layers.{level}.1", width)
        linear(f"imdecoder.lateral_layers.{level}", channels, width, bias=False, tail=(1, 1))
        norm(f"imdecoder.lateral_layers.{level}.norm", width)
    for i in range(sizes.decoder_layers):
        name = f"imdecoder.transformer.layers.{i}"
        attention(f"{name}.self_attn")
        norm(f"{name}.norm1", width)
        linear(f"{name}.linear1", width, sizes.decoder_hidden)
        linear(f"{name}.linear2", sizes.decoder_hidden, width)
        norm(f"{name}.norm2", width)
    for name in ("init_query", "query_pos_embedding"):
        out[f"qtransformer.{name}.weight"] = (sizes.queries, width)
    out["qtransformer.level_embed.weight"] = (len(LEVELS), width)
    for i in range(sizes.query_layers):
        for kind, inner in (("crossatt", "multihead_attn"), ("selfatt", "self_attn")):
            attention(f"qtransformer.transformer_{kind}_layers.{i}.{inner}")
            norm(f"qtransformer.transformer_{kind}_layers.{i}.norm", width)
        name = f"qtransformer.transformer_feedforward_layers.{i}"
        linear(f"{name}.linear1", width, sizes.query_hidden)
        linear(f"{name}.linear2", sizes.query_hidden, width)
        norm(f"{name}.norm", width)
    if sizes.position:
        for place, inner in ((0, 80), (2, width), (4, width)):
            linear(f"qtransformer.pe_layer.mlp.{place}", inner, width)
    return out


def check_tensors(state: dict[str, Tensor], sizes: Sizes) -> None:
    """Raises ValueError, one sentence, when a state dict without prefix lacks a tensor, has one too many, or one of another shape."""
    stored = {key: tuple(tensor.shape) for key, tensor in state.items() if not key.endswith("relative_position_index")}
    compare_shapes(stored, expected_shapes(sizes), "SeeCoder file")
