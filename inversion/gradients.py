"""A way through the UNet of a MODEL that gradients can take, around the very same weights.

The host runs its nodes in torch's inference mode. Tensors made there, the weights above all, cannot take part in a
backward pass, not even where their own gradient is not wanted; and in fp16 the small gradients of a prompt are lost. So the
modules are copied, but not their tensors: each copy holds an ordinary tensor over the same storage, and the host's own layers
cast it to float32 where it is used. LoRA and other weight patches are in: those merged at loading lie in that storage, those
the host applies on the fly (partly loaded models) come along in the layers. The MODEL's own modules are never written to.
"""

from __future__ import annotations

import copy
import functools
import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Values that one row of a network keeps for the backward pass, per latent pixel and channel of its first level, by
# architecture; with checkpointing the peak, which lies in the largest block. Peaks measured with the layouts of the real models, 15 % added.
KEPT = {"SD1.x": 350, "SD2.x": 350, "SDXL": 620, "SDXL Refiner": 620}
KEPT_CHECKPOINTED = {"SD1.x": 110, "SD2.x": 110, "SDXL": 80, "SDXL Refiner": 80}
OUTSIDE = 1 / 8  # share of the weights, at most, that lies outside the blocks which checkpointing computes again
CHECKPOINTING = ("auto", "on", "off")
SPARE = 1.1  # what is wanted free above the estimate
SHARE = 0.9  # of a device's memory that weights and gradients may fill


def ordinary(tensor: Tensor) -> Tensor:
    """A plain tensor over the storage of `tensor`: no gradient, and no inference tensor. Nothing is copied.

    To be called outside inference mode. Raises ValueError, one sentence, for quantised weights, which have no such form.
    """
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        raise ValueError(
            f"Training a prompt needs gradients, but the connected model holds quantised weights ({type(tensor).__name__}): "
            "load the checkpoint in fp32, fp16, bf16 or plain fp8."
        )
    if not tensor.is_inference():
        return tensor.detach()
    with torch.no_grad():
        alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


class _TorchAttention:
    """Put before the host's CrossAttention: torch's own attention, because sage and flash attention have no backward pass."""

    def forward(self, x, context=None, value=None, mask=None, **kwargs):
        from comfy.ldm.modules.attention import attention_pytorch

        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context if value is None else value)
        return self.to_out(attention_pytorch(q, k, v, self.heads, mask))


class _Recomputed:
    """Put before a block: what it computes is not kept, but computed again in the backward pass."""

    def forward(self, *args, **kwargs):
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        # the UNet writes the current block into the options it hands on; the second time they must read as the first
        args = [dict(value) if isinstance(value, dict) else value for value in args]
        kwargs = {name: dict(value) if isinstance(value, dict) else value for name, value in kwargs.items()}
        return checkpoint(super().forward, *args, use_reentrant=False, **kwargs)


@functools.lru_cache(maxsize=None)
def _before(first: type, cls: type) -> type:
    """A class of its own rather than a function on the module: that would tie the module, and with it the weights' memory, into a cycle."""
    return type(cls.__name__, (first, cls), {})


def private_model(base_model, checkpointing: bool = False):
    """A twin of a loaded BaseModel that computes in float32 and lets gradients through to its inputs.

    It shares the weights' memory and nothing else that can be written to. checkpointing: forget what happens inside a
    ResBlock or transformer block and compute it again in the backward pass: a fraction of the memory, about a third more time.
    Raises ValueError as `ordinary` does.
    """
    # the twin's tensors must be made outside inference mode, wherever the caller is
    with torch.inference_mode(False), torch.no_grad():
        private = copy.copy(base_model)
        unet = _twin(base_model.diffusion_model, checkpointing, {})
        # in the host's words: weights in whatever dtype they have, inputs in float32
        unet.dtype = torch.float32
        vars(private)["_modules"] = {**vars(base_model)["_modules"], "diffusion_model": unet}
        private.manual_cast_dtype = None
    return private


