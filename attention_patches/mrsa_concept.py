"""Reference concepts of FreeCustom (Ding et al., CVPR 2024): a picture's latent, a mask, a prompt of its own and a weight."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..common.pictures import rgb
from . import host
from .mrsa_masks import AREA, CELL, CROP, Fit, Selection, attention_sizes, fit, layer_mask, match, prepare_mask, resize_picture, select
from .source import check_conditioning

PROMPT = "picture_prompt"  # the node's input, for messages


def _plain(tensor: Tensor) -> Tensor:
    """A float32 CPU copy."""
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def _check_latent(samples: Tensor) -> None:
    """Raises ValueError, one sentence, unless this is the latent of one picture, [1, C, h, w]."""
    nested = getattr(samples, "is_nested", False)
    if nested or samples.ndim != 4 or 0 in samples.shape:
        found = "several nested tensors" if nested else list(samples.shape)
        raise ValueError(f"A concept is the latent of a picture, [1, channels, height, width], but this one is {found}: use the VAE of an SD1.x, SD2.x or SDXL checkpoint.")
    if len(samples) != 1:
        raise ValueError(f"A concept is one picture, but there are {len(samples)} latents: chain one MRSA Concept per picture.")


@dataclass(frozen=True, eq=False)
class Concept:
    """One reference. Compared and hashed by identity.

    latent: [1, C, h, w] float32 on the CPU, as VAE Encode gives it (the model's scale factor is not applied). mask: from
    mrsa_masks.prepare_mask. conditioning: host CONDITIONING that describes the whole picture. weight: of the kept tokens,
    2 to 3 is published. picture: [H, W, 3] in 0..1 that the latent stands for, grey where it is not known. policy,
    threshold: how `mask` becomes a layer's, see mrsa_masks.layer_mask.

    Raises ValueError, one sentence, for a latent of another form and values that are not finite.
    """

    latent: Tensor
    mask: Tensor
    conditioning: list
    weight: float
    picture: Tensor
    policy: str = AREA
    threshold: float = 0.5
    _selections: dict = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        _check_latent(self.latent)
        for name, tensor in (("latent", self.latent), ("mask", self.mask), ("picture", self.picture)):
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"The concept's {name} holds NaN or infinite values: check the picture, or run the VAE in a wider precision (--fp32-vae).")
            object.__setattr__(self, name, _plain(tensor))
        if not math.isfinite(self.weight):
            raise ValueError(f"The weight of a concept is an ordinary number, 2 to 3 as published, but it is {self.weight}.")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the latent."""
        return tuple(int(side) for side in self.latent.shape[-2:])

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) in tokens of a UNet's levels for this latent, finest first; SDXL has attention at the second and third only."""
        return attention_sizes(self.size)

    def layer_mask(self, size: tuple[int, int]) -> Tensor:
        """Mask [h, w] of 0 and 1 at a layer of `size` tokens."""
        return layer_mask(self.mask, size, self.policy, self.threshold)

    def selection(self, size: tuple[int, int]) -> Selection:
        """What the mask keeps of a layer of `size` tokens, and with which bias; found once for each size."""
        size = tuple(size)
        if size not in self._selections:
            self._selections[size] = select(self.layer_mask(size), self.weight)
        return self._selections[size]


@dataclass(frozen=True, eq=False)
class Concepts:
    """References in the order in which their tokens follow the picture's own: the value on the wire."""

    items: tuple[Concept, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Concept]:
        return iter(self.items)

    def joined(self, concept: Concept) -> Concepts:
        """These and one more behind them."""
        return Concepts((*self.items, concept))


def one_mask(mask: Tensor) -> Tensor:
    """MASK [1, H, W] or [H, W] as [H, W] in 0..1. Raises ValueError, one sentence, for several masks."""
    masks = mask.reshape(-1, *mask.shape[-2:])
    if len(masks) != 1:
        raise ValueError(f"A concept has one mask, but there are {len(masks)}: connect one, and chain one MRSA Concept per thing.")
    return masks[0].float().clamp(0, 1)


