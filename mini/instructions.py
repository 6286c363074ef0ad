"""Instructions for scenes and what they ask for: a small grammar with paraphrases, and triples of a scene, an instruction and the edited scene.

An edit changes what its words say and keeps every number of all else. In a scene of two objects the instruction calls an object by what tells it
from the other.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from .captions import NO_SHAPE, PLACE_WORDS, SHAPE_WORDS, SIZE_WORDS
from .scenes import BACKGROUNDS, COLORS, EXTENT, PATTERNS, PLACES, SHAPES, SIZE, SIZES, STYLES, Object, Scene, apart, edited, sample_object, sample_scene

KINDS = ("color", "pattern", "shape", "move", "size", "background", "style", "add", "remove")
PLAIN = 0.6  # of the scenes hold plain objects only
TRIES = 40  # for a place that is free

COLOR_FORMS = ("make {o} {v}", "turn {o} {v}", "color {o} {v}", "paint {o} {v}")
PATTERN_FORMS = {
    "striped": ("add {c} stripes to {o}", "give {o} {c} stripes", "make {o} striped with {c}"),
    "dotted": ("add {c} dots to {o}", "give {o} {c} dots", "make {o} dotted with {c}"),
    "checked": ("add {c} checks to {o}", "give {o} {c} checks", "make {o} checked with {c}"),
    "plain": ("make {o} plain", "make {o} plain {k}"),
}
SHAPE_FORMS = ("turn {o} into a {v}", "make {o} a {v}", "replace {o} with a {v}", "change {o} to a {v}")
MOVE_FORMS = ("move {o} {v}", "put {o} {v}", "place {o} {v}")
SIZE_FORMS = {"small": ("make {o} small", "make {o} smaller", "shrink {o}"), "large": ("make {o} large", "make {o} bigger", "enlarge {o}")}
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


def put(obj: Object, place: str, rng: random.Random) -> Object:
    """`obj` near the middle of a place, as far inside the picture as its size asks for."""
    margin = obj.radius * EXTENT + 2
    cx, cy = (min(SIZE - margin, max(margin, c + rng.uniform(-5, 5))) for c in PLACES[place])
    return replace(obj, place=place, cx=cx, cy=cy)


def triple(seed: int, kind: str | None = None, plain: bool | None = None) -> Triple:
    """The triple of a seed. kind None lets the seed choose. plain: whether objects have one color; None: PLAIN of them.

    Scenes whose edit has no room, or would hide something, are drawn again. Raises ValueError for an unknown kind.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"There is no edit of the kind {kind}: choose one of {', '.join(KINDS)}.")
    rng = random.Random(seed)
    kind = kind or rng.choice(KINDS)
    plain = rng.random() < PLAIN if plain is None else plain
    while True:
        scene = sample_scene(rng.randrange(1 << 40), {"remove": 2, "add": 1}.get(kind))
        if plain:
            scene = replace(scene, objects=tuple(replace(o, pattern="plain", color2="") for o in scene.objects))
        if len({(o.shape, o.color, o.place) for o in scene.objects}) == len(scene.objects) and (made := MAKERS[kind](scene, rng, plain)):
            instruction, after, index = made
            return Triple(scene, instruction.replace("a orange", "an orange"), after, kind, index)


def _other(table, *taken: str, rng: random.Random) -> str:
    return rng.choice([word for word in table if word not in taken])


def _with(scene: Scene, index: int, new: Object) -> Scene | None:
    """The scene with an object replaced, None where it does not fit beside the other."""
    objects = tuple(new if i == index else o for i, o in enumerate(scene.objects))
    return replace(scene, objects=objects) if len(objects) == 1 or apart(*objects) else None


def _color(scene, rng, plain):
    index = rng.randrange(len(scene.objects))
    obj = scene.objects[index]
    value = _other(COLORS, obj.color, obj.color2, rng=rng)
    return rng.choice(COLOR_FORMS).format(o=call(scene, index, rng), v=value), edited(scene, "color", value, index, rng.randrange(1 << 30)), index


