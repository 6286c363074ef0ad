"""Captions for scenes: a small grammar with paraphrases.

Each attribute is named with probability 0.7, so pictures carry more than their words. `caption` also returns what it
named, which is what a metric may hold a picture to.
"""

from __future__ import annotations

import random

from .scenes import Object, Scene

PROBABILITY = 0.7

SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big")}
SHAPE_WORDS = {"circle": ("circle", "disc"), "square": ("square", "box"), "triangle": ("triangle",), "star": ("star",)}
NO_SHAPE = ("shape", "thing")
PATTERN_WORDS = {
    "striped": ("with {c} stripes", "striped with {c}"),
    "dotted": ("with {c} dots", "dotted with {c}"),
    "checked": ("with {c} checks", "checked with {c}"),
}
PLACE_WORDS = {
    "center": ("in the center", "in the middle"),
    "left": ("on the left",), "right": ("on the right",), "top": ("at the top",), "bottom": ("at the bottom",),
    "top left": ("in the top left",), "top right": ("in the top right",),
    "bottom left": ("in the bottom left",), "bottom right": ("in the bottom right",),
}
BACKGROUND_WORDS = ("on a {b} background", "{b} background")
STYLE_WORDS = {"flat": ("flat drawing", "flat style"), "outline": ("outline sketch", "line sketch")}
OPENINGS = ("", "", "", "a picture of ", "a drawing of ")


def describe(obj: Object, rng: random.Random, keep) -> tuple[str, dict[str, str]]:
    """One object's phrase and the attributes it named."""
    named: dict[str, str] = {}
    draw = {slot: rng.random() for slot in ("size", "shape", "pattern", "place")}

    def pick(slot: str, words) -> str:
        return words[int(draw[slot] * len(words))]

    def name(attribute: str) -> bool:
        if keep(attribute):
            named[attribute] = getattr(obj, attribute)
            return True
        return False

    words = ["a"]
    if name("size"):
        words.append(pick("size", SIZE_WORDS[obj.size]))
    # "plain" stands before the colour, marks of a second colour after the noun.
    pattern = name("pattern")
    if pattern and obj.pattern == "plain":
        words.append("plain")
    if name("color"):
        words.append(obj.color)
    words.append(pick("shape", SHAPE_WORDS[obj.shape] if name("shape") else NO_SHAPE))
    if pattern and obj.pattern != "plain":
        named["color2"] = obj.color2
        words.append(pick("pattern", PATTERN_WORDS[obj.pattern]).format(c=obj.color2))
    if name("place"):
        words.append(pick("place", PLACE_WORDS[obj.place]))
    return " ".join(words).replace("a orange", "an orange"), named


def caption(scene: Scene, seed: int, probability: float = PROBABILITY,
            always: tuple[str, ...] = ()) -> tuple[str, list[dict[str, str]], dict[str, str]]:
    """(text, attributes named per object, attributes named of the whole scene).

    `always` lists attributes that are named for certain; `probability` 1 names everything. Same seed, same words: an
    edited twin captioned with the seed of its original differs in the edited words only.
    """
    rng = random.Random(seed)
    draws = {i: {} for i in range(-1, len(scene.objects))}
    for i in draws:
        draws[i] = {a: rng.random() for a in ("size", "pattern", "color", "shape", "place", "background", "style")}
    words_seed = rng.random()

    def keep(i):
        return lambda attribute: attribute in always or draws[i][attribute] < probability

    parts, named = [], []
    for i, obj in enumerate(scene.objects):
        text, what = describe(obj, random.Random(words_seed + i), keep(i))
        parts.append(text)
        named.append(what)
    rng = random.Random(words_seed - 1)
    text = rng.choice(OPENINGS) + " and ".join(parts)
    scene_named: dict[str, str] = {}
    background, style = rng.choice(BACKGROUND_WORDS), rng.choice((0, 1))
    if keep(-1)("background"):
        scene_named["background"] = scene.background
        text += (" " if background.startswith("on") else ", ") + background.format(b=scene.background)
    if keep(-1)("style"):
        scene_named["style"] = scene.style
        text += ", " + STYLE_WORDS[scene.style][style]
    return text, named, scene_named


def vocabulary() -> list[str]:
    """Every word the grammar can say, sorted; the text encoder keeps an embedding for these alone."""
    from .scenes import BACKGROUNDS, COLORS

    phrases = [*OPENINGS, *NO_SHAPE, "a an plain and ,", *COLORS, *BACKGROUNDS, *BACKGROUND_WORDS]
    for table in (SIZE_WORDS, SHAPE_WORDS, PATTERN_WORDS, PLACE_WORDS, STYLE_WORDS):
        phrases += [p for words in table.values() for p in words]
    text = " ".join(phrases).replace("{b}", "").replace("{c}", "").replace(",", " , ")
    return sorted(set(text.split()))