def _twin(module: torch.nn.Module, checkpointing: bool, done: dict[int, torch.nn.Module]) -> torch.nn.Module:
    from comfy.ldm.modules.attention import BasicTransformerBlock, CrossAttention
    from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock

    module = getattr(module, "_orig_mod", module)  # torch.compile's wrapping
    if id(module) in done:
        return done[id(module)]
    twin = done[id(module)] = copy.copy(module)
    attributes = vars(twin)
    for name, value in list(attributes.items()):
        if isinstance(value, (dict, list)):
            attributes[name] = copy.copy(value)
    # the host's layers cast by themselves; a layer of another kind gets its (few) weights as float32 copies
    casts = hasattr(twin, "comfy_cast_weights")
    if casts:
        twin.comfy_cast_weights = True
        # fp8 layers multiply in fp8 unless they are in training, and that product has no gradient
        twin.training = True
    for kind in ("_parameters", "_buffers"):
        for name, tensor in attributes[kind].items():
            if tensor is not None:
                plain = ordinary(tensor)
                if not casts and plain.is_floating_point():
                    plain = plain.float()
                attributes[kind][name] = torch.nn.Parameter(plain, requires_grad=False) if kind == "_parameters" else plain
    for name, child in attributes["_modules"].items():
        attributes["_modules"][name] = None if child is None else _twin(child, checkpointing, done)
    if type(module).forward is CrossAttention.forward:
        twin.__class__ = _before(_TorchAttention, type(module))
    if checkpointing and isinstance(module, (ResBlock, BasicTransformerBlock)):
        twin.__class__ = _before(_Recomputed, type(module))
    return twin


def differentiable_options(model_options: dict) -> dict:
    """A copy of a run's model_options for `private_model`: without the host's wrapper that puts a compiled network in place of it."""
    import comfy.model_patcher
    from comfy.patcher_extension import WrappersMP

    options = comfy.model_patcher.create_model_options_clone(model_options)
    options.setdefault("transformer_options", {}).get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}).pop("torch.compile", None)
    return options


def memory_needed(model, architecture: str, shape: tuple[int, ...], checkpointing: bool) -> float:
    """Bytes that a forward and backward pass over a latent of `shape` [B, C, H, W] takes beside the weights; an estimate.

    model: ModelPatcher. The float32 casts of narrower weights are kept as well, with checkpointing only those outside its blocks.
    """
    unet = model.model.diffusion_model
    kept = (KEPT_CHECKPOINTED if checkpointing else KEPT)[architecture]
    rows, _, height, width = shape
    casts = sum(4 * tensor.numel() for tensor in unet.parameters() if tensor.dtype != torch.float32)
    return 4.0 * rows * height * width * unet.model_channels * kept + casts * (OUTSIDE if checkpointing else 1.0)


def room_needed(model, architecture: str, shape: tuple[int, ...], checkpointing: str) -> float:
    """Bytes the host is to keep free beside the weights for `memory_needed`; "auto" asks for all of it where that fits at all."""
    import comfy.model_management

    full, little = (memory_needed(model, architecture, shape, on) for on in (False, True))
    fits = model.model_size() + full * SPARE < SHARE * comfy.model_management.get_total_memory(model.load_device)
    return full if checkpointing == "off" or (checkpointing == "auto" and fits) else little


def with_room(model, needed: float, key: str):
    """A clone of `model` for which the host keeps `needed` bytes free beside the weights. key: of the wrapper that asks for it."""
    from comfy.patcher_extension import WrappersMP

    def prepare(executor, patcher, noise_shape, conds, *args, **kwargs):
        one = patcher.memory_required([1, *noise_shape[1:]])
        rows = max(noise_shape[0], math.ceil(needed / one))
        return executor(patcher, [rows, *noise_shape[1:]], conds, *args, **kwargs)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, key, prepare)
    return clone


def tries(checkpointing: str, needed: float, device) -> list[bool]:
    """With or without checkpointing, in the order to be tried. needed: bytes without, see `memory_needed`.

    "auto" begins without where there is room, and goes on with it when memory runs out all the same.
    """
    import comfy.model_management

    if checkpointing != "auto":
        return [checkpointing == "on"]
    tight = comfy.model_management.get_free_memory(device) < needed * SPARE
    return [True] if tight else [False, True]
