"""Load the shipped mini checkpoint into the host's own MODEL, CLIP and VAE, so that every stock node works on it."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from .autoencoder import Autoencoder
from .nets import CONTEXT, TEXT_CONFIG, VOCABULARY, controlnet_config, unet_config
from .storage import read_weights

WEIGHTS = Path(__file__).parent / "weights"
UNET_PREFIX, TEXT_PREFIX = "model.diffusion_model.", "text_encoder."


PARTS = ("autoencoder", "seecoder", "controlnet", "strips", "towers")  # not models by themselves
BASE = {"versatile": "text_to_image"}  # members whose file holds only what they have beside another one


def names() -> list[str]:
    """Members of the family that are shipped, except the parts they share."""
    return sorted(file.stem for file in WEIGHTS.glob("*.safetensors") if file.stem not in PARTS)


def load_model(weights: dict[str, torch.Tensor]):
    """The UNet as a ModelPatcher of the host's SD1.x class (its InstructPix2Pix class where it has 8 input channels), with dtype and devices chosen by the host.

    weights: state dict whose keys start with `model.diffusion_model.`, as in any SD1.x checkpoint; floats, any dtype.
    Raises KeyError where it holds no UNet and RuntimeError where shapes do not fit.
    """
    import comfy.model_management as mm
    import comfy.model_patcher
    import comfy.supported_models

    parameters = sum(v.numel() for k, v in weights.items() if k.startswith(UNET_PREFIX))
    in_channels = weights[UNET_PREFIX + "input_blocks.0.0.weight"].shape[1]
    kind = comfy.supported_models.SD15_instructpix2pix if in_channels == 8 else comfy.supported_models.SD15
    config = kind(unet_config(context=CONTEXT, in_channels=in_channels))
    load_device = mm.get_torch_device()
    dtype = mm.unet_dtype(model_params=parameters, supported_dtypes=config.supported_inference_dtypes)
    config.set_inference_dtype(dtype, mm.unet_manual_cast(dtype, load_device, config.supported_inference_dtypes))
    model = config.get_model(weights, UNET_PREFIX, device=mm.unet_inital_load_device(parameters, dtype))
    model.load_model_weights(dict(weights), UNET_PREFIX)
    return comfy.model_patcher.ModelPatcher(model, load_device=load_device, offload_device=mm.unet_offload_device())


def load_clip(weights: dict[str, torch.Tensor]):
    """The text encoder as a CLIP of the host: its SD1 tokenizer, its CLIP transformer at our width (states [B, 77, CONTEXT]).

    weights: state dict with `token_ids` [N], the CLIP ids that own an embedding, and keys that start with `text_encoder.`,
    whose embedding [N + 1, CONTEXT] has the vector of all other ids last. Raises KeyError where one of them is missing,
    RuntimeError where shapes do not fit, ValueError (one sentence) where other tensors are missing.
    """
    import comfy.sd
    import comfy.sd1_clip

    known = set(weights["token_ids"].tolist())

    class MiniTokenizer(comfy.sd1_clip.SD1Tokenizer):
        """The host's tokenizer; says once per text which words the mini checkpoint never learned."""

        def tokenize_with_weights(self, text, return_word_ids=False, **kwargs):
            tokens = super().tokenize_with_weights(text, return_word_ids, **kwargs)
            strange = [t[0] for row in tokens["l"] for t in row if isinstance(t[0], int) and t[0] not in known]
            if strange:
                words = sorted({word.replace("</w>", "") for _, word in self.clip_l.untokenize([(t, 1.0) for t in strange])})
                logging.warning(
                    "The mini checkpoint does not know the words %s; it was trained on scenes of circles, squares, triangles "
                    "and stars, and reads all unknown words alike.", ", ".join(words))
            return tokens

    class Target:
        params: dict = {}
        clip = comfy.sd1_clip.SD1ClipModel
        tokenizer = MiniTokenizer

    clip = comfy.sd.CLIP(Target, model_options={"clip_l_model_config": TEXT_CONFIG}, parameters=VOCABULARY * CONTEXT)
    state = {f"transformer.{k[len(TEXT_PREFIX):]}": v for k, v in weights.items() if k.startswith(TEXT_PREFIX)}
    key = "transformer.text_model.embeddings.token_embedding.weight"
    rows = state[key]
    table = rows[-1:].repeat(VOCABULARY, 1)
    table[weights["token_ids"].long()] = rows[:-1]
    missing = clip.cond_stage_model.clip_l.load_state_dict({**state, key: table}, strict=False).missing_keys
    unset = [k for k in missing if not k.startswith(("logit_scale", "transformer.text_projection"))]
    if unset:
        raise ValueError(f"The mini text encoder lacks {len(unset)} tensors, {unset[0]} first; restore the pack's mini/weights folder.")
    return clip


