"""Focus on what a picture shows or on how it looks (Xu et al. 2023, section 3.4 "disentanglement"; the form of the 2023 demo).

The 256 local rows of an image context are split by a singular value decomposition: leading components carry style, the rest
semantics. The class row is left alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

RANK, DROP, KEEP = 20, 1, 5
MIDDLE = 0.5


def singular_weights(level: float, rank: int = RANK, drop: int = DROP, keep: int = KEEP) -> Tensor:
    """Factors [rank] on the singular values, largest first, float64.

    level: 0 (semantics) to 1 (style), 0.5 leaves all. Toward semantics the first `drop` + 1 fade out, the first one first;
    toward style all but the first `keep` do, the last one first.
    """
    grown = math.exp(2 * (level - MIDDLE))
    weights = torch.ones(rank, dtype=torch.float64)
    if level < MIDDLE:
        start = (drop + 1) * (grown - math.exp(-1)) / (1 - math.exp(-1)) - drop
        for i in range(min(drop + 1, rank)):
            weights[i] = max(0.0, start + (1 - start) * i / (drop + 1))
    elif level > MIDDLE:
        span = rank - keep
        start = (1 + span) * (grown - math.e) / (1 - math.e) - span
        for i in range(keep, rank):
            weights[i] = max(0.0, start + (1 - start) * (rank - 1 - i) / span)
    return weights


def focus(context: Tensor, level: float, rank: int = RANK, drop: int = DROP, keep: int = KEEP) -> Tensor:
    """One picture's context [B, 1 + n, width] with its focus moved; at level 0.5 the very same tensor.

    level, rank, drop, keep: see `singular_weights`; rank is limited by the number of rows. Computed in float64; each row's
    mean stays, and so does the spread of all values. Toward style what lies beyond `rank` is left out entirely, therefore the
    result jumps just above 0.5. Raises ValueError for a level or components out of range.
    """
    if not 0 <= level <= 1:
        raise ValueError(f"The focus level is {level:g}, but it runs from 0 (semantics) to 1 (style): choose one in between.")
    if level == MIDDLE:
        return context
    rows, width = context.shape[1] - 1, context.shape[2]
    rank = min(rank, rows, width)
    if not 0 <= (drop if level < MIDDLE else keep) < rank:
        what = f"let {drop + 1} of them fade" if level < MIDDLE else f"keep {keep} of them while others fade"
        raise ValueError(f"A focus on {rank} components cannot {what}: use a rank of {RANK}, semantic drop {DROP} and style keep {KEEP} as published.")
    # Apple's graphics cards know no float64
    local = context[:, 1:].to("cpu", torch.float64)
    spread = local.flatten(1).std(1)[:, None, None]
    mean = local.mean(2, keepdim=True)
    u, s, v = torch.linalg.svd(local - mean, full_matrices=False)
    leading = (u[..., :rank] * s[:, None, :rank]) @ v[:, :rank]
    weighted = (u[..., :rank] * (s[:, :rank] * singular_weights(level, rank, drop, keep).to(s))[:, None]) @ v[:, :rank]
    out = weighted + mean
    if level < MIDDLE:
        out = out + (local - mean - leading)
    # a picture of one color has no spread; nothing to rescale then
    out = out * (spread / out.flatten(1).std(1)[:, None, None].clamp(min=1e-12))
    return torch.cat([context[:, :1], out.to(context)], 1)
