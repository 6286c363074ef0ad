"""Shapes of the mini family's UNet and text encoder, and their construction from the host's own classes.

The UNet has the block layout of Stable Diffusion 1.5 (12 input blocks, a middle block, 12 output blocks, attention in the
same places, eight heads) at a tenth of its width. The text encoder is the host's CLIP text transformer at a small width.
"""

from __future__ import annotations

import math

import torch

CONTEXT = 128  # width of a text token
TEXT_CONFIG = {  # overrides of the host's sd1_clip_config.json
    "hidden_size": CONTEXT, "intermediate_size": 4 * CONTEXT, "num_attention_heads": 4, "num_hidden_layers": 3,
    "projection_dim": CONTEXT,
}
FULL_TEXT_CONFIG = {
    "architectures": ["CLIPTextModel"], "bos_token_id": 0, "eos_token_id": 49407, "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5, "max_position_embeddings": 77, "model_type": "clip_text_model", "pad_token_id": 1,
    "vocab_size": 49408, **TEXT_CONFIG,
}
VOCABULARY = 49408  # of the host's SD1 tokenizer
START, END = 49406, 49407


def unet_config(width: int = 32, context: int = CONTEXT, in_channels: int = 4) -> dict:
    """Arguments of the host's UNetModel."""
    return {
        "image_size": 32, "in_channels": in_channels, "out_channels": 4, "model_channels": width, "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "transformer_depth_middle": 1,
        "use_spatial_transformer": True, "context_dim": context, "use_linear_in_transformer": False,
        "adm_in_channels": None, "use_temporal_attention": False, "num_heads": 8, "num_head_channels": -1,
    }


def controlnet_config(width: int = 32, context: int = CONTEXT) -> dict:
    """Arguments of the host's ControlNet for a UNet of `unet_config`: the same encoder, a hint of three channels at picture size."""
    config = unet_config(width, context)
    return {**{key: value for key, value in config.items() if key not in ("out_channels", "transformer_depth_output")}, "hint_channels": 3}


def initialise(module: torch.nn.Module) -> None:
    """Give every layer the start values of its plain torch class: the host's layers skip this, they expect a checkpoint."""
    for layer in module.modules():
        for kind in (torch.nn.Linear, torch.nn.Conv2d, torch.nn.GroupNorm, torch.nn.LayerNorm, torch.nn.Embedding):
            if isinstance(layer, kind):
                kind.reset_parameters(layer)


def new_unet(in_channels: int = 4) -> torch.nn.Module:
    """An untrained UNetModel of the host, residual branches starting at zero (as in guided-diffusion)."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    unet = UNetModel(**unet_config(in_channels=in_channels), dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    initialise(unet)
    for name, layer in unet.named_modules():
        if name.endswith(("out_layers.3", "proj_out")) or name == "out.2":
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    return unet


def new_text_encoder(tokens: int) -> torch.nn.Module:
    """An untrained CLIPTextModel of the host whose table holds `tokens` rows only (ids of mini.tokens, not of CLIP)."""
    import comfy.ops
    from comfy.clip_model import CLIPTextModel

    encoder = CLIPTextModel(FULL_TEXT_CONFIG, torch.float32, "cpu", comfy.ops.disable_weight_init)
    encoder.set_input_embeddings(comfy.ops.disable_weight_init.Embedding(tokens, CONTEXT))
    initialise(encoder)
    for name, parameter in encoder.named_parameters():
        if "embedding" in name:
            torch.nn.init.normal_(parameter, std=0.02 * math.sqrt(768 / CONTEXT))
    return encoder


def text_states(encoder: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Last hidden states [B, 77, CONTEXT] of token ids [B, 77], equal to the encoder's own forward.

    Written out because the host adds to `x` in place, which autograd refuses while a LayerNorm before it still needs `x`.
    """
    def attention(q, k, v, heads, mask):
        return attention_for_training(None, q, k, v, heads, mask)

    text = encoder.text_model
    x = text.embeddings(ids, dtype=torch.float32)
    mask = torch.full((ids.shape[1],) * 2, float("-inf"), device=x.device).triu_(1)
    for layer in text.encoder.layers:
        x = x + layer.self_attn(layer.layer_norm1(x), mask, attention)
        x = x + layer.mlp(layer.layer_norm2(x))
    return text.final_layer_norm(x)


def mixed_precision(kind: str) -> torch.autocast:
    """The context of a training's forward pass on devices of a kind ("cpu", "cuda"): bf16 where that is faster than fp32.

    Processors without AVX-512 have no bf16 products; a convolution and its gradients took 30 times as long there.
    """
    return torch.autocast(kind, torch.bfloat16, enabled=kind != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512"))


def attention_for_training(original, q, k, v, heads, mask=None, **kwargs):
    """The host's `optimized_attention_override` with the plain formula softmax(q k^T / sqrt d + mask) v.

    Tensors [B, tokens, heads * d], mask [tokens, tokens] added to the scores; under autocast in its dtype.
    Our heads are 4 to 32 channels wide. Torch's fused kernel on CPU takes 60 % of a training step in bf16 at such widths; two
    batched products made the whole step 1.4 times as fast. In fp32 the fused kernel is the faster one (57 ms against 333 for
    512 heads of 8 channels and 256 tokens, with AVX2 alone).
    """
    batch, tokens, channels = q.shape
    width = channels // heads
    kind = q.device.type
    if not torch.is_autocast_enabled(kind):
        rows = (x.reshape(batch, -1, heads, width).transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(*rows, attn_mask=mask)
        return out.transpose(1, 2).reshape(batch, tokens, channels)
    dtype = torch.get_autocast_dtype(kind)

    def split(x):
        return x.reshape(batch, -1, heads, width).transpose(1, 2).reshape(batch * heads, -1, width).to(dtype)

    q, k, v = split(q * width**-0.5), split(k), split(v)
    with torch.autocast(kind, enabled=False):
        scores = torch.bmm(q, k.transpose(1, 2))
        out = torch.bmm((scores if mask is None else scores + mask.to(dtype)).softmax(-1), v)
    return out.reshape(batch, heads, tokens, width).transpose(1, 2).reshape(batch, tokens, channels)
