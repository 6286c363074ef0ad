"""Names of UNet blocks: which model family this is, and which layers a user means.

A user selects layers with a short notation, `d2,m0,u1-8` = down, middle, up, and the n-th block
of that part in the order the UNet runs it. "preset ..." names a published choice.
"""

from __future__ import annotations

SD1 = "SD1.x"
SD2 = "SD2.x"
SDXL = "SDXL"
SDXL_REFINER = "SDXL Refiner"


def architecture_name(model) -> str:
    """Family of the UNet behind a MODEL: "SD1.x", "SD2.x", "SDXL" or "SDXL Refiner".

    model: a ModelPatcher. Raises ValueError (one sentence, naming the model class) for anything
    that is not an image UNet of these families: Flux, SD3, Wan, video UNets, upscalers.
    """
    import comfy.model_base
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    base = model.model
    name = type(base).__name__
    unet = getattr(base, "diffusion_model", None)
    if not isinstance(unet, UNetModel):
        network = type(unet).__name__
        raise ValueError(
            f"This node edits the UNet of SD1.x, SD2.x and SDXL models, but the connected model is a {name} "
            f"(network {network}): connect a checkpoint of one of these families."
        )
    config = base.model_config.unet_config
    temporal = config.get("use_temporal_attention", False) or config.get("use_temporal_resblock", False)
    output_blocks = len(unet.output_blocks)
    if not temporal and not isinstance(unet.num_classes, int):
        if isinstance(base, comfy.model_base.SDXLRefiner):
            return SDXL_REFINER
        if output_blocks == 9 and unet.num_classes is not None:
            return SDXL
        if output_blocks == 12:
            return SD2 if config.get("use_linear_in_transformer", False) else SD1
    raise ValueError(
        f"This node edits the UNet of SD1.x, SD2.x and SDXL image models, but the connected model is a {name} "
        f"of another layout ({output_blocks} output blocks{', video' if temporal else ''}): "
        "connect a checkpoint of one of these families."
    )
