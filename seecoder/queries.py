"""The query transformer: learned queries read the decoder's maps and come out as the tokens of a prompt."""

from __future__ import annotations

import math
from typing import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, silu

from .sizes import GLOBAL, LEVELS, QUERY_HEADS, Sizes

FREQUENCIES = 20


def position_features(height: int, width: int, device=None) -> Tensor:
    """The 80 sines and cosines of every cell of a map, [height * width, 80], in float32 (half precision spoils them).

    Angles run with the distance from the middle in units of the shorter side m; frequencies are m/2 to the powers 0 .. 1.
    """
    shorter = min(height, width)
    frequencies = (shorter / 2) ** (torch.arange(FREQUENCIES, device=device, dtype=torch.float32) / (FREQUENCIES - 1))
    y = 2 * math.pi * (torch.arange(height, device=device, dtype=torch.float32) + 0.5 - height / 2) / shorter
    x = 2 * math.pi * (torch.arange(width, device=device, dtype=torch.float32) + 0.5 - width / 2) / shorter
    down, across = (y[:, None] * frequencies)[:, None].expand(-1, width, -1), (x[:, None] * frequencies)[None].expand(height, -1, -1)
    return torch.cat([down.sin(), down.cos(), across.sin(), across.cos()], -1).flatten(0, 1)


class PositionEmbedding(nn.Module):
    """Position-aware variant: an MLP on the sines and cosines."""

    def __init__(self, width: int, ops, **at):
        super().__init__()
        self.mlp = nn.ModuleDict({str(place): ops.Linear(inner, width, **at) for place, inner in ((0, 4 * FREQUENCIES), (2, width), (4, width))})

    def forward(self, height: int, width: int, like: Tensor) -> Tensor:
        """[height * width, C] in the dtype and on the device of `like`."""
        x = position_features(height, width, like.device).to(like.dtype)
        return self.mlp["4"](silu(self.mlp["2"](silu(self.mlp["0"](x)))))


class Attention(nn.Module):
    """Multi-head attention with a residual connection and a LayerNorm after it."""

    def __init__(self, width: int, ops, **at):
        super().__init__()
        for name in ("to_q", "to_k", "to_v", "to_out"):
            self.add_module(name, ops.Linear(width, width, **at))
        self.norm = ops.LayerNorm(width, **at)

    def forward(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        """x, query [B, n, C], key, value [B, m, C] -> [B, n, C]; bias [B, 1, 1, m] is added to the logits."""
        from comfy.ldm.modules.attention import attention_pytorch

        out = attention_pytorch(self.to_q(query), self.to_k(key), self.to_v(value), QUERY_HEADS, mask=bias)
        return self.norm(x + self.to_out(out))

    def weights(self, query: Tensor, key: Tensor, bias: Tensor | None = None) -> Tensor:
        """The attention map, mean over the heads, [B, n, m] in float32; for pictures only."""
        q, k = (layer(x).float().unflatten(-1, (QUERY_HEADS, -1)).transpose(1, 2) for layer, x in ((self.to_q, query), (self.to_k, key)))
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
        return (logits if bias is None else logits + bias.float()).softmax(-1).mean(1)


class FeedForward(nn.Module):
    """Two linear layers with ReLU, residual, LayerNorm after."""

    def __init__(self, width: int, hidden: int, ops, **at):
        super().__init__()
        self.linear1 = ops.Linear(width, hidden, **at)
        self.linear2 = ops.Linear(hidden, width, **at)
        self.norm = ops.LayerNorm(width, **at)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, n, C] -> the same shape."""
        return self.norm(x + self.linear2(relu(self.linear1(x))))


class QueryTransformer(nn.Module):
    """Nine layers; layer i reads level i mod 3. Only the local queries read the picture, all of them talk to each other."""

    def __init__(self, sizes: Sizes, ops, **at):
        super().__init__()
        self.init_query = ops.Embedding(sizes.queries, sizes.width, **at)
        self.query_pos_embedding = ops.Embedding(sizes.queries, sizes.width, **at)
        self.level_embed = ops.Embedding(len(LEVELS), sizes.width, **at)
        self.cross = nn.ModuleList(Attention(sizes.width, ops, **at) for _ in range(sizes.query_layers))
        self.self_attention = nn.ModuleList(Attention(sizes.width, ops, **at) for _ in range(sizes.query_layers))
        self.feed_forward = nn.ModuleList(FeedForward(sizes.width, sizes.query_hidden, ops, **at) for _ in range(sizes.query_layers))
        self.pe_layer = PositionEmbedding(sizes.width, ops, **at) if sizes.position else None

    def forward(self, levels: list[Tensor], grids: list[tuple[int, int]], biases: list[Tensor] | None = None, reading: list | None = None,
                tick: Callable[[], None] = lambda: None) -> Tensor:
        """levels [B, h * w, C] with their (h, w) -> tokens [B, queries, C].

        biases: per level [B, 1, 1, h * w], added to the logits of the cross-attention. reading: a list that receives, for the
        last layer of each level, (level, map [B, queries, h * w]) of what the queries read; the global ones read through the
        local ones that they attend to in the layer's self-attention. tick: called after every layer.
        """
        like = levels[0]
        values = [x + self.level_embed.weight[i].to(like) for i, x in enumerate(levels)]
        keys = values if self.pe_layer is None else [x + self.pe_layer(*grid, like) for x, grid in zip(values, grids)]
        x = self.init_query.weight.to(like).expand(len(like), -1, -1)
        positions = self.query_pos_embedding.weight.to(like)
        for i, (cross, own, feed_forward) in enumerate(zip(self.cross, self.self_attention, self.feed_forward)):
            level = i % len(levels)
            bias = None if biases is None else biases[level]
            whole, local = x[:, :GLOBAL], x[:, GLOBAL:]
            asked = local + positions[GLOBAL:]
            local = cross(local, asked, keys[level], values[level], bias)
            x = torch.cat([whole, local], 1)
            placed = x + positions
            if reading is not None and i + len(levels) >= len(self.cross):
                read = cross.weights(asked, keys[level], bias)
                among = own.weights(placed[:, :GLOBAL], placed)[..., GLOBAL:]
                reading.append((level, torch.cat([among / among.sum(-1, keepdim=True) @ read, read], 1)))
            x = feed_forward(own(x, placed, placed, x))
            tick()
        return x