def encode_concept(
    image: Tensor, vae, mask: Tensor, conditioning: list, weight: float, *, resize: str = CROP, size: tuple[int, int] = (512, 512),
    policy: str = AREA, threshold: float = 0.5,
) -> tuple[Concept, Fit]:
    """A concept of a picture, and how the picture was fitted.

    image: IMAGE [1, H, W, C]. vae: the host's VAE. mask: MASK [1, h, w], resized to the picture where it has another size. size:
    (height, width) in pixels. Others: see `Concept` and mrsa_masks. Raises ValueError, one sentence, and the host's interrupt.
    """
    import comfy.model_management

    if len(image) != 1:
        raise ValueError(f"A concept is one picture, but image holds {len(image)}: chain one MRSA Concept per picture.")
    check_conditioning(conditioning, None, PROMPT)
    image = rgb(image)
    picture = tuple(int(side) for side in image.shape[1:3])
    matched = match(one_mask(mask), picture, policy)
    chosen = fit(picture, size, resize, matched)
    prepared = prepare_mask(matched, chosen, policy)
    resized = resize_picture(image, chosen, resize)
    comfy.model_management.throw_exception_if_processing_interrupted()
    return Concept(vae.encode(resized), prepared, conditioning, weight, resized[0], policy, threshold), chosen


def latent_concept(latent: dict, mask: Tensor, conditioning: list, weight: float, *, vae=None, policy: str = AREA, threshold: float = 0.5) -> Concept:
    """A concept of a LATENT as it is, the mask stretched over it. vae: decodes the picture that people see; grey without. Raises as `encode_concept`."""
    samples = latent["samples"]
    _check_latent(samples)
    check_conditioning(conditioning, None, PROMPT)
    size = tuple(int(side) * CELL for side in samples.shape[-2:])
    prepared = prepare_mask(match(one_mask(mask), size, policy), fit(size, size), policy)
    picture = torch.full((*size, 3), 0.5)
    if vae is not None:
        decoded = vae.decode(samples)
        picture = decoded.reshape(-1, *decoded.shape[-3:])[0, ..., :3]
    return Concept(samples, prepared, conditioning, weight, picture, policy, threshold)


def describe(concept: Concept, number: int, chosen: Fit | None = None, picture: tuple[int, int] | None = None, mask: tuple[int, int] | None = None) -> str:
    """The report's lines: size, what was cut, weight, how many tokens each level keeps; says (and logs) when there is no effect.

    number: the concept's place in the chain, from 1. chosen, picture: how the picture of (height, width) pixels was fitted. mask: (height,
    width) that the mask came with.
    """
    height, width = concept.picture.shape[:2]
    lines = [f"concept {number}: {width} x {height} px, weight {concept.weight:g}"]
    if chosen is not None and picture is not None:
        lines[0] += f", from {picture[1]} x {picture[0]} px"
        if (chosen.height, chosen.width) != tuple(picture):
            lines[0] += f" cut to {chosen.width} x {chosen.height} at {chosen.left}, {chosen.top}"
    under = picture or (height, width)
    # sizes that were scaled and rounded differ a little
    if mask is not None and abs(mask[1] * under[0] / (mask[0] * under[1]) - 1) > 0.02:
        lines.append(f"mask: {mask[1]} x {mask[0]} px, stretched to the picture's {under[1]} x {under[0]}")
    entries = len(concept.conditioning)
    if entries > 1:
        usable = sum("area" not in extra and "mask" not in extra for _, extra in concept.conditioning)
        lines.append(f"prompt: one entry at a time is run, the first of {usable} usable ones that is active at the step (of {entries} connected)")
    counts = [(h * w, int(concept.layer_mask((h, w)).sum()), f"{w} x {h}") for h, w in concept.sizes]
    lines.append("tokens kept: " + ", ".join(f"{kept} of {tokens} at {size}" for tokens, kept, size in counts))
    idle = None
    if concept.weight == 0:
        idle = "its weight is 0"
    elif not any(kept for _, kept, _ in counts):
        idle = "its mask keeps no token at any resolution (is it empty, or thinner than a token?)"
    if idle:
        lines.append(f"no effect: {idle}")
        host.log.warning("Palimpsest: concept %d has no effect, %s.", number, idle)
    elif not all(kept for _, kept, _ in counts):
        lines.append("where no token is kept the concept is not seen: lower mask_threshold if it should be")
    return "\n".join(lines)
