"""The whole network, and the renaming of a file's tensors to it."""

from __future__ import annotations

import re
from typing import Callable

import torch
from torch import Tensor, nn

from .decoder import Decoder, fold_value_path
from .queries import QueryTransformer
from .sizes import LEVELS, STRIDES, Sizes, check_tensors
from .swin import Swin

UNUSED = re.compile(r".*relative_position_index|imencoder\.norm0\..*")


class SeeCoder(nn.Module):
    """Pictures to the tokens of a prompt (Xu et al. 2024, section 3.3).

    ops: the layer classes, `comfy.ops.manual_cast` at run time. at: device and dtype of the parameters.
    """

    def __init__(self, sizes: Sizes, ops, **at):
        super().__init__()
        self.sizes = sizes
        self.imencoder = Swin(sizes, ops, **at)
        self.imdecoder = Decoder(sizes, ops, **at)
        self.qtransformer = QueryTransformer(sizes, ops, **at)

    def forward(self, pixels: Tensor, coverage: Tensor | None = None, reading: list | None = None, tick: Callable[[], None] = lambda: None) -> Tensor:
        """RGB [B, 3, H, W] in 0..1 -> tokens [B, queries, width].

        coverage: [B, H, W] in 0..1; cells of which less than half is covered are not read (see `reading_biases`).
        reading: a list that receives (level name, map [B, queries, h, w]) for each level. tick: called after every block of the
        backbone, level of the decoder and layer of the query transformer; what it raises ends the encoding.
        """
        features = self.imencoder(pixels, tick)
        grids = [(feature.shape[1], feature.shape[2]) for feature in features]
        levels = self.imdecoder(features, tick)
        biases = None if coverage is None else [reading_biases(coverage, grid, stride).to(levels[0]) for grid, stride in zip(grids, STRIDES)]
        maps: list | None = None if reading is None else []
        tokens = self.qtransformer(levels, grids, biases, maps, tick)
        if reading is not None and maps is not None:
            reading += [(LEVELS[level], seen.unflatten(-1, grids[level])) for level, seen in maps]
        return tokens


def reading_biases(coverage: Tensor, grid: tuple[int, int], stride: int) -> Tensor:
    """[B, 1, 1, h * w]: 0 for the cells of a map that may be read, minus infinity for the others.

    coverage: [B, H, W] in 0..1; stride: pixels per cell. A cell counts when at least half of it is covered; where no cell is (a spot smaller than half
    a cell), the most covered one does.
    """
    height, width = coverage.shape[1:]
    # cells are counted from the top left; the last ones reach over the border, and only what lies inside counts
    reach = (0, stride * grid[1] - width, 0, stride * grid[0] - height)
    inside, covered = (nn.functional.avg_pool2d(nn.functional.pad(x, reach), stride) for x in (torch.ones_like(coverage[:, None], dtype=torch.float32), coverage[:, None].float()))
    shares = (covered / inside.clamp(min=1e-6)).flatten(1)
    readable = (shares >= 0.5) | ((shares < 0.5).all(1, keepdim=True) & (shares == shares.amax(1, keepdim=True)))
    return torch.zeros_like(shares).masked_fill(~readable, float("-inf"))[:, None, None]


def rename(state: dict[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
    """A file's tensors, without prefix, under the names of `SeeCoder`; unused ones dropped, packed ones split, value paths folded.

    Takes the tensors out of `state`, so that nothing is held twice. Raises ValueError as `check_tensors`.
    """
    check_tensors(state, sizes)
    out: dict[str, Tensor] = {}
    folded: dict[str, dict[str, Tensor]] = {}
    while state:
        key, tensor = state.popitem()
        if UNUSED.fullmatch(key):
            continue
        if match := re.fullmatch(r"imdecoder\.transformer\.layers\.(\d+)\.self_attn\.(.*)", key):
            folded.setdefault(match[1], {})[match[2]] = tensor
            continue
        key = re.sub(r"^imdecoder\.transformer\.layers\.", "imdecoder.layers.", key)
        key = re.sub(r"^(imdecoder\.inproj_layers\.res\d)\.0\.", r"\1.linear.", key)
        key = re.sub(r"^(imdecoder\.inproj_layers\.res\d)\.1\.", r"\1.norm.", key)
        key = re.sub(r"^(imdecoder\.lateral_layers\.res\d)\.weight$", r"\1.linear.weight", key)
        key = re.sub(r"^qtransformer\.transformer_crossatt_layers\.(\d+)\.(multihead_attn\.)?", r"qtransformer.cross.\1.", key)
        key = re.sub(r"^qtransformer\.transformer_selfatt_layers\.(\d+)\.(self_attn\.)?", r"qtransformer.self_attention.\1.", key)
        key = re.sub(r"^qtransformer\.transformer_feedforward_layers\.", "qtransformer.feed_forward.", key)
        key = key.replace(".out_proj.", ".to_out.")
        if tensor.ndim == 4 and key.startswith("imdecoder."):
            tensor = tensor.flatten(1)
        if match := re.fullmatch(r"(.*)\.in_proj_(weight|bias)", key):
            # views of the packed tensor: nothing is copied
            out.update({f"{match[1]}.{name}.{match[2]}": part for name, part in zip(("to_q", "to_k", "to_v"), tensor.chunk(3))})
            continue
        out[key] = tensor
    for number, parts in folded.items():
        weight, bias = fold_value_path(parts["in_proj_weight"], parts["in_proj_bias"], parts["out_proj.weight"], parts["out_proj.bias"])
        out.update({f"imdecoder.layers.{number}.value_path.weight": weight, f"imdecoder.layers.{number}.value_path.bias": bias})
    return out


def build(state: dict[str, Tensor], sizes: Sizes, ops) -> SeeCoder:
    """The network with the tensors of a file (without prefix, see `rename`) as its parameters, not copied. Raises ValueError as `rename`."""
    network = SeeCoder(sizes, ops, device="meta")
    network.load_state_dict(rename(state, sizes), strict=True, assign=True)
    return network.eval().requires_grad_(False)
