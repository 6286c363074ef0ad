"""SeeCoder written down plainly, for comparison only: explicit attention maps, no folding, no chunks, official tensor names.

Shares no code with seecoder/, so that the tests can hold one against the other.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


class Explicit:
    """A function of pictures, over a state dict with official names (without `ctx.image.`)."""

    def __init__(self, state: dict[str, Tensor], heads: tuple[int, ...], depths: tuple[int, ...], window: int):
        self.state, self.heads, self.depths, self.window = state, heads, depths, window
        cells = [(i, j) for i in range(window) for j in range(window)]
        self.index = torch.tensor([[(a - c + window - 1) * (2 * window - 1) + (b - d + window - 1) for c, d in cells] for a, b in cells])

    def __call__(self, pixels: Tensor) -> Tensor:
        """RGB [1, 3, H, W] in 0..1 -> [1, queries, width]."""
        return self.queries(self.decoder(self.backbone(pixels)))

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    # -- backbone ------------------------------------------------------------------------------------------------------

    def backbone(self, pixels: Tensor) -> dict[str, Tensor]:
        """Maps [1, C, h, w] of res3, res4, res5."""
        name = "imencoder.patch_embed"
        pixels = F.pad(pixels, (0, (4 - pixels.shape[3] % 4) % 4, 0, (4 - pixels.shape[2] % 4) % 4))
        x = F.conv2d(pixels, self.state[f"{name}.proj.weight"], self.state[f"{name}.proj.bias"], stride=4)
        x = self.norm(f"{name}.norm", x.permute(0, 2, 3, 1))
        out = {}
        for stage, depth in enumerate(self.depths):
            for block in range(depth):
                x = self.block(f"imencoder.layers.{stage}.blocks.{block}", x, self.heads[stage], block % 2 == 1)
            if stage:
                out[f"res{stage + 2}"] = self.norm(f"imencoder.norm{stage}", x).permute(0, 3, 1, 2)
            if stage + 1 < len(self.depths):
                name = f"imencoder.layers.{stage}.downsample"
                x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
                x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
                x = self.linear(f"{name}.reduction", self.norm(f"{name}.norm", x))
        return out

    def block(self, name: str, x: Tensor, heads: int, shifted: bool) -> Tensor:
        w, (_, height, width, channels) = self.window, x.shape
        rows, columns = math.ceil(height / w), math.ceil(width / w)
        y = F.pad(self.norm(f"{name}.norm1", x), (0, 0, 0, columns * w - width, 0, rows * w - height))
        shift = w // 2 if shifted else 0
        y = torch.roll(y, (-shift, -shift), (1, 2))
        windows = y.reshape(rows, w, columns, w, channels).permute(0, 2, 1, 3, 4).reshape(rows * columns, w * w, channels)
        qkv = self.linear(f"{name}.attn.qkv", windows).reshape(rows * columns, w * w, 3, heads, channels // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        logits = (q * (channels // heads) ** -0.5) @ k.transpose(-2, -1)
        table = self.state[f"{name}.attn.relative_position_bias_table"]
        logits = logits + table[self.index].permute(2, 0, 1)
        if shifted:
            bands = [[0 if p < size - w else 1 if p < size - shift else 2 for p in range(size)] for size in (rows * w, columns * w)]
            region = 3 * torch.tensor(bands[0])[:, None] + torch.tensor(bands[1])
            region = region.reshape(rows, w, columns, w).permute(0, 2, 1, 3).reshape(rows * columns, w * w)
            logits = logits - 100.0 * (region[:, None, :] != region[:, :, None])[:, None].to(logits)
        windows = (logits.softmax(-1) @ v).transpose(1, 2).reshape(rows * columns, w * w, channels)
        y = self.linear(f"{name}.attn.proj", windows)
        y = y.reshape(rows, columns, w, w, channels).permute(0, 2, 1, 3, 4).reshape(1, rows * w, columns * w, channels)
        x = x + torch.roll(y, (shift, shift), (1, 2))[:, :height, :width]
        return x + self.linear(f"{name}.mlp.fc2", F.gelu(self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.norm2", x))))

    # -- decoder -------------------------------------------------------------------------------------------------------

    def decoder(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Maps [1, width, h, w]."""
        out = {}
        for row, level in enumerate(("res5", "res4", "res3")):
            feature = features[level]
            x = self.convolve(f"imdecoder.inproj_layers.{level}.0", f"imdecoder.inproj_layers.{level}.1", feature)
            tokens = x.flatten(2).transpose(1, 2) + self.state["imdecoder.level_embed"][row]
            width, layer = tokens.shape[-1], 0
            while f"imdecoder.transformer.layers.{layer}.linear1.weight" in self.state:
                name = f"imdecoder.transformer.layers.{layer}"
                value = F.linear(tokens, self.state[f"{name}.self_attn.in_proj_weight"][2 * width:], self.state[f"{name}.self_attn.in_proj_bias"][2 * width:])
                tokens = self.norm(f"{name}.norm1", tokens + self.linear(f"{name}.self_attn.out_proj", value))
                tokens = self.norm(f"{name}.norm2", tokens + self.linear(f"{name}.linear2", F.relu(self.linear(f"{name}.linear1", tokens))))
                layer += 1
            lateral = self.convolve(f"imdecoder.lateral_layers.{level}", f"imdecoder.lateral_layers.{level}.norm", feature)
            out[level] = tokens.transpose(1, 2).reshape(x.shape) + lateral
        return out

    def convolve(self, conv: str, norm: str, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.state[f"{conv}.weight"], self.state.get(f"{conv}.bias"))
        return F.group_norm(x, 32, self.state[f"{norm}.weight"], self.state[f"{norm}.bias"])

    # -- queries -------------------------------------------------------------------------------------------------------

    def attend(self, name: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights, biases = (self.state[f"{name}.in_proj_{kind}"].chunk(3) for kind in ("weight", "bias"))
        q, k, v = (F.linear(x, weight, bias).unflatten(-1, (8, -1)).transpose(1, 2) for x, weight, bias in zip((query, key, value), weights, biases))
        out = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        return self.linear(f"{name}.out_proj", out.transpose(1, 2).flatten(2))

    def queries(self, maps: dict[str, Tensor]) -> Tensor:
        s = self.state
        values, keys = [], []
        for row, level in enumerate(("res3", "res4", "res5")):
            values.append(maps[level].flatten(2).transpose(1, 2) + s["qtransformer.level_embed.weight"][row])
            keys.append(values[-1] + self.position(*maps[level].shape[2:]) if "qtransformer.pe_layer.mlp.0.weight" in s else values[-1])
        x, place = s["qtransformer.init_query.weight"][None], s["qtransformer.query_pos_embedding.weight"][None]
        layer = 0
        while f"qtransformer.transformer_feedforward_layers.{layer}.linear1.weight" in s:
            names = [f"qtransformer.transformer_{kind}_layers.{layer}" for kind in ("crossatt", "selfatt", "feedforward")]
            local = x[:, 4:]
            read = self.attend(f"{names[0]}.multihead_attn", local + place[:, 4:], keys[layer % 3], values[layer % 3])
            x = torch.cat([x[:, :4], self.norm(f"{names[0]}.norm", local + read)], 1)
            x = self.norm(f"{names[1]}.norm", x + self.attend(f"{names[1]}.self_attn", x + place, x + place, x))
            x = self.norm(f"{names[2]}.norm", x + self.linear(f"{names[2]}.linear2", F.relu(self.linear(f"{names[2]}.linear1", x))))
            layer += 1
        return x

    def position(self, height: int, width: int) -> Tensor:
        m, rows = min(height, width), []
        for i in range(height):
            for j in range(width):
                a, b = 2 * math.pi * (i + 0.5 - height / 2) / m, 2 * math.pi * (j + 0.5 - width / 2) / m
                f = [(m / 2) ** (k / 19) for k in range(20)]
                rows.append([math.sin(a * g) for g in f] + [math.cos(a * g) for g in f] + [math.sin(b * g) for g in f] + [math.cos(b * g) for g in f])
        x = torch.tensor(rows).to(self.state["qtransformer.pe_layer.mlp.0.weight"])
        for number in ("0", "2"):
            x = F.silu(self.linear(f"qtransformer.pe_layer.mlp.{number}", x))
        return self.linear("qtransformer.pe_layer.mlp.4", x)
