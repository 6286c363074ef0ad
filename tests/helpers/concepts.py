"""Random reference concepts for tests of the composer."""

from __future__ import annotations

import torch

from ...attention_patches.mrsa_concept import Concept, Concepts
from .models import tiny_cond


def concept(seed, *, weight=2.0, size=(16, 16), empty=False, cond=None, share=0.4):
    """A reference with a random latent; the upper left part of its picture is masked, `share` of it."""
    generator = torch.Generator().manual_seed(50 + seed)
    height, width = size
    mask = torch.zeros(height * 8, width * 8)
    if not empty:
        mask[: int(height * 8 * share * 2), : width * 4] = 1.0
    return Concept(torch.randn(1, 4, height, width, generator=generator), mask, cond or tiny_cond(seed=20 + seed), weight, torch.rand(height * 8, width * 8, 3))


def concepts(*items):
    return Concepts(tuple(items))
