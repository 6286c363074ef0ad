"""Strips of panels in which things recur: two objects alone, then both together again and again, each looking as before.

What a net trained on single scenes of two unlike objects never needs, and one trained on photographs does: to look at one thing in order to
draw another of its kind.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from .captions import caption
from .scenes import BACKGROUNDS, EXTENT, PLACES, SIZE, Object, Scene, apart, sample_background, sample_scene

ALONE, TOGETHER = 2, 4
PANELS = ALONE + TOGETHER
# what a later panel's caption still says where it is silent about looks
NAMED = ("shape", "place", "size", "background", "style")


@dataclass(frozen=True)
class Strip:
    """panels: ALONE scenes of one object each, then TOGETHER of both. All are drawn in one style."""

    panels: tuple[Scene, ...]


def moved(obj: Object, rng: random.Random) -> Object:
    """`obj` at another place, tilted anew; its size and looks stay."""
    place = rng.choice(list(PLACES))
    margin = obj.radius * EXTENT + 2
    cx, cy = (min(SIZE - margin, max(margin, c + rng.uniform(-5, 5))) for c in PLACES[place])
    return replace(obj, place=place, cx=cx, cy=cy, tilt=rng.uniform(-0.2, 0.2))


def sample_strip(seed: int) -> Strip:
    """The strip of a seed. Its two objects differ in shape and color. Half of all strips show plain filled ones; half of the panels keep background and places."""
    rng = random.Random(seed)
    scene = sample_scene(rng.randrange(1 << 40), 2)
    while scene.objects[0].shape == scene.objects[1].shape or scene.objects[0].color == scene.objects[1].color:
        scene = sample_scene(rng.randrange(1 << 40), 2)
    if rng.random() < 0.5:
        scene = replace(scene, style="flat", objects=tuple(replace(obj, pattern="plain", color2="") for obj in scene.objects))
    return Strip(tuple(varied(scene, objects, rng) for objects in (*((obj,) for obj in scene.objects), *[scene.objects] * TOGETHER)))


def varied(scene: Scene, objects: tuple[Object, ...], rng: random.Random) -> Scene:
    """A panel with these objects of `scene`: as they are there, or in other places on another background."""
    if rng.random() < 0.5:
        return replace(scene, objects=objects)
    new = tuple(moved(obj, rng) for obj in objects)
    while len(new) == 2 and not apart(*new):
        new = tuple(moved(obj, rng) for obj in objects)
    background = rng.choice(list(BACKGROUNDS))
    return replace(scene, objects=new, background=background, background_rgb=sample_background(rng, background))


def captions(strip: Strip, rng: random.Random, silent: float) -> list[str]:
    """A caption per panel. A later one names no looks with probability `silent`; all others name everything three times in four."""
    words = []
    for number, panel in enumerate(strip.panels):
        seed = rng.randrange(1 << 40)
        if number >= ALONE and rng.random() < silent:
            words.append(caption(panel, seed, 0.0, NAMED)[0])
        else:
            words.append(caption(panel, seed, 1.0 if rng.random() < 0.75 else 0.7)[0])
    return words
