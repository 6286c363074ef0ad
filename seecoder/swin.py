"""The backbone: Swin transformer (Liu et al., ICCV 2021) in the form that detection uses, for pictures of any size.

What differs between implementations, as SeeCoder's weights want it: features are padded to whole windows after the norm
and before the shift, padding takes part as ordinary tokens, windows are shifted however small the map, and tokens of
different regions of a shifted window repel each other by -100.
"""

from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, pad

from .sizes import Sizes

PATCH = 4
APART = -100.0  # added to the logit of two tokens that only the cyclic shift has made neighbours
TOKENS_AT_ONCE = 2**12  # bounds the memory of the widest activations, whatever the picture's size


def in_chunks(function, x: Tensor, limit: int) -> Tensor:
    """function(x) computed for at most `limit` entries of the first dimension at a time."""
    return function(x) if len(x) <= limit else torch.cat([function(part) for part in x.split(limit)])


def relative_index(window: int, device=None) -> Tensor:
    """Row of the bias table for every pair of tokens of a window, [window^2, window^2]."""
    y, x = torch.meshgrid(torch.arange(window, device=device), torch.arange(window, device=device), indexing="ij")
    y, x = y.flatten(), x.flatten()
    return (y[:, None] - y + window - 1) * (2 * window - 1) + (x[:, None] - x + window - 1)


def _places(count: int, window: int, shift: int, device) -> tuple[Tensor, Tensor]:
    """(window, place in it) of each line of a map that is filled up to `count` windows and then shifted cyclically."""
    line = (torch.arange(count * window, device=device) - shift) % (count * window)
    return line // window, line % window


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows, with a learned bias per relative position."""

    def __init__(self, channels: int, window: int, heads: int, ops, **at):
        super().__init__()
        self.window, self.heads = window, heads
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads, **at))
        self.qkv = ops.Linear(channels, 3 * channels, **at)
        self.proj = ops.Linear(channels, channels, **at)

    def bias(self, like: Tensor) -> Tensor:
        """[1, heads, window^2, window^2] in the dtype and on the device of `like`."""
        table = self.relative_position_bias_table.to(like)
        return table[relative_index(self.window, like.device)].permute(2, 0, 1)[None]

    def forward(self, qkv: Tensor, bias: Tensor) -> Tensor:
        """Attention without its projections: qkv [windows, window^2, 3 C] -> [windows, window^2, C]; bias as from `bias`, with the shift's mask where there is one."""
        from comfy.ldm.modules.attention import attention_pytorch

        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return attention_pytorch(q, k, v, self.heads, mask=bias, skip_reshape=True)


