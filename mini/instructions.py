"""Instructions for scenes and what they ask for: a small grammar with paraphrases, and triples of a scene, an instruction and the edited scene.

An edit changes what its words say and keeps every number of all else. What it changes takes the middle of its word (of a color's hues, a place's
positions, a size's radii): picture and instruction then have one right answer, which a small model learns much sooner than a spread of them. In a scene
of two objects the instruction calls an object by what tells it from the other.
"""

from __future__ import annotations

import colorsys
import random
from dataclasses import dataclass, replace

from .captions import NO_SHAPE, PLACE_WORDS, SHAPE_WORDS, SIZE_WORDS
from .scenes import BACKGROUNDS, COLORS, EXTENT, PATTERNS, PLACES, SHAPES, SIZE, SIZES, STYLES, Object, Scene, apart, sample_object, sample_scene

PLAIN_KINDS = ("color", "pattern", "shape", "move", "size", "background", "style", "add", "remove")  # of scenes whose objects have one color
KINDS = (*PLAIN_KINDS, "color2")
PLAIN = 0.75  # of the scenes hold plain objects only
TRIES = 40  # for a place that is free

COLOR_FORMS = ("make {o} {v}", "turn {o} {v}", "color {o} {v}", "paint {o} {v}")
PATTERN_FORMS = {
    "striped": ("add {c} stripes to {o}", "give {o} {c} stripes", "make {o} striped with {c}"),
    "dotted": ("add {c} dots to {o}", "give {o} {c} dots", "make {o} dotted with {c}"),
    "checked": ("add {c} checks to {o}", "give {o} {c} checks", "make {o} checked with {c}"),
    "plain": ("make {o} plain", "make {o} plain {k}"),
}
MARKS = {"striped": "stripes", "dotted": "dots", "checked": "checks"}
COLOR2_FORMS = ("make the {m} of {o} {v}", "turn the {m} of {o} {v}", "color the {m} of {o} {v}", "paint the {m} of {o} {v}")
SHAPE_FORMS = ("turn {o} into a {v}", "make {o} a {v}", "replace {o} with a {v}", "change {o} to a {v}")
MOVE_FORMS = ("move {o} {v}", "put {o} {v}", "place {o} {v}")
SIZE_FORMS = {"small": ("make {o} small", "make {o} smaller", "shrink {o}"), "large": ("make {o} large", "make {o} larger", "make {o} bigger", "enlarge {o}")}
BACKGROUND_FORMS = ("make the background {v}", "change the background to {v}", "put it on a {v} background", "turn the background {v}")
STYLE_FORMS = {"flat": ("make it a flat drawing", "turn it into a flat drawing", "fill it in flat style"),
               "outline": ("make it an outline sketch", "turn it into a line sketch", "draw it as an outline sketch")}
ADD_FORMS = ("add {v}", "put {v} there", "draw {v}")
REMOVE_FORMS = ("remove {o}", "delete {o}", "take {o} away")


@dataclass(frozen=True)
class Triple:
    """kind: one of KINDS. index: the object it is about, in the scene that has it (None for background and style)."""

    before: Scene
    instruction: str
    after: Scene
    kind: str
    index: int | None


def call(scene: Scene, index: int, rng: random.Random) -> str:
    """Words for an object: `the` and enough of its attributes that no other object of the scene answers to them."""
    obj, others = scene.objects[index], [o for i, o in enumerate(scene.objects) if i != index]
    use = {name: rng.random() < share for name, share in (("shape", 0.8), ("color", 0.4), ("place", 0.15))}

    def confused() -> bool:
        return any(all(getattr(obj, name) == getattr(other, name) for name, used in use.items() if used) for other in others)

    for name in rng.sample(("shape", "color"), 2) + ["place"]:
        if confused():
            use[name] = True
    words = ["the"] + ([obj.color] if use["color"] else []) + [rng.choice(SHAPE_WORDS[obj.shape] if use["shape"] else NO_SHAPE)]
    return " ".join(words + ([PLACE_WORDS[obj.place][0]] if use["place"] else []))


def hue(name: str) -> tuple[float, float, float]:
    """(r, g, b) in 0..1 of the middle of a color's name."""
    h, s, v = COLORS[name]
    return colorsys.hsv_to_rgb(h / 360, s, v)


def inside(obj: Object, x: float, y: float) -> Object:
    """`obj` at a point in pixels, or as near to it as its size lets it be inside the picture."""
    margin = obj.radius * EXTENT + 2
    cx, cy = (min(SIZE - margin, max(margin, c)) for c in (x, y))
    return replace(obj, cx=cx, cy=cy)


