"""Small edit models with random weights, prompts that carry a picture's latent, and the same UNet in diffusers."""

from __future__ import annotations

import torch

from .models import SD15_LAYOUT, SDXL_LAYOUT, patcher, randomise, tiny_cond


def tiny_edit(seed=0, width=32, channel_mult=(1, 1, 1, 1), in_channels=8, dtype=torch.float32):
    """An SD1.5-shaped edit model on the host's class, 8 heads."""
    import comfy.model_base
    import comfy.supported_models

    layout = {**SD15_LAYOUT, "model_channels": width, "context_dim": 768, "channel_mult": list(channel_mult), "in_channels": in_channels, "dtype": dtype}
    config = comfy.supported_models.SD15_instructpix2pix(layout)
    config.manual_cast_dtype = None
    base = comfy.model_base.SD15_instructpix2pix(config)
    randomise(base.diffusion_model, seed)
    return patcher(base)


def tiny_edit_xl(seed=0, width=32, cosxl=False):
    """An SDXL-shaped edit model: diffusers' (eps, the picture as it is), or CosXL-Edit (v of EDM, the picture scaled)."""
    import comfy.model_base
    import comfy.supported_models

    layout = {**SDXL_LAYOUT, "model_channels": width, "context_dim": 2048, "in_channels": 8, "dtype": torch.float32}
    config = comfy.supported_models.SDXL_instructpix2pix(layout)
    config.manual_cast_dtype = None
    kind = comfy.model_base.ModelType.V_PREDICTION_EDM if cosxl else comfy.model_base.ModelType.EPS
    base = comfy.model_base.SDXL_instructpix2pix(config, model_type=kind)
    randomise(base.diffusion_model, seed)
    return patcher(base)


def picture_latent(batch=1, height=16, width=16, seed=0) -> torch.Tensor:
    """A random latent at the scale the VAE gives (not scaled by 0.18215)."""
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(300 + seed)) * 4


def edit_cond(latent=None, seed=0, batch=1, dim=768, pooled=None) -> list:
    """CONDITIONING of random prompts (`batch` of them in one) with the picture's latent, as InstructPixToPixConditioning makes it; None: without."""
    rows = [tiny_cond(seed=seed + 10 * i, dim=dim, pooled=pooled)[0] for i in range(batch)]
    extra = {} if pooled is None else {"pooled_output": torch.cat([row[1]["pooled_output"] for row in rows])}
    return [[torch.cat([row[0] for row in rows]), extra | ({} if latent is None else {"concat_latent_image": latent})]]


def explicit(model, x, sigma, positive, negative, image_scale, text_scale, picture=None):
    """The paper's equation 3 on denoised predictions [B, C, H, W], each from a call of the model of its own.

    positive, negative: (tokens [B, N, C], pooled or None). picture: [B, 4, H, W] as the UNet gets it.
    """
    def predict(prompt, image):
        tokens, pooled = prompt
        more = {} if pooled is None else {"y": model.model.encode_adm(pooled_output=pooled, height=x.shape[2] * 8, width=x.shape[3] * 8, device="cpu")}
        rows = [value if value.shape[0] == len(x) else value.repeat(len(x), *[1] * (value.ndim - 1)) for value in (tokens, *more.values())]
        options = {"sigmas": torch.tensor([sigma])}
        return model.model.apply_model(
            x, torch.full((len(x),), sigma), c_concat=image, c_crossattn=rows[0], transformer_options=options, **dict(zip(more, rows[1:])))

    nothing = torch.zeros_like(picture)
    none, image, full = predict(negative, nothing), predict(negative, picture), predict(positive, picture)
    return none + image_scale * (image - none) + text_scale * (full - image)


def diffusers_unet(model):
    """diffusers' UNet with the weights of a `tiny_edit`."""
    import comfy.utils
    from diffusers import UNet2DConditionModel

    config = model.model.model_config.unet_config
    width = config["model_channels"]
    unet = UNet2DConditionModel(
        in_channels=config["in_channels"], out_channels=4, block_out_channels=tuple(width * m for m in config["channel_mult"]), layers_per_block=2,
        cross_attention_dim=config["context_dim"], attention_head_dim=8,
    )
    own = model.model.diffusion_model.state_dict()
    names = comfy.utils.unet_to_diffusers(config)
    unet.load_state_dict({name: own[names[name]] for name in unet.state_dict()})
    return unet.eval()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative L2 error of a against b."""
    return float((a.double() - b.double()).norm() / b.double().norm())


class Calls:
    """Wrapper inside ours: how many lists and which the model is asked for. lists: per call, True for a list that is there. rows: latents per UNet call."""

    def __init__(self):
        self.lists: list[tuple[bool, ...]] = []
        self.rows: list[list[int]] = []

    def on(self, model):
        """A clone of `model` that is watched."""
        import comfy.patcher_extension as extension

        clone = model.clone()
        clone.add_wrapper_with_key(extension.WrappersMP.CALC_COND_BATCH, "calls", self._batch)
        clone.add_wrapper_with_key(extension.WrappersMP.APPLY_MODEL, "calls", self._apply)
        return clone

    def _batch(self, executor, model, conds, *args, **kwargs):
        self.lists.append(tuple(entries is not None for entries in conds))
        return executor(model, conds, *args, **kwargs)

    def _apply(self, executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
        self.rows.append(list(transformer_options["cond_or_uncond"]))
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)


@torch.inference_mode()
def dual_cfg(model, positive, middle, negative, text_scale, image_scale, steps=3):
    """The host's DualCFGGuider in its regular style, 16 x 16 latents from noise 4, euler."""
    import comfy.samplers

    from .host_nodes import run_node
    from .sampling import latent_noise, schedule

    guider = run_node("nodes_custom_sampler", "DualCFGGuider", model, positive, middle, negative, text_scale, image_scale, "regular")
    empty = torch.zeros(1, 4, 16, 16)
    return guider.sample(latent_noise(1, 4, 16, 16, seed=4), empty, comfy.samplers.sampler_object("euler"), schedule(model, steps), disable_pbar=True, seed=1)
