"""Small diffusion models with random weights, built on the host's own classes.

They have the block layout of the real checkpoints, so every patch, wrapper and
sampler meets the same module names and the same order of calls as in use. The
weights are random: nothing here produces a picture.
"""

from __future__ import annotations

import math

import torch

SD15_LAYOUT = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "use_spatial_transformer": True,
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
}

SDXL_LAYOUT = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "use_spatial_transformer": True,
    # Real SDXL has depths 2 and 10; 1 and 2 keep "several blocks per layer" and cost less.
    "transformer_depth": [0, 0, 1, 1, 2, 2],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
    "transformer_depth_middle": 2,
    "use_linear_in_transformer": True,
    "adm_in_channels": 2816,
    "num_classes": "sequential",
    "use_temporal_attention": False,
}


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Fill every parameter with small nonzero random values (the host leaves them uninitialised)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if parameter.ndim > 1:
                value = noise / math.sqrt(parameter[0].numel())
            elif name.endswith("bias"):
                value = 0.05 * noise
            else:
                value = 1.0 + 0.1 * noise
            parameter.copy_(value)


def patcher(base_model):
    """A ModelPatcher around a BaseModel, on the devices the host would choose."""
    import comfy.model_management
    import comfy.model_patcher

    return comfy.model_patcher.ModelPatcher(
        base_model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def _build(config_class, unet_config, dtype, prediction, seed, model_class=None):
    import comfy.model_base

    config = config_class({**unet_config, "dtype": dtype})
    config.manual_cast_dtype = None
    kind = {
        "eps": comfy.model_base.ModelType.EPS,
        "v_prediction": comfy.model_base.ModelType.V_PREDICTION,
        "edm": comfy.model_base.ModelType.EDM,
    }[prediction]
    base = (model_class or comfy.model_base.BaseModel)(config, model_type=kind)
    randomise(base.diffusion_model, seed)
    return patcher(base)


def tiny_sd15(seed=0, width=32, context_dim=768, dtype=torch.float32, prediction="eps", channel_mult=(1, 2, 4, 4)):
    """An SD1.5-shaped model with 8 heads and random weights.

    seed: of the weights. width: channels of the first level (32 gives 8.8 M parameters).
    context_dim: width of the text tokens. prediction: "eps", "v_prediction" or "edm".
    channel_mult: width of the four levels; (1, 1, 1, 1) is the quickest to run.
    """
    import comfy.supported_models

    layout = {**SD15_LAYOUT, "model_channels": width, "context_dim": context_dim, "channel_mult": list(channel_mult)}
    return _build(comfy.supported_models.SD15, layout, dtype, prediction, seed)


def tiny_sd2(seed=0, width=64, context_dim=1024, dtype=torch.float32, prediction="v_prediction"):
    """An SD2.x-shaped model (64 channels per head, linear projections, v prediction)."""
    import comfy.supported_models

    layout = {
        **SD15_LAYOUT,
        "model_channels": width,
        "context_dim": context_dim,
        "use_linear_in_transformer": True,
    }
    return _build(comfy.supported_models.SD20, layout, dtype, prediction, seed)


def tiny_sdxl(seed=0, width=32, context_dim=2048, dtype=torch.float32, prediction="eps"):
    """An SDXL-shaped model: nine output blocks, several transformer blocks per layer, pooled text."""
    import comfy.model_base
    import comfy.supported_models

    layout = {**SDXL_LAYOUT, "model_channels": width, "context_dim": context_dim}
    return _build(comfy.supported_models.SDXL, layout, dtype, prediction, seed, model_class=comfy.model_base.SDXL)


def tiny_cond(tokens=77, seed=0, dim=768, pooled=None):
    """Host CONDITIONING of one random prompt; `pooled` is the width of pooled_output (1280 for SDXL)."""
    generator = torch.Generator().manual_seed(1000 + seed)
    extra = {}
    context = torch.randn(1, tokens, dim, generator=generator)
    if pooled is not None:
        extra["pooled_output"] = torch.randn(1, pooled, generator=generator)
    return [[context, extra]]


def tiny_trajectory(model, *, steps=4, size=(16, 16), batch=1, seed=0, scheduler="normal", cond=None):
    """A straight path from random latents to noise at the host's noise levels: the form of an inversion, without its cost.

    size: (H, W) of the latents. cond: CONDITIONING it claims to have been run with, default one random prompt.
    """
    import comfy.samplers

    from palimpsest.inversion.trajectory import Trajectory

    generator = torch.Generator().manual_seed(100 + seed)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps).flip(0).cpu()
    clean, noise = (torch.randn(batch, 4, *size, generator=generator) for _ in range(2))
    latents = clean + sigmas[:, None, None, None, None] * noise
    return Trajectory.for_model(model, sigmas, latents, tiny_cond(seed=7) if cond is None else cond)


def tiny_controlnet(seed=0, width=32, context_dim=768):
    """A ControlNet of the SD1.5 layout on the host's class, random weights (its zero convolutions too)."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.model_management

    layout = {key: value for key, value in SD15_LAYOUT.items() if key not in ("out_channels", "transformer_depth_output")}
    network = comfy.cldm.cldm.ControlNet(**layout, model_channels=width, context_dim=context_dim, hint_channels=3, num_heads=8, dtype=torch.float32).eval()
    randomise(network, seed)
    return comfy.controlnet.ControlNet(network, load_device=comfy.model_management.get_torch_device())


def controlled(cond, controlnet, hint_seed=0, strength=0.5):
    """CONDITIONING with `controlnet` applied as the node ControlNetApplyAdvanced does it, with a random hint."""
    import nodes

    hint = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(hint_seed))
    return nodes.ControlNetApplyAdvanced().apply_controlnet(cond, cond, controlnet, hint, strength, 0.0, 1.0)[0]