def _pattern(scene, rng, plain):
    index = rng.randrange(len(scene.objects))
    obj = scene.objects[index]
    value = _other(PATTERNS, obj.pattern, rng=rng)
    after = edited(scene, "pattern", value, index)
    new = after.objects[index]
    if value != "plain" and new.color2 == obj.color:
        return None
    return rng.choice(PATTERN_FORMS[value]).format(o=call(scene, index, rng), c=new.color2, k=obj.color), after, index


def _shape(scene, rng, plain):
    index = rng.randrange(len(scene.objects))
    value = _other(SHAPES, scene.objects[index].shape, rng=rng)
    return rng.choice(SHAPE_FORMS).format(o=call(scene, index, rng), v=rng.choice(SHAPE_WORDS[value])), edited(scene, "shape", value, index), index


def _move(scene, rng, plain):
    index = rng.randrange(len(scene.objects))
    value = _other(PLACES, scene.objects[index].place, rng=rng)
    after = _with(scene, index, put(scene.objects[index], value, rng))
    if after is None:
        return None
    form, name, moving = rng.choice(MOVE_FORMS), call(scene, index, rng), rng.random() < 0.5
    there = rng.choice(PLACE_WORDS[value])
    return form.format(o=name, v=f"to {there[there.index('the'):]}" if moving else there), after, index


def _size(scene, rng, plain):
    index = rng.randrange(len(scene.objects))
    obj = scene.objects[index]
    value = _other(SIZES, obj.size, rng=rng)
    new = replace(obj, size=value, radius=rng.uniform(*SIZES[value]))
    margin = new.radius * EXTENT + 2
    new = replace(new, cx=min(SIZE - margin, max(margin, new.cx)), cy=min(SIZE - margin, max(margin, new.cy)))
    after = _with(scene, index, new)
    return after and (rng.choice(SIZE_FORMS[value]).format(o=call(scene, index, rng)), after, index)


def _background(scene, rng, plain):
    value = _other(BACKGROUNDS, scene.background, rng=rng)
    return rng.choice(BACKGROUND_FORMS).format(v=value), edited(scene, "background", value, seed=rng.randrange(1 << 30)), None


def _style(scene, rng, plain):
    value = _other(STYLES, scene.style, rng=rng)
    return rng.choice(STYLE_FORMS[value]), edited(scene, "style", value), None


def _add(scene, rng, plain):
    for _ in range(TRIES):
        new = sample_object(rng, {"pattern": "plain"})
        new = replace(new, color2="")
        if apart(scene.objects[0], new):
            words = f"a {rng.choice(SIZE_WORDS[new.size])} {new.color} {rng.choice(SHAPE_WORDS[new.shape])} {rng.choice(PLACE_WORDS[new.place])}"
            return rng.choice(ADD_FORMS).format(v=words), replace(scene, objects=(*scene.objects, new)), 1
    return None


def _remove(scene, rng, plain):
    index = rng.randrange(2)
    return rng.choice(REMOVE_FORMS).format(o=call(scene, index, rng)), replace(scene, objects=(scene.objects[1 - index],)), index


MAKERS = {"color": _color, "pattern": _pattern, "shape": _shape, "move": _move, "size": _size, "background": _background, "style": _style, "add": _add, "remove": _remove}


def vocabulary() -> list[str]:
    """Every word an instruction may say that captions do not have as well, sorted."""
    from .captions import vocabulary as of_captions

    forms = [*COLOR_FORMS, *SHAPE_FORMS, *MOVE_FORMS, *BACKGROUND_FORMS, *ADD_FORMS, *REMOVE_FORMS, "to the the it"]
    for table in (PATTERN_FORMS, SIZE_FORMS, STYLE_FORMS):
        forms += [form for words in table.values() for form in words]
    words = {word for form in forms for word in form.split() if not word.startswith("{")}
    return sorted(words - set(of_captions()))
