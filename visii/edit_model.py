"""Which MODELs can learn an instruction: those that take a picture beside the noise."""

from __future__ import annotations


def check_edit_model(model) -> None:
    """Raises ValueError, one sentence, unless MODEL is an InstructPix2Pix model of the host with 8 input channels."""
    import comfy.model_base

    channels = getattr(model.model.model_config, "unet_config", {}).get("in_channels")
    if isinstance(model.model, comfy.model_base.IP2P) and channels == 8:
        return
    kind = {4: "an ordinary text-to-image model", 9: "an inpainting model"}.get(channels, type(model.model).__name__)
    raise ValueError(
        f"Learning an instruction needs an edit model with 8 input channels, but the connected one has {channels} ({kind}): "
        "load an instruct-pix2pix checkpoint."
    )
