"""Strips of three panels in which things recur: two objects alone, then both together, each looking as before.

What a net trained on single scenes of two unlike objects never needs, and one trained on photographs does: to look at one thing in order to
draw another of its kind.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from .captions import caption
from .scenes import PLACES, SIZE, EXTENT, Object, Scene, sample_background, sample_scene, BACKGROUNDS

PANELS = 3
# what the last panel's caption always says, and what it keeps to itself where it is silent about looks
NAMED = ("shape", "place", "size", "background", "style")


@dataclass(frozen=True)
class Strip:
    """panels: two scenes of one object each, then one of both. All are drawn in one style."""

    panels: tuple[Scene, ...]


def moved(obj: Object, rng: random.Random) -> Object:
    """`obj` at another place, tilted anew; its size and looks stay."""
    place = rng.choice(list(PLACES))
    margin = obj.radius * EXTENT + 2
    cx, cy = (min(SIZE - margin, max(margin, c + rng.uniform(-5, 5))) for c in PLACES[place])
    return replace(obj, place=place, cx=cx, cy=cy, tilt=rng.uniform(-0.2, 0.2))


def sample_strip(seed: int) -> Strip:
    """The strip of a seed. Its two objects differ in shape and color. Half of all strips show plain filled ones, half keep one background and every object's place."""
    rng = random.Random(seed)
    scene = sample_scene(rng.randrange(1 << 40), 2)
    while scene.objects[0].shape == scene.objects[1].shape or scene.objects[0].color == scene.objects[1].color:
        scene = sample_scene(rng.randrange(1 << 40), 2)
    if rng.random() < 0.5:
        scene = replace(scene, style="flat", objects=tuple(replace(obj, pattern="plain", color2="") for obj in scene.objects))
    alone = []
    still = rng.random() < 0.5
    for obj in scene.objects:
        background = scene.background if still else rng.choice(list(BACKGROUNDS))
        rgb = scene.background_rgb if still else sample_background(rng, background)
        alone.append(replace(scene, objects=(obj if still else moved(obj, rng),), background=background, background_rgb=rgb))
    return Strip((*alone, scene))


def captions(strip: Strip, rng: random.Random, silent: float) -> list[str]:
    """A caption per panel. With probability `silent` the last one names no looks; the others then name everything three times in four."""
    quiet = rng.random() < silent
    words = []
    for number, panel in enumerate(strip.panels):
        last, seed = number == len(strip.panels) - 1, rng.randrange(1 << 40)
        if last and quiet:
            words.append(caption(panel, seed, 0.0, NAMED)[0])
        else:
            words.append(caption(panel, seed, 1.0 if rng.random() < 0.75 else 0.7)[0])
    return words
