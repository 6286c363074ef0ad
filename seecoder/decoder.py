"""The decoder: brings the backbone's maps to the width of a token.

Its six layers are written as self-attention but, as published, attend across the batch at every pixel by itself: for
one picture the softmax has one entry, and a layer's attention is its value path alone. That path is what is implemented,
with value and output projection folded into one matrix, so that pictures of a batch do not leak into each other.
"""

from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from .sizes import CONV_GROUPS, LEVELS, Sizes
from .swin import TOKENS_AT_ONCE, in_chunks

EMBED_ORDER = ("res5", "res4", "res3")  # rows of level_embed


def fold_value_path(in_weight: Tensor, in_bias: Tensor, out_weight: Tensor, out_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of out_proj(v_proj(x)) as one layer; in_weight [3 C, C] with rows Q, K, V. In the dtype of in_weight."""
    _, _, value = in_weight.double().chunk(3)
    _, _, value_bias = in_bias.double().chunk(3)
    outer = out_weight.double()
    return (outer @ value).to(in_weight.dtype), (outer @ value_bias + out_bias.double()).to(in_weight.dtype)


class DecoderLayer(nn.Module):
    """Value path and feed-forward, each added to its input and then normalised."""

    def __init__(self, width: int, hidden: int, ops, **at):
        super().__init__()
        self.value_path = ops.Linear(width, width, **at)
        self.norm1 = ops.LayerNorm(width, **at)
        self.linear1 = ops.Linear(width, hidden, **at)
        self.linear2 = ops.Linear(hidden, width, **at)
        self.norm2 = ops.LayerNorm(width, **at)

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, C] -> the same shape."""
        x = self.norm1(x + self.value_path(x))
        return self.norm2(x + self.linear2(relu(self.linear1(x))))


class Projection(nn.Module):
    """1 x 1 convolution and GroupNorm over all cells of a map."""

    def __init__(self, channels: int, width: int, bias: bool, ops, **at):
        super().__init__()
        self.linear = ops.Linear(channels, width, bias=bias, **at)
        self.norm = ops.GroupNorm(CONV_GROUPS, width, **at)

    def forward(self, x: Tensor) -> Tensor:
        """[B, cells, C] -> [B, cells, width]."""
        return self.norm(self.linear(x).transpose(1, 2)).transpose(1, 2)


class Decoder(nn.Module):
    """Maps of three resolutions to maps of one width."""

    def __init__(self, sizes: Sizes, ops, **at):
        super().__init__()
        self.level_embed = nn.Parameter(torch.empty(len(LEVELS), sizes.width, **at))
        self.inproj_layers = nn.ModuleDict({level: Projection(c, sizes.width, True, ops, **at) for level, c in zip(LEVELS, sizes.channels[1:])})
        self.lateral_layers = nn.ModuleDict({level: Projection(c, sizes.width, False, ops, **at) for level, c in zip(LEVELS, sizes.channels[1:])})
        self.layers = nn.ModuleList(DecoderLayer(sizes.width, sizes.decoder_hidden, ops, **at) for _ in range(sizes.decoder_layers))

    def forward(self, features: list[Tensor], tick: Callable[[], None] = lambda: None) -> list[Tensor]:
        """[B, h, w, C] of res3, res4, res5 -> [B, h * w, width] of the same; tick after every level."""
        out = []
        for level, feature in zip(LEVELS, features):
            cells = feature.flatten(1, 2)
            x = self.inproj_layers[level](cells) + self.level_embed[EMBED_ORDER.index(level)].to(cells)
            x = in_chunks(self._layers, x.flatten(0, 1), TOKENS_AT_ONCE).view_as(x)
            out.append(x + self.lateral_layers[level](cells))
            tick()
        return out

    def _layers(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x
