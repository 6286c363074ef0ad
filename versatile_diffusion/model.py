"""The host's model class around the UNet with two attention sets: what its conditioning means, and how it is built."""

from __future__ import annotations

import functools
import logging

import comfy.conds
import comfy.model_base
import comfy.supported_models
from torch import Tensor

from .dual import SETS, DualUNet
from .keys import IMAGE, TEXT

log = logging.getLogger("palimpsest")

# entries of a CONDITIONING's options
FLOW = "versatile_flow"  # "text", "image" or "dual"; absent is text, which is what CLIP Text Encode gives
IMAGE_CONTEXT = "versatile_image"  # dual: the picture's tokens [B, n, width]; the main tensor is the text's
RATIO = "versatile_ratio"  # dual: share of the text, 0 to 1
DUAL = "dual"
FLOWS = (TEXT, IMAGE, DUAL)

WIDTH = 768  # of a token in the published model
NODES = "Versatile Image Context"
RAW_NORM = 6.0  # rows of the published model's contexts have norms about 1; raw CLIP states, some tens


class VersatileDiffusion(comfy.model_base.BaseModel):
    """Image diffuser of Versatile Diffusion with one or both attention sets; eps prediction and SD 1.x's schedule.

    sets: which sets its weights hold. prompt_free: whether they are those of Prompt-Free Diffusion, whose files have the same naming and text
    attention alone; it reads the tokens of SeeCoder, not contexts. told_raw: whether the run that is being prepared was warned of raw CLIP states.
    """

    prompt_free = False
    told_raw = False

    def __init__(self, model_config, model_type=comfy.model_base.ModelType.EPS, device=None, sets: tuple[str, ...] = SETS):
        super().__init__(model_config, model_type, device=device, unet_model=functools.partial(DualUNet, sets=sets))
        self.sets = tuple(sets)

    def extra_conds(self, **kwargs) -> dict:
        """Conditioning of one prompt as the UNet's inputs: the main context, the share of the text set, and the image context where both sets run.

        Every flow has the same entries as far as it can, so that positive and negative run in one batch. Two contexts stay
        apart rather than in one tensor: the host repeats contexts of unequal length, which would move a cut between them.
        Raises ValueError, one sentence, for a flow whose set is not loaded and for tokens of another width.
        """
        out = super().extra_conds(**kwargs)
        main, flow = kwargs.get("cross_attn"), kwargs.get(FLOW, TEXT)
        if main is None:
            return out
        ratio = {TEXT: 1.0, IMAGE: 0.0}.get(flow)
        image = None
        if flow == DUAL:
            ratio, image = min(1.0, max(0.0, float(kwargs[RATIO]))), kwargs[IMAGE_CONTEXT]
            if ratio <= 0.0:
                main, image = image, None
            elif ratio >= 1.0:
                image = None
        self._check(ratio, main, image, kwargs.get("prompt_type", ""))
        out["c_crossattn"] = comfy.conds.CONDCrossAttn(main)
        out["vd_ratio"] = comfy.conds.CONDConstant(ratio)
        if image is not None:
            out["vd_image"] = comfy.conds.CONDCrossAttn(image.to(main.device))
        return out

    def _check(self, ratio: float | None, main: Tensor, image: Tensor | None, prompt: str) -> None:
        if ratio is None:
            raise ValueError(f"This conditioning names a flow that Versatile Diffusion does not have: encode it with CLIP Text Encode or {NODES}.")
        for needed, name in ((ratio > 0, TEXT), (ratio < 1, IMAGE)):
            if needed and name not in self.sets:
                raise ValueError(
                    f"The loaded Versatile Diffusion has no attention for {name} contexts, but the {prompt or 'connected'} conditioning is one: "
                    f'set flows to "all" or "{name}" in Versatile Diffusion Loader.'
                )
        width = self.model_config.unet_config.get("context_dim")
        for context in (main, image):
            if context is not None and context.shape[-1] != width:
                raise ValueError(
                    f"The {prompt or 'connected'} conditioning has {context.shape[-1]} values per token, but this Versatile Diffusion takes {width}: "
                    f"encode it with its own CLIP or {NODES}."
                )
        # the negative, which comes after the positive, is mostly from the same encoder, and one warning is enough
        if prompt != "negative":
            self.told_raw = False
        if width == WIDTH and not self.prompt_free and not self.told_raw and looks_raw(main):
            self.told_raw = True
            log.warning(
                "Palimpsest: the tokens of the %s conditioning are far longer than Versatile Diffusion's (their norm is about 1): they seem to be those of an ordinary "
                "CLIP, so encode the prompt with the CLIP that Versatile Diffusion Loader gives.", prompt or "connected",
            )


def check_model(model) -> None:
    """Raises ValueError, one sentence, when a MODEL is no Versatile Diffusion: it would read contexts as prompts and draw anything."""
    if not isinstance(model.model, VersatileDiffusion):
        raise ValueError(
            f"The connected model is a {type(model.model.model_config).__name__}, which cannot read Versatile Diffusion's contexts: "
            "connect the model of Versatile Diffusion Loader."
        )


def looks_raw(context: Tensor) -> bool:
    """Whether tokens [B, n, 768] are hidden states of a CLIP rather than contexts, which are projected and divided by a norm."""
    return float(context.float().norm(dim=-1).median()) > RAW_NORM


class VersatileConfig(comfy.supported_models.SD15):
    """The host's SD 1.x settings (schedule, latent format, eight heads) with our model class. sets: see `VersatileDiffusion`."""

    def __init__(self, unet_config: dict, sets: tuple[str, ...] = SETS):
        super().__init__(unet_config)
        self.sets = tuple(sets)

    def get_model(self, state_dict, prefix="", device=None):
        """The model, its weights not filled in."""
        return VersatileDiffusion(self, device=device, sets=self.sets)


def unet_config(width: int = 320, context: int = WIDTH, multipliers: tuple[int, ...] = (1, 2, 4, 4)) -> dict:
    """Arguments of the host's UNetModel. width: channels of the first level; context: of a token; multipliers: widths of the four levels."""
    return {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": width, "num_res_blocks": [2, 2, 2, 2], "channel_mult": list(multipliers),
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "transformer_depth_middle": 1,
        "use_spatial_transformer": True, "context_dim": context, "use_linear_in_transformer": False, "adm_in_channels": None, "use_temporal_attention": False,
        "legacy": False,
    }


def build(config: dict, sets: tuple[str, ...], parameters: int, dtype=None, stored=None):
    """A ModelPatcher around a model whose weights are still to be filled in.

    config: see `unet_config`. parameters: how many there will be. dtype: of the weights, None for the host's choice;
    stored: the file's, which the host takes into account.
    """
    import comfy.model_management as mm
    import comfy.model_patcher

    chosen = VersatileConfig(config, sets)
    load_device, offload_device = mm.get_torch_device(), mm.unet_offload_device()
    supported = list(chosen.supported_inference_dtypes)
    if dtype is None:
        dtype = mm.unet_dtype(model_params=parameters, supported_dtypes=supported, weight_dtype=stored)
    chosen.set_inference_dtype(dtype, mm.unet_manual_cast(dtype, load_device, supported))
    model = chosen.get_model({}, device=offload_device)
    return comfy.model_patcher.ModelPatcher(model, load_device=load_device, offload_device=offload_device)
