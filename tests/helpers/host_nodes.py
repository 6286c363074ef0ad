"""Calls nodes of the host's comfy_extras, which are V1 classes on 0.3.52 and V3 classes on 0.3.75."""

from __future__ import annotations

import importlib


def run_node(module: str, name: str, *args, **kwargs):
    """First output of comfy_extras.<module>.<name>."""
    cls = getattr(importlib.import_module(f"comfy_extras.{module}"), name)
    out = cls.execute(*args, **kwargs) if hasattr(cls, "execute") else getattr(cls(), cls.FUNCTION)(*args, **kwargs)
    return getattr(out, "args", out)[0]  # V3 nodes return a NodeOutput or, as V1 nodes, a tuple


def free_u(model):
    return run_node("nodes_freelunch", "FreeU_V2", model, 1.3, 1.4, 0.9, 0.2)


def pag(model):
    return run_node("nodes_pag", "PerturbedAttentionGuidance", model, 3.0)


def differential_diffusion(model):
    return run_node("nodes_differential_diffusion", "DifferentialDiffusion", model)


def sag(model):
    return run_node("nodes_sag", "SelfAttentionGuidance", model, 0.5, 2.0)


def hyper_tile(model):
    return run_node("nodes_hypertile", "HyperTile", model, 64, 2, 0, False)


def token_merging(model):
    return run_node("nodes_tomesd", "TomePatchModel", model, 0.3)


def lora(model):
    """A weight patch on every to_q and on the output of one ResBlock, as LoraLoader adds it."""
    import torch

    clone = model.clone()
    generator = torch.Generator().manual_seed(5)
    patches = {}
    for name, weight in model.model.state_dict().items():
        if name.endswith("attn1.to_q.weight") or name.endswith("output_blocks.4.0.out_layers.3.weight"):
            patches[name] = ("diff", (0.05 * torch.randn(weight.shape, generator=generator),))
    clone.add_patches(patches, 1.0)
    return clone
