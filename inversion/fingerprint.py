"""Which UNet is this? A fingerprint that survives everything but other weights.

A trajectory belongs to the network that made it. The name of the file is not on the MODEL wire, and a hash
of all weights would read gigabytes, and would change with the dtype the host chose on this machine. So the
fingerprint is a hash of the layout (names and shapes of all UNet tensors, and how each is merged with another
model's) and a small fixed sample of weight values, compared with a tolerance that forgives fp16 and bf16 rounding but
no training.
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


def _weights(model) -> dict[str, tuple[torch.Tensor, list[tuple[float, float, torch.Tensor | None]]]]:
    """(weight as it was loaded, merges) of every UNet tensor by key: LoRA patches applied in place are looked through.

    merges: (scale of the weight, scale of the other, the other tensor or None where it is no plain one) for every patch
    that brings another model's weight, as the host's ModelMerge nodes make them. A LoRA adds to a weight, and nodes like
    UNetSelfAttentionMultiply scale it: those are changes of the same model.
    """
    found = {}
    for key, ((weight, _), *patches) in model.get_key_patches(PREFIX).items():
        merges = []
        for strength, value, strength_model, *_ in patches:
            # the host's own mark of another model's weight is a list; other packs only scale the weight down and add
            if strength != 0.0 and (strength_model != 1.0 or isinstance(value, list)):
                other = value[0][0] if isinstance(value, list) else None
                merges.append((float(strength_model), float(strength), other if isinstance(other, torch.Tensor) else None))
        # torch.compile renames the module it wraps
        found[key[len(PREFIX):].replace("_orig_mod.", "")] = weight, merges
    return found


def _values(weight: torch.Tensor) -> torch.Tensor:
    """Values at fixed places."""
    flat = weight.detach().reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, min(VALUES_PER_TENSOR, flat.numel()), dtype=torch.float64).long()
    return flat[places.to(flat.device)].to("cpu", torch.float32)


def _sample(weight: torch.Tensor, merges: list) -> float:
    """Largest magnitude among values at fixed places: continuous in the weights, and never a rounding zero."""
    values = _values(weight)
    for scale, other_scale, other in merges:
        values = values * scale
        if other is not None and other.shape == weight.shape:
            values = values + other_scale * _values(other)
    return float(values.abs().max())


def _layout(key: str, weight: torch.Tensor, merges: list) -> str:
    """Name, shape and merges of one tensor."""
    return f"{key}:{tuple(weight.shape)}" + "".join(f":merged {scale:.4g} {other_scale:.4g}" for scale, other_scale, _ in merges)


def model_fingerprint(model) -> str:
    """Fingerprint of the base UNet behind a MODEL (ModelPatcher): "layout:sample", about 700 characters.

    The same for a clone with LoRA, object patches or other patches, on any device, loaded or not, in fp32,
    fp16 or bf16; another one for a clone that is merged with another model. Costs a few hundredths of a second.
    """
    weights = _weights(model)
    layout = hashlib.sha256("\n".join(_layout(key, *weights[key]) for key in sorted(weights)).encode()).hexdigest()[:16]
    matrices = sorted(key for key, (weight, _) in weights.items() if weight.ndim >= 2)
    chosen = matrices[:: max(1, len(matrices) // SAMPLED_TENSORS)][:SAMPLED_TENSORS]
    sample = torch.tensor([_sample(*weights[key]) for key in chosen], dtype=torch.float32).to(torch.float16)
    return f"{layout}:{base64.b64encode(sample.numpy().tobytes()).decode('ascii')}"


def decode(fingerprint: str) -> tuple[str, torch.Tensor]:
    """(layout hash, sampled values [N] float32) of a fingerprint. Raises ValueError if it is none."""
    layout, colon, sample = fingerprint.partition(":")
    try:
        raw = bytearray(base64.b64decode(sample, validate=True))
    except ValueError:
        raw = b"?"
    if not colon or len(raw) % 2:
        raise ValueError("its model fingerprint is none")
    return layout, torch.frombuffer(raw, dtype=torch.float16).float() if raw else torch.zeros(0)


def same_model(first: str, second: str) -> bool:
    """Do two fingerprints belong to the same weights? Raises ValueError if one of them is not a fingerprint."""
    if first == second:
        return True
    (layout_a, a), (layout_b, b) = decode(first), decode(second)
    if layout_a != layout_b or a.shape != b.shape:
        return False
    return bool(((a - b).abs() <= TOLERANCE * torch.maximum(a, b) + TINY).all())