class Mlp(nn.Module):
    """Two linear layers with the exact (erf) GELU between them."""

    def __init__(self, channels: int, hidden: int, ops, **at):
        super().__init__()
        self.fc1 = ops.Linear(channels, hidden, **at)
        self.fc2 = ops.Linear(hidden, channels, **at)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> the same shape."""
        return self.fc2(gelu(self.fc1(x)))


class Block(nn.Module):
    """Window attention, then MLP, each behind a LayerNorm and added to its input."""

    def __init__(self, channels: int, window: int, heads: int, hidden: int, shift: int, ops, **at):
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = ops.LayerNorm(channels, **at)
        self.attn = WindowAttention(channels, window, heads, ops, **at)
        self.norm2 = ops.LayerNorm(channels, **at)
        self.mlp = Mlp(channels, hidden, ops, **at)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, H, W, C] -> the same shape.

        Windows are filled up with zeros behind the norm. A zero's q, k and v are the projection's bias, so nothing is projected in the padding;
        at 512 px a fifth of the cells of the third stage are padding, and more than half of those of the fourth.
        """
        height, width = x.shape[1:3]
        w = self.window
        rows, columns = -(-height // w), -(-width // w)
        # where the map's lines are in the padded and shifted one, window by window, and behind them those of the padding
        (down, y), (across, xs) = (_places(count, w, self.shift, x.device) for count in (rows, columns))
        nothing = self.attn.qkv(x.new_zeros(1, x.shape[-1]))
        qkv = x.new_empty(x.shape[0], rows, columns, w, w, nothing.shape[-1])
        qkv[:, down[height:], :, y[height:]] = nothing
        qkv[:, :, across[width:], :, xs[width:]] = nothing
        at_once = max(1, TOKENS_AT_ONCE // width)
        strips = [slice(start, min(start + at_once, height)) for start in range(0, height, at_once)]
        places = [(slice(None), down[strip, None], across[:width], y[strip, None], xs[:width]) for strip in strips]
        for strip, place in zip(strips, places):
            qkv[place] = self.attn.qkv(self.norm1(x[:, strip]))
        mixed = self._attend(qkv)
        del qkv
        parts = [self.attn.proj(mixed[place]).add_(x[:, strip]) for strip, place in zip(strips, places)]
        x = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return x + in_chunks(lambda part: self.mlp(self.norm2(part)), x.flatten(0, 2), TOKENS_AT_ONCE).view_as(x)

    def _attend(self, windows: Tensor) -> Tensor:
        """Attention in every window of q, k and v [B, rows, columns, window, window, 3 C], which is left alone. Returns [B, rows, columns, window, window, C].

        The shift brings strangers together in the last row and the last column of windows only, in the same pattern
        everywhere along them: four masks serve a picture of any size.
        """
        bias = self.attn.bias(windows)
        late = torch.arange(self.window, device=windows.device) >= self.window - self.shift
        late_y, late_x = late.repeat_interleave(self.window), late.repeat(self.window)
        out = windows.new_empty(*windows.shape[:-1], windows.shape[-1] // 3)
        at_once = max(1, TOKENS_AT_ONCE // (windows.shape[2] * self.window**2))
        for y_edge, x_edge in ((False, False), (False, True), (True, False), (True, True)) if self.shift else ((None, None),):
            # in the features' dtype: fused attention on CUDA refuses a bias of another one
            masked = bias if y_edge is None else bias + APART * ((y_edge & (late_y[:, None] != late_y)) | (x_edge & (late_x[:, None] != late_x))).to(bias)
            where = [slice(None) if edge is None else slice(-1, None) if edge else slice(0, -1) for edge in (y_edge, x_edge)]
            part, target = windows[:, where[0], where[1]], out[:, where[0], where[1]]
            for start in range(0, part.shape[1] if part.numel() else 0, at_once):
                some = part[:, start : start + at_once]
                target[:, start : start + at_once] = self.attn(some.flatten(0, 2).flatten(1, 2), masked).view(*some.shape[:-1], -1)
        return out


class Downsample(nn.Module):
    """Patch merging: 2 x 2 cells become one of twice the channels."""

    def __init__(self, channels: int, ops, **at):
        super().__init__()
        self.norm = ops.LayerNorm(4 * channels, **at)
        self.reduction = ops.Linear(4 * channels, 2 * channels, bias=False, **at)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), 2 C]; odd sides get a zero row or column."""
        x = pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        quarters = [x[:, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
        return self.reduction(self.norm(torch.cat(quarters, -1)))


class Stage(nn.Module):
    """Blocks of one resolution, every other one shifted, and the step to the next resolution."""

    def __init__(self, sizes: Sizes, index: int, ops, **at):
        super().__init__()
        channels = sizes.channels[index]
        self.blocks = nn.ModuleList(
            Block(channels, sizes.window, sizes.heads[index], sizes.mlp[index], sizes.window // 2 if number % 2 else 0, ops, **at) for number in range(sizes.depths[index])
        )
        self.downsample = Downsample(channels, ops, **at) if index + 1 < len(sizes.depths) else None


class Swin(nn.Module):
    """Pictures to feature maps at 1/8, 1/16 and 1/32 of their size."""

    def __init__(self, sizes: Sizes, ops, **at):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": ops.Conv2d(3, sizes.embed, PATCH, PATCH, **at), "norm": ops.LayerNorm(sizes.embed, **at)})
        self.layers = nn.ModuleList(Stage(sizes, index, ops, **at) for index in range(len(sizes.depths)))
        # norm0 stands in the files but nothing reads what it would give
        for index, channels in enumerate(sizes.channels[1:], 1):
            self.add_module(f"norm{index}", ops.LayerNorm(channels, **at))

    def forward(self, pixels: Tensor, tick: Callable[[], None] = lambda: None) -> list[Tensor]:
        """RGB [B, 3, H, W] in 0..1, not normalised -> [B, h, w, C] of res3, res4, res5; tick after every block."""
        x = pad(pixels, (0, -pixels.shape[3] % PATCH, 0, -pixels.shape[2] % PATCH))
        x = self.patch_embed["norm"](self.patch_embed["proj"](x).permute(0, 2, 3, 1))
        features = []
        for index, stage in enumerate(self.layers):
            for block in stage.blocks:
                x = block(x)
                tick()
            if index:
                features.append(getattr(self, f"norm{index}")(x))
            if stage.downsample is not None:
                x = stage.downsample(x)
        return features
