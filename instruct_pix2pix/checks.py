"""Which models edit by instruction."""

from __future__ import annotations

CHANNELS = 8  # of the first convolution: the noisy latent's four, then the picture's four
ADVICE = "load an instruct-pix2pix checkpoint or CosXL-Edit"
KINDS = {4: "an ordinary text-to-image model", 9: "an inpainting model"}


def first_channels(model) -> int | None:
    """Input channels of the first convolution of a MODEL's UNet; None where it has none (Flux, SD3 and other transformers)."""
    blocks = getattr(model.model.diffusion_model, "input_blocks", None)
    return getattr(blocks[0][0], "in_channels", None) if blocks is not None else None


def refusal(who: str, what: str, channels: int) -> str:
    """The sentence for a first convolution of `channels` inputs; who: the node, what: the model or file."""
    kind = f", as {KINDS[channels]}" if channels in KINDS else ""
    return f"{who} needs an edit model, whose first layer takes {CHANNELS} channels, but that of {what} takes {channels}{kind}: {ADVICE}."


def check_edit_model(model, who: str, what: str = "the connected model") -> None:
    """Raises ValueError, one sentence, unless MODEL is an edit model to the host and its first convolution takes 8 channels.

    Both: the class is found by the layout of a file, which says nothing about a merge's weights; and 8 channels alone do not make the host
    hand the picture over. who: the node that asks. what: the model in its sentence.
    """
    import comfy.model_base

    channels = first_channels(model)
    if channels is None:
        raise ValueError(f"{who} needs an edit model of the SD1.x or SDXL family, but {what} is {type(model.model).__name__}: {ADVICE}.")
    if channels != CHANNELS:
        raise ValueError(refusal(who, what, channels))
    if not isinstance(model.model, comfy.model_base.IP2P):
        raise ValueError(
            f"{who} needs an edit model, but {what} is {type(model.model).__name__}, to which ComfyUI gives no picture although its first layer takes "
            f"{CHANNELS} channels: {ADVICE}."
        )
