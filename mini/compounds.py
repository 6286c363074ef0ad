"""Two edits at once, for training the mini edit model: asked for in one sentence, or by the text states of one instruction put behind those of another.

The second way is how Visii's hybrid instructions are made (`visii/compose.py`). A large edit model follows them unseen; a small one has to see some.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch

from ..visii.compose import GAP
from .instructions import MAKERS, PLAIN_KINDS, Triple
from .scenes import Scene, sample_scene

# nothing that comes or goes: the second instruction speaks of the scene that the first one leaves
COMPOUND_KINDS = tuple(kind for kind in PLAIN_KINDS if kind not in ("add", "remove"))


@dataclass(frozen=True)
class Compound:
    """`second` begins with the scene that `first` ends with."""

    first: Triple
    second: Triple

    @property
    def before(self) -> Scene:
        return self.first.before

    @property
    def after(self) -> Scene:
        return self.second.after

    @property
    def instruction(self) -> str:
        """Both in one sentence."""
        return f"{self.first.instruction} and {self.second.instruction}"


def compound(seed: int) -> Compound:
    """The compound of a seed: two edits of different kinds of a scene of plain objects. Half of the scenes have one object, spoken of as learned instructions do."""
    rng = random.Random(seed)
    kinds = rng.sample(COMPOUND_KINDS, 2)
    alone = rng.random() < 0.5
    while True:
        scene = sample_scene(rng.randrange(1 << 40), 1 if alone else None)
        scene = replace(scene, objects=tuple(replace(o, pattern="plain", color2="") for o in scene.objects))
        if len({(o.shape, o.color, o.place) for o in scene.objects}) < len(scene.objects):
            continue
        made = []
        for kind in kinds:
            if (found := MAKERS[kind](scene, rng)) is None or found[1] is None:
                break
            made.append(Triple(scene, found[0], found[1], kind, found[2]))
            scene = found[1]
        # objects that an edit has made alike could not be told apart
        if len(made) == 2 and len({(o.shape, o.color, o.place) for o in scene.objects}) == len(scene.objects):
            return Compound(*made)


def join(first: torch.Tensor, second: torch.Tensor, end: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Text states `first` [B, T, C] with the first `count` [B] of `second` [B, T, C] from position `end` + GAP on; a count of 0 leaves a row as it is.

    end: positions of first's end tokens [B]; -GAP lets second begin at position 0. What would stand beyond T is dropped.
    """
    source = torch.arange(first.shape[1], device=first.device) - (end[:, None] + GAP)
    inside = (source >= 0) & (source < count[:, None])
    moved = second.gather(1, source.clamp(min=0)[..., None].expand(-1, -1, first.shape[2]))
    return torch.where(inside[..., None], moved, first)
