"""Which UNet is this? A fingerprint that survives everything but other weights.

A trajectory belongs to the network that made it. The name of the file is not on the MODEL wire, and a hash
of all weights would read gigabytes, and would change with the dtype the host chose on this machine. So the
fingerprint is a hash of the layout (names and shapes of all UNet tensors) and a small fixed sample of weight
values, compared with a tolerance that forgives fp16 and bf16 rounding but no training.
"""

from __future__ import annotations

import base64
import hashlib

import torch

PREFIX = "diffusion_model."
SAMPLED_TENSORS = 256
VALUES_PER_TENSOR = 64
# bf16 keeps 8 significant bits (relative rounding error up to 0.2 %) and the sample is stored as fp16
# (0.05 %); the smallest fine-tune moves many sampled values by more than this.
TOLERANCE = 0.01
# below this fp16 itself loses digits
TINY = 1e-5


def _original_weights(model) -> dict[str, torch.Tensor]:
    """UNet weights by key as they were loaded: LoRA patches applied in place by the host are looked through."""
    patches = model.get_key_patches(PREFIX)
    # torch.compile renames the module it wraps
    return {key[len(PREFIX):].replace("_orig_mod.", ""): value[0][0] for key, value in patches.items()}


def _sample(weight: torch.Tensor) -> float:
    """Largest magnitude among values at fixed places: continuous in the weights, and never a rounding zero."""
    flat = weight.detach().reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, min(VALUES_PER_TENSOR, flat.numel()), dtype=torch.float64).long()
    return float(flat[places.to(flat.device)].float().abs().max())


def model_fingerprint(model) -> str:
    """Fingerprint of the base UNet behind a MODEL (ModelPatcher): "layout:sample", about 700 characters.

    The same for a clone with LoRA, object patches or other patches, on any device, loaded or not, in fp32,
    fp16 or bf16. Costs a few hundredths of a second.
    """
    weights = _original_weights(model)
    layout = hashlib.sha256("\n".join(f"{key}:{tuple(weights[key].shape)}" for key in sorted(weights)).encode()).hexdigest()[:16]
    matrices = sorted(key for key, weight in weights.items() if weight.ndim >= 2)
    chosen = matrices[:: max(1, len(matrices) // SAMPLED_TENSORS)][:SAMPLED_TENSORS]
    sample = torch.tensor([_sample(weights[key]) for key in chosen], dtype=torch.float32).to(torch.float16)
    return f"{layout}:{base64.b64encode(sample.numpy().tobytes()).decode('ascii')}"


def _decode(fingerprint: str) -> tuple[str, torch.Tensor]:
    layout, _, sample = fingerprint.partition(":")
    raw = bytearray(base64.b64decode(sample, validate=True))
    return layout, torch.frombuffer(raw, dtype=torch.float16).float() if raw else torch.zeros(0)


def same_model(first: str, second: str) -> bool:
    """Do two fingerprints belong to the same weights? Raises ValueError if one of them is not a fingerprint."""
    if first == second:
        return True
    (layout_a, a), (layout_b, b) = _decode(first), _decode(second)
    if layout_a != layout_b or a.shape != b.shape:
        return False
    return bool(((a - b).abs() <= TOLERANCE * torch.maximum(a, b) + TINY).all())
