"""The UNet with two sets of spatial transformers, one for texts and one for pictures (Xu et al. 2023, section 3.2).

All else (residual blocks, samplers, time embedding) is shared. With both contexts at ratio r, every attention block gives

    h' = r * S_text(h, c_text) + (1 - r) * S_image(h, c_image)

where S is a whole spatial transformer: group norm, projections, self-attention, cross-attention, feed-forward and the
residual around them. That is why patches of the host's attention cannot express it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor

from .keys import CONTEXT, IMAGE, TEXT, Name, group_of

SETS = (TEXT, IMAGE)
TWIN = "image"  # name of the second set's modules: `input_blocks.1.1.image.norm.weight`
MIX = "palimpsest_versatile_mix"  # in transformer_options during a UNet call: a Mix
BRANCH = "palimpsest_versatile_branch"  # in transformer_options while a branch runs: "text" or "image", for patches that want to know


@dataclass(frozen=True)
class Mix:
    """What an attention block mixes. ratio: share of the text set, 0 to 1. image: context of the image set [B, tokens, width] where both sets run, else None."""

    ratio: float
    image: Tensor | None = None


class PairedTransformer(SpatialTransformer):
    """Two spatial transformers of one shape in one place; takes the arguments of the host's class.

    The text set is the block itself, so that its tensors keep the names that LoRA files and merges address.
    A subclass, because the host hands contexts to this class only.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        setattr(self, TWIN, SpatialTransformer(*args, **kwargs))

    def branch(self, which: str, x: Tensor, context: Tensor | None, transformer_options: dict) -> Tensor:
        """One set alone, its residual included. x: [B, C, H, W]; context: [B, tokens, width]."""
        transformer_options[BRANCH] = which
        run = super().forward if which == TEXT else getattr(self, TWIN)
        out = run(x, context, transformer_options)
        del transformer_options[BRANCH]
        return out

    def forward(self, x: Tensor, context: Tensor | None = None, transformer_options: dict | None = None) -> Tensor:
        """x: [B, C, H, W]; context: the only context, or the text's where both sets run. Without a Mix in the options the text set runs."""
        transformer_options = {} if transformer_options is None else transformer_options
        mix = transformer_options.get(MIX)
        ratio = 1.0 if mix is None else mix.ratio
        # a set without a share is not run, which also makes the other one exact
        if ratio >= 1.0:
            return self.branch(TEXT, x, context, transformer_options)
        if ratio <= 0.0:
            return self.branch(IMAGE, x, context if mix.image is None else _rows(mix.image, x), transformer_options)
        if mix.image is None:
            raise ValueError("A ratio between 0 and 1 needs two contexts, but the model was called with one: use Versatile Dual Context.")
        text = self.branch(TEXT, x, context, transformer_options)
        image = self.branch(IMAGE, x, _rows(mix.image, x), transformer_options)
        return torch.lerp(image, text, ratio)


def _rows(context: Tensor, x: Tensor) -> Tensor:
    """The context with as many rows as x: other packs' wrappers may have multiplied the rows that they know of."""
    if len(context) == len(x):
        return context
    if len(x) % len(context):
        raise ValueError(
            f"The image context has {len(context)} rows, but another node's patch calls the model with {len(x)}: remove the patch that changes the number of rows."
        )
    return context.repeat(len(x) // len(context), 1, 1)


class DualUNet(UNetModel):
    """The host's UNet with both sets (or with one of them under the stock names).

    sets: which attention sets the weights hold, in the order text, image. Other arguments: those of UNetModel.
    """

    def __init__(self, *args, sets: tuple[str, ...] = SETS, **kwargs):
        super().__init__(*args, **kwargs)
        self.sets = tuple(sets)
        self.paired = self.sets == SETS
        if not self.paired:
            return
        more = {"dtype": kwargs.get("dtype", torch.float32), "device": kwargs.get("device"), "operations": kwargs["operations"]}
        for block in (*self.input_blocks, self.middle_block, *self.output_blocks):
            for number, layer in enumerate(block):
                if isinstance(layer, SpatialTransformer):
                    block[number] = _pair(layer, kwargs["context_dim"], more)

    def check_latent(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError, one sentence, for the latent of a text. shape: [channels, height, width]; the host makes an empty one fit by its channels alone."""
        if shape[0] != self.in_channels or shape[-2:] == (1, 1):
            raise ValueError(
                f"The image diffuser works on latents of pictures, [batch, {self.in_channels}, height, width], but got {list(shape)} for each: "
                "connect Empty Latent Image or VAE Encode instead of the latent of a text."
            )

    def forward(self, x, timesteps=None, context=None, y=None, control=None, transformer_options=None, vd_image=None, vd_ratio=1.0, **kwargs):
        """As the host's. vd_ratio: share of the text set; vd_image: the image context where both sets run, context is then the text's.

        Raises ValueError, one sentence, for a latent of another kind.
        """
        self.check_latent(tuple(x.shape[1:]))
        options = {**(transformer_options or {})}
        if self.paired:
            options[MIX] = Mix(float(vd_ratio), vd_image)
        return super().forward(x, timesteps, context, y, control, options, **kwargs)


def _pair(layer: SpatialTransformer, context_width: int, more: dict) -> PairedTransformer:
    """A pair of the geometry of a layer that the host has built."""
    first = layer.transformer_blocks[0]
    return PairedTransformer(
        layer.in_channels, first.n_heads, first.d_head, depth=len(layer.transformer_blocks), context_dim=context_width,
        disable_self_attn=first.disable_self_attn, use_linear=layer.use_linear, attn_precision=first.attn_precision, **more,
    )


def place(name: Name, sets: tuple[str, ...] = SETS) -> str | None:
    """The tensor of `DualUNet(sets=sets)` that holds a tensor of the files; None for what an image model does not need.

    The residual blocks and the time embedding are the image diffuser's; of its attention and the text diffuser's, what `sets` names.
    """
    if group_of(name.key) != CONTEXT:
        return name.key if name.part == IMAGE else None
    if name.part not in sets:
        return None
    if name.part == sets[0]:
        return name.key
    parts = name.key.split(".")
    modules = 2 if parts[0] == "middle_block" else 3
    return ".".join([*parts[:modules], TWIN, *parts[modules:]])


def find(key: str) -> Name | None:
    """The inverse of `place` for both sets: what a tensor of the host's layout is, twins included; None where it is none."""
    parts = key.split(".")
    modules = 2 if parts[0] == "middle_block" else 3
    twin = len(parts) > modules and parts[modules] == TWIN
    plain = ".".join([*parts[:modules], *parts[modules + 1:]]) if twin else key
    group = group_of(plain)
    if group is None or (twin and group != CONTEXT):
        return None
    return Name(TEXT if group == CONTEXT and not twin else IMAGE, plain)
