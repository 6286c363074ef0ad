"""The text diffuser: a UNet of the SD 1.x layout whose state is one latent vector of a text (Xu et al. 2023, section 3.3).

Same sequence of blocks, skips, time embedding and spatial transformers as the image diffuser's, with the blocks of
`fc_blocks` in place of convolutions. With the text set of transformers it varies a text, with the image set it captions a
picture; contexts, flows and ratio are those of the image diffuser. A text latent is [B, 768, 1, 1], so that the host's
samplers take it for a picture of one pixel.
"""

from __future__ import annotations

import functools

import comfy.latent_formats
import comfy.model_base
import comfy.ops
import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import TimestepEmbedSequential
from torch import nn

from .dual import SETS, DualUNet, PairedTransformer
from .fc_blocks import SLOTS, FCResBlock, flat_linear
from .keys import ATTENTION_LEVELS, IMAGE, TEXT
from .model import WIDTH, VersatileConfig, VersatileDiffusion

TEXT_LATENT = 768  # values of the published latent of a text
HEADS = 8
BLOCKS = 2  # residual blocks per level on the way down; one more on the way up
LOADER = "Versatile Text Model Loader"


class TextUNet(DualUNet):
    """The host's UNet, built from flat blocks; its forward pass, patches and wrappers are the host's.

    in_channels: values of a latent; model_channels: channels of the first level; channel_mult: of the levels, in multiples of
    it; context_dim: values of a context token; sets: which attention sets the weights hold, as in `DualUNet`.
    """

    makes_text = True  # to nodes that work on pictures

    def __init__(
        self, in_channels: int = TEXT_LATENT, model_channels: int = 320, channel_mult: tuple[int, ...] = (1, 2, 4, 4), context_dim: int = WIDTH,
        num_heads: int = HEADS, sets: tuple[str, ...] = SETS, dtype=torch.float32, device=None, operations=comfy.ops.disable_weight_init, **unused,
    ):
        nn.Module.__init__(self)  # the parents would build the layers of a picture's UNet
        self.sets = tuple(sets)
        self.paired = self.sets == SETS
        self.in_channels = self.out_channels = in_channels
        self.model_channels, self.channel_mult, self.num_heads, self.dtype = model_channels, tuple(channel_mult), num_heads, dtype
        # what the host's forward pass asks for
        self.num_classes, self.default_num_video_frames, self.predict_codebook_ids = None, None, False

        at = {"dtype": dtype, "device": device}
        linear = flat_linear(operations)
        transformer = PairedTransformer if self.paired else SpatialTransformer
        embedded = 4 * model_channels

        def residual(inputs: int, outputs: int) -> FCResBlock:
            return FCResBlock(inputs, embedded, outputs, operations=operations, **at)

        def attention(channels: int) -> SpatialTransformer:
            return transformer(channels, num_heads, channels // num_heads, depth=1, context_dim=context_dim, operations=operations, **at)

        def sampler(channels: int) -> nn.Module:
            return linear(SLOTS * channels, SLOTS * channels, **at)

        self.time_embed = nn.Sequential(
            operations.Linear(model_channels, embedded, **at), nn.SiLU(), operations.Linear(embedded, embedded, **at)
        )
        channels = model_channels
        blocks: list[list[nn.Module]] = [[linear(in_channels, SLOTS * channels, **at)]]
        skips = [channels]
        for level, multiplier in enumerate(channel_mult):
            for _ in range(BLOCKS):
                layers: list[nn.Module] = [residual(channels, multiplier * model_channels)]
                channels = multiplier * model_channels
                blocks.append([*layers, attention(channels)] if level < ATTENTION_LEVELS else layers)
                skips.append(channels)
            if level < len(channel_mult) - 1:
                blocks.append([sampler(channels)])
                skips.append(channels)
        self.input_blocks = nn.ModuleList(TimestepEmbedSequential(*layers) for layers in blocks)
        self.middle_block = TimestepEmbedSequential(residual(channels, channels), attention(channels), residual(channels, channels))
        blocks = []
        for level, multiplier in reversed(list(enumerate(channel_mult))):
            for number in range(BLOCKS + 1):
                layers = [residual(channels + skips.pop(), multiplier * model_channels)]
                channels = multiplier * model_channels
                if level < ATTENTION_LEVELS:
                    layers.append(attention(channels))
                if level > 0 and number == BLOCKS:
                    layers.append(sampler(channels))
                blocks.append(layers)
        self.output_blocks = nn.ModuleList(TimestepEmbedSequential(*layers) for layers in blocks)
        self.out = nn.Sequential(operations.GroupNorm(32, channels, **at), nn.SiLU(), linear(SLOTS * channels, in_channels, slots=1, **at))

    def check_latent(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError, one sentence, for the latent of a picture. shape: [channels, height, width]."""
        if shape != (self.in_channels, 1, 1):
            raise ValueError(
                f"The text diffuser works on latents of texts, [batch, {self.in_channels}, 1, 1], but got {list(shape)} for each: "
                "connect Versatile Empty Text Latent or Versatile Optimus Encode instead of the latent of a picture."
            )


class TextLatent(comfy.latent_formats.LatentFormat):
    """Latents of texts: unscaled, without a preview."""

    latent_channels = TEXT_LATENT
    scale_factor = 1.0


class TextDiffuser(VersatileDiffusion):
    """The text diffuser as a model of the host: eps prediction, SD 1.x's schedule, conditioning as the image diffuser's."""

    def __init__(self, model_config, model_type=comfy.model_base.ModelType.EPS, device=None, sets: tuple[str, ...] = SETS):
        comfy.model_base.BaseModel.__init__(self, model_config, model_type, device=device, unet_model=functools.partial(TextUNet, sets=sets))
        self.sets = tuple(sets)

    def _check(self, ratio: float | None, main: torch.Tensor, image: torch.Tensor | None, prompt: str) -> None:
        """As `VersatileDiffusion._check`; a set that has a share and is not loaded is refused with this model's loader named."""
        asked = () if ratio is None else tuple(name for share, name in ((ratio, TEXT), (1 - ratio, IMAGE)) if share > 0)
        if lacking := [name for name in asked if name not in self.sets]:
            raise ValueError(
                f"The loaded text diffuser has no attention for {lacking[0]} contexts, but the {prompt or 'connected'} conditioning is one: "
                f'load it again with contexts "both" in {LOADER}.'
            )
        super()._check(ratio, main, image, prompt)


class TextConfig(VersatileConfig):
    """The host's settings of the text diffuser."""

    latent_format = TextLatent
    # activations of one row are a few MB, which the host's estimate by picture area would miss
    memory_usage_factor = 64.0

    def __init__(self, unet_config: dict, sets: tuple[str, ...] = SETS):
        super().__init__(unet_config, sets)
        self.latent_format.latent_channels = unet_config["in_channels"]

    def get_model(self, state_dict, prefix="", device=None):
        """The model, its weights not filled in."""
        return TextDiffuser(self, device=device, sets=self.sets)


def text_config(latent: int = TEXT_LATENT, width: int = 320, context: int = WIDTH, multipliers: tuple[int, ...] = (1, 2, 4, 4)) -> dict:
    """Arguments of `TextUNet`. latent: values of a text latent; width: channels of the first level; context: values of a token; multipliers: of the four levels."""
    return {"in_channels": latent, "model_channels": width, "channel_mult": tuple(multipliers), "context_dim": context}