def triple(seed: int, kind: str | None = None, plain: bool | None = None) -> Triple:
    """The triple of a seed. kind None lets the seed choose. plain: whether objects have one color before the edit; None: PLAIN of them.

    Scenes whose edit has no room, or would hide something, are drawn again. Raises ValueError for an unknown kind.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"There is no edit of the kind {kind}: choose one of {', '.join(KINDS)}.")
    rng = random.Random(seed)
    plain = rng.random() < PLAIN if plain is None else plain
    kind = kind or rng.choice(PLAIN_KINDS if plain else KINDS)
    plain = plain and kind != "color2"
    while True:
        scene = sample_scene(rng.randrange(1 << 40), {"remove": 2, "add": 1}.get(kind))
        if plain:
            scene = replace(scene, objects=tuple(replace(o, pattern="plain", color2="") for o in scene.objects))
        if len({(o.shape, o.color, o.place) for o in scene.objects}) == len(scene.objects) and (made := MAKERS[kind](scene, rng)):
            instruction, after, index = made
            return Triple(scene, instruction.replace("a orange", "an orange"), after, kind, index)


def _other(table, *taken: str, rng: random.Random) -> str:
    return rng.choice([word for word in table if word not in taken])


def _with(scene: Scene, index: int, new: Object) -> Scene | None:
    """The scene with an object replaced, None where it does not fit beside the other."""
    objects = tuple(new if i == index else o for i, o in enumerate(scene.objects))
    return replace(scene, objects=objects) if len(objects) == 1 or apart(*objects) else None


def _color(scene, rng):
    index = rng.randrange(len(scene.objects))
    obj = scene.objects[index]
    value = _other(COLORS, obj.color, obj.color2, rng=rng)
    return rng.choice(COLOR_FORMS).format(o=call(scene, index, rng), v=value), _with(scene, index, replace(obj, color=value, rgb=hue(value))), index


def _color2(scene, rng):
    index = rng.randrange(len(scene.objects))
    obj = scene.objects[index]
    if obj.pattern == "plain":
        return None
    value = _other(COLORS, obj.color, obj.color2, rng=rng)
    words = rng.choice(COLOR2_FORMS).format(m=MARKS[obj.pattern], o=call(scene, index, rng), v=value)
    return words, _with(scene, index, replace(obj, color2=value, rgb2=hue(value))), index


def _pattern(scene, rng):
    index = rng.randrange(len(scene.objects))
    obj = scene.objects[index]
    value = _other(PATTERNS, obj.pattern, rng=rng)
    if value == "plain":
        new = replace(obj, pattern=value, color2="")
    elif obj.pattern == "plain":
        color2 = _other(COLORS, obj.color, rng=rng)
        new = replace(obj, pattern=value, color2=color2, rgb2=hue(color2))
    else:
        new = replace(obj, pattern=value)
    return rng.choice(PATTERN_FORMS[value]).format(o=call(scene, index, rng), c=new.color2, k=obj.color), _with(scene, index, new), index


def _shape(scene, rng):
    index = rng.randrange(len(scene.objects))
    obj = scene.objects[index]
    value = _other(SHAPES, obj.shape, rng=rng)
    # nobody sees how far a plain circle is turned
    tilt = 0.0 if obj.shape == "circle" and obj.pattern == "plain" else obj.tilt
    words = rng.choice(SHAPE_FORMS).format(o=call(scene, index, rng), v=rng.choice(SHAPE_WORDS[value]))
    return words, _with(scene, index, replace(obj, shape=value, tilt=tilt)), index


def _move(scene, rng):
    index = rng.randrange(len(scene.objects))
    value = _other(PLACES, scene.objects[index].place, rng=rng)
    after = _with(scene, index, replace(inside(scene.objects[index], *PLACES[value]), place=value))
    if after is None:
        return None
    form, name, moving = rng.choice(MOVE_FORMS), call(scene, index, rng), rng.random() < 0.5
    there = rng.choice(PLACE_WORDS[value])
    return form.format(o=name, v=f"to {there[there.index('the'):]}" if moving else there), after, index


def _size(scene, rng):
    index = rng.randrange(len(scene.objects))
    obj = scene.objects[index]
    value = _other(SIZES, obj.size, rng=rng)
    new = replace(obj, size=value, radius=sum(SIZES[value]) / 2)
    after = _with(scene, index, inside(new, obj.cx, obj.cy))
    return after and (rng.choice(SIZE_FORMS[value]).format(o=call(scene, index, rng)), after, index)


def _background(scene, rng):
    value = _other(BACKGROUNDS, scene.background, rng=rng)
    return rng.choice(BACKGROUND_FORMS).format(v=value), replace(scene, background=value, background_rgb=BACKGROUNDS[value]), None


def _style(scene, rng):
    value = _other(STYLES, scene.style, rng=rng)
    return rng.choice(STYLE_FORMS[value]), replace(scene, style=value), None


def _add(scene, rng):
    for _ in range(TRIES):
        new = sample_object(rng, {"pattern": "plain"})
        new = replace(new, color2="", radius=sum(SIZES[new.size]) / 2, tilt=0.0, rgb=hue(new.color))
        new = inside(new, *PLACES[new.place])
        if apart(scene.objects[0], new):
            words = f"a {rng.choice(SIZE_WORDS[new.size])} {new.color} {rng.choice(SHAPE_WORDS[new.shape])} {rng.choice(PLACE_WORDS[new.place])}"
            return rng.choice(ADD_FORMS).format(v=words), replace(scene, objects=(*scene.objects, new)), 1
    return None


def _remove(scene, rng):
    index = rng.randrange(2)
    return rng.choice(REMOVE_FORMS).format(o=call(scene, index, rng)), replace(scene, objects=(scene.objects[1 - index],)), index


MAKERS = {"color": _color, "color2": _color2, "pattern": _pattern, "shape": _shape, "move": _move, "size": _size, "background": _background, "style": _style,
          "add": _add, "remove": _remove}


def vocabulary() -> list[str]:
    """Every word an instruction may say that captions do not have as well, sorted."""
    from .captions import vocabulary as of_captions

    forms = [*COLOR_FORMS, *COLOR2_FORMS, *SHAPE_FORMS, *MOVE_FORMS, *BACKGROUND_FORMS, *ADD_FORMS, *REMOVE_FORMS, "to the the it"]
    for table in (PATTERN_FORMS, SIZE_FORMS, STYLE_FORMS):
        forms += [form for words in table.values() for form in words]
    words = {word for form in forms for word in form.split() if not word.startswith("{")}
    return sorted(words - set(of_captions()))
