"""From pictures and a prompt to masks: which of SAM's proposals is taken, with progress and cancel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.pictures import rgb
from .loader import SamModel
from .prompts import Prompt

BEST, SMALLEST, LARGEST, INDEX, SINGLE = CHOICES = ("best score", "smallest", "largest", "index", "single")


@dataclass(frozen=True)
class Proposals:
    """What SAM proposed for one picture. shares: of the picture each mask covers, 0 to 1; scores: predicted quality; chosen: index of the one taken."""

    shares: tuple[float, ...]
    scores: tuple[float, ...]
    chosen: int

    def describe(self) -> str:
        """In words, for the report."""
        if len(self.shares) == 1:
            return f"{100 * self.shares[0]:.1f} % of the picture, score {self.scores[0]:.2f}" + ("" if self.shares[0] else " (empty)")
        listed = ", ".join(f"{i}: {100 * share:.1f} % of the picture, score {score:.2f}" for i, (share, score) in enumerate(zip(self.shares, self.scores)))
        return f"mask {self.chosen} taken of {listed}" + ("" if self.shares[self.chosen] else " (the mask is empty)")


def choose(shares: tuple[float, ...], scores: tuple[float, ...], choice: str, index: int = 0) -> int:
    """Which proposal is taken. Empty ones are passed over unless all are empty or `index` asks for one.

    Raises ValueError, one sentence, for an index that is not there and an unknown choice.
    """
    numbers = range(len(shares))
    filled = [i for i in numbers if shares[i] > 0] or list(numbers)
    if choice in (BEST, SINGLE):
        return max(filled, key=lambda i: scores[i])
    if choice == SMALLEST:
        return min(filled, key=lambda i: shares[i])
    if choice == LARGEST:
        return max(filled, key=lambda i: shares[i])
    if choice == INDEX:
        if index not in numbers:
            raise ValueError(f"SAM proposes {len(shares)} masks, counted from 0, but index is {index}: set it to one of {', '.join(map(str, numbers))}.")
        return index
    raise ValueError(f'There is no choice "{choice}" among masks: take one of {", ".join(CHOICES)}.')


def segment_pictures(model: SamModel, image: Tensor, prompt: Prompt, choice: str = BEST, index: int = 0) -> tuple[Tensor, list[Proposals]]:
    """MASK [B, H, W] of 0 and 1, one per picture of IMAGE [B, H, W, C], and what was proposed for each.

    The same prompt is used for every picture. Raises ValueError as `choose` and `SamModel.segment` do, and the host's interrupt.
    """
    import comfy.model_management as mm
    import comfy.utils

    pictures = (rgb(image).clamp(0, 1) * 255).round().to("cpu", torch.uint8).numpy()
    bar = comfy.utils.ProgressBar(len(pictures) * (model.steps + 1))

    def tick() -> None:
        mm.throw_exception_if_processing_interrupted()
        bar.update(1)

    masks, proposals = [], []
    for number, pixels in enumerate(pictures, 1):
        mm.throw_exception_if_processing_interrupted()
        found, scores = model.segment(pixels, prompt, choice != SINGLE, tick)
        shares = tuple(float(mask.float().mean()) for mask in found)
        proposals.append(Proposals(shares, tuple(scores), choose(shares, tuple(scores), choice, index)))
        masks.append(found[proposals[-1].chosen].float())
        # a picture that SAM remembers has not ticked
        bar.update_absolute(number * (model.steps + 1))
    return torch.stack(masks).to(mm.intermediate_device()), proposals