def load_vae(weights: dict[str, torch.Tensor]):
    """The autoencoder as a VAE of the host.

    The host's constructor sets up an 8x, 4-channel KL autoencoder with all attributes that its version needs; our net,
    which keeps the same scale and the same -1..1 pictures, then takes that one's place before anything has run.
    weights: state dict of `Autoencoder`. Raises RuntimeError where its keys or shapes are others.
    """
    import comfy.model_patcher
    import comfy.ops
    import comfy.sd
    from comfy.ldm.models.autoencoder import AutoencoderKL

    shape = {"double_z": True, "z_channels": 4, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32,
             "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
    params = {"ddconfig": shape, "embed_dim": 4}
    stand_in = AutoencoderKL(**{**params, "ddconfig": dict(shape)}).state_dict()
    vae = comfy.sd.VAE(sd=stand_in, config={"params": params})
    net = Autoencoder(comfy.ops.manual_cast)
    net.load_state_dict(weights)
    vae.first_stage_model = net.eval().requires_grad_(False).to(vae.vae_dtype)
    vae.patcher = comfy.model_patcher.ModelPatcher(net, load_device=vae.device, offload_device=vae.patcher.offload_device)
    # Bytes the host should set free first: an upper bound of 200 live values per pixel of the picture (the net's widest
    # layers hold 6 each); the host's own estimate is for a net four times as wide at full size.
    vae.memory_used_encode = lambda shape, dtype: 200 * shape[2] * shape[3] * comfy.model_management.dtype_size(dtype)
    vae.memory_used_decode = lambda shape, dtype: 200 * 64 * shape[2] * shape[3] * comfy.model_management.dtype_size(dtype)
    return vae


def stems(name: str) -> list[str]:
    """Weights files (without their ending) that member `name` is made of, but for the autoencoder."""
    return [BASE[name], name] if name in BASE else [name]


def load(name: str):
    """(MODEL, CLIP, VAE) of the shipped member `name`. Raises ValueError, one sentence, when there is none of that name, or a weights file is missing or damaged."""
    known = names()
    if known and name not in known:
        raise ValueError(f"There is no mini model called {name}: choose one of {', '.join(known)}.")
    load_unet = load_model
    if name in BASE:
        from .versatile import load_model as load_unet
    found = []
    for files, parts in ((stems(name), (load_unet, load_clip)), (["autoencoder"], (load_vae,))):
        weights = {key: value for file in files for key, value in read_weights(WEIGHTS / f"{file}.safetensors")[0].items()}
        try:
            found += [part(weights) for part in parts]
        # KeyError: tensors missing; RuntimeError: torch's list of all keys and shapes that do not fit
        except (KeyError, RuntimeError) as error:
            which = " or ".join(f"{file}.safetensors" for file in files)
            raise ValueError(f"The file {which} holds other weights than this version of the pack expects; reinstall the pack or run `python dev.py train` again.") from error
    model, clip, vae = found
    return model, clip, vae


def with_lora(model, strength: float):
    """A clone of a mini MODEL with the shipped LoRA "strips" at `strength`, through the host's own loader.

    Raises ValueError, one sentence, for a model of other layers or widths, and when the file is missing or damaged.
    """
    import comfy.lora
    import comfy.sd

    weights, _ = read_weights(WEIGHTS / "strips.safetensors")
    known, shapes = comfy.lora.model_lora_keys_unet(model.model, {}), model.model_state_dict()
    for name, difference in weights.items():
        layer, kind = name.rsplit(".", 1)
        target = known.get(layer)
        if target is not None and kind == "diff_b":
            target = target.removesuffix(".weight") + ".bias"
        if target not in shapes or shapes[target].shape != difference.shape:
            strange = type(model.model).__name__
            raise ValueError(f"The mini LoRA fits the UNet of Mini Checkpoint only, but the connected model is a {strange} of other layers or widths: connect Mini Checkpoint.")
    return comfy.sd.load_lora_for_models(model, None, weights, strength, 0.0)[0]


def load_controlnet():
    """The shipped ControlNet as the host's own object, for ControlNetApplyAdvanced. Raises ValueError, one sentence, when its file is missing or damaged."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.model_management as mm
    import comfy.ops

    weights, _ = read_weights(WEIGHTS / "controlnet.safetensors")
    load_device = mm.get_torch_device()
    dtype = mm.unet_dtype(model_params=sum(v.numel() for v in weights.values()), supported_dtypes=[torch.float16, torch.bfloat16, torch.float32])
    cast = mm.unet_manual_cast(dtype, load_device)
    network = comfy.cldm.cldm.ControlNet(**controlnet_config(), dtype=dtype, operations=comfy.ops.disable_weight_init if cast is None else comfy.ops.manual_cast)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError("The file controlnet.safetensors holds other weights than this version of the pack expects; reinstall the pack.") from error
    return comfy.controlnet.ControlNet(network.eval(), load_device=load_device, manual_cast_dtype=cast)
