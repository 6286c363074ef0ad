"""Blocks of the text diffuser: the layers of an image UNet on a flat vector instead of a picture (Xu et al. 2023, section 3.3).

A text is one latent vector, so every state is [B, C, 4, 1]: C channels of four slots, 4 C values in all. Spatial
transformers see the slots as a picture of 4 x 1, that is four tokens. Residual blocks and samplers see the 4 C values,
channel by channel, as one vector.
"""

from __future__ import annotations

from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from torch import Tensor

SLOTS = 4


class FCResBlock(ResBlock):
    """The host's residual block as the published "FC" block: group norm, SiLU and 1 x 1 convolutions over the flat vector.

    channels, out_channels: C before and after, per slot. emb_channels: width of the time embedding.
    Other arguments: dtype, device, operations as in the host's class, whose tensor names it has.
    """

    def __init__(self, channels: int, emb_channels: int, out_channels: int, slots: int = SLOTS, **more):
        super().__init__(channels * slots, emb_channels, 0.0, out_channels=out_channels * slots, kernel_size=1, **more)
        self.slots = slots

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: [B, C, slots, 1]; emb: [B, emb_channels] -> [B, C', slots, 1]."""
        # reshape, not view: a patch of another pack may have left x in another order of memory
        return super().forward(x.reshape(len(x), -1, 1, 1), emb).reshape(len(x), -1, self.slots, 1)


def flat_linear(operations) -> type:
    """The class of the text diffuser's stem, samplers and last layer, on a layer class of the host's `operations`.

    A subclass of `operations.Linear`, not a module around it, because the published files hold a bare weight and bias there.
    """

    class FlatLinear(operations.Linear):
        """A linear layer over all values of a state: [B, C, n, 1] -> [B, C', slots, 1].

        inputs, outputs: values in all, C times n and C' times slots.
        """

        def __init__(self, inputs: int, outputs: int, slots: int = SLOTS, **more):
            super().__init__(inputs, outputs, **more)
            self.slots = slots

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.reshape(len(x), -1)).reshape(len(x), -1, self.slots, 1)

    return FlatLinear
