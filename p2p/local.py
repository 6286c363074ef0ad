"""From words to a local blend on a MODEL that carries a P2P edit."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention_patches.collectors import Collector
from ..attention_patches.reference_pass import add_edits, edits_of
from .blend import LocalBlend, check_blendable
from .syntax import split_list


def _columns(words: list[str], prompt) -> Tensor:
    """1 for the tokens of any of the words, [T]; words the prompt does not have are left out."""
    columns = torch.zeros(prompt.length)
    for word in words:
        columns[list(prompt.positions(word))] = 1.0
    return columns


def _check_known(words: list[str], prompts: list, what: str) -> None:
    """Raises ValueError, one sentence, naming the words that no prompt has."""
    unknown = [word for word in words if not any(prompt.positions(word) for prompt in prompts)]
    if unknown:
        known = ", ".join(dict.fromkeys(word for prompt in prompts for word in prompt.words))
        raise ValueError(f"P2P Local Blend finds no {', '.join(unknown)} in the {what}, which has {known}: write words as they stand there.")


def add_blend(model, words: str, source_words: str, subtract: str, thresholds: tuple[float, float], start: float, pool: bool, mask: Tensor | None = None):
    """A clone of `model` with a local blend of its last P2P edit, and the collector of the masks.

    words, source_words, subtract: separated by commas. mask: MASK [B, H, W] that replaces words. Raises ValueError, one sentence, for a
    model without P2P edit, words that are not in the prompts, and neither words nor mask.
    """
    edit = check_blendable(edits_of(model))
    results = Collector("blend masks")
    common = {"source": edit.source, "bank_device": edit.bank_device, "edit": edit, "thresholds": thresholds, "start": start, "pool": pool, "results": results}
    if mask is not None:
        mask = mask if mask.ndim == 3 else mask.reshape(-1, *mask.shape[-2:])
        return add_edits(model, LocalBlend(user_mask=mask.detach().to("cpu", torch.float32, copy=True), **common)), results
    targets, source = [plan.target for plan in edit.plans], edit.plans[0].source
    own, subtracted = split_list(words), split_list(subtract)
    if not own:
        raise ValueError("P2P Local Blend has neither words nor a mask: write the words of the edit prompt whose place may change, or connect a mask.")
    before = split_list(source_words) or [word for word in own if source.positions(word)]
    _check_known(own, targets, "edit prompt")
    _check_known(before, [source], "source prompt")
    _check_known(subtracted, [*targets, source], "prompts")
    blend = LocalBlend(
        target_words=torch.stack([_columns(own, target) for target in targets]),
        source_words=_columns(before, source),
        target_out=torch.stack([_columns(subtracted, target) for target in targets]) if subtracted else None,
        source_out=_columns(subtracted, source) if subtracted else None,
        **common,
    )
    return add_edits(model, blend), results
