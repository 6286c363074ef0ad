"""A picture as the prompt: does the generated scene show what the reference shows?

seecoder.shape_and_colour: fraction of held-out references with one object whose drawing has one object of the same shape and
colour. Of filled even marks either colour counts, as for text_to_image; .shape_and_colour_strict: the first colour only, which is
the one the reference names first. seecoder.details: per attribute; place by chance is one in nine. seecoder.two_objects: as shape_and_colour
for references with two, every object's shape and colour. cfg 2, ddim, ddim_uniform, 30 steps, no words, the negative zeros.
"""
from __future__ import annotations

from collections import defaultdict

import torch

from ...mini.metrics import against_scene, match_objects, shows
from ...mini.reader import Reading, read
from ...mini.scenes import Scene, sample_scene
from ...seecoder import encode, files, loader
from ..scoring import HELD_OUT, Mini, batches, pictures, rate, span

QUICK_LIMITS = {"seecoder.shape_and_colour": 0.4}
STEPS, CFG = 30, 2.0


def shipped() -> loader.SeeCoderModel:
    """The SeeCoder that comes with the pack."""
    return loader.load(str(next(iter(files.SHIPPED.values()))))


@torch.inference_mode()
def conditioning(model: loader.SeeCoderModel, images: torch.Tensor) -> tuple[list, list]:
    """(positive, negative) of references [B, 128, 128, 3], one each."""
    positive = encode.with_text(encode.encode_pictures(model, images), None)
    return positive, encode.negative_for("zeros", positive)


def results(mini: Mini, model: loader.SeeCoderModel, objects: int, first: int, count: int) -> list[dict[str, list[bool]]]:
    """Per reference, what of it is found in the drawing made after it."""
    out = []
    for seeds in batches(list(range(first, first + count))):
        scenes = [sample_scene(seed, objects) for seed in seeds]
        positive, negative = conditioning(model, pictures(scenes))
        samples = mini.sample(mini.model, positive, torch.zeros(len(seeds), 4, 16, 16), seeds, steps=STEPS, cfg=CFG, scheduler="ddim_uniform", negative=negative, sampler="ddim")
        out += [judged(read(image), scene) for image, scene in zip(mini.decode(samples), scenes)]
    return out


def judged(reading: Reading, scene: Scene) -> dict[str, list[bool]]:
    """`against_scene` with colours as `shows` takes them."""
    pairs = zip(match_objects(reading, scene), scene.objects)
    strict = against_scene(reading, scene)
    return {**strict, "color": [shows(read, "color", obj.color, reading.style) for read, obj in pairs], "color_strict": strict["color"]}


def right(row: dict[str, list[bool]], color: str = "color") -> bool:
    """Whether the number of objects, and every one's shape and colour, are the reference's."""
    return row["count"][0] and all(row["shape"]) and all(row[color])


def score(quick: bool) -> dict:
    """Figures of this module (see its docstring for the keys)."""
    count = 10 if quick else 100
    mini, model, seeds = Mini(), shipped(), span(HELD_OUT, count)
    one, two = (results(mini, model, objects, HELD_OUT, count) for objects in (1, 2))
    by = defaultdict(list)
    for row in one:
        for attribute, values in row.items():
            by[attribute] += values
    return {"seecoder": {"shape_and_colour": rate([right(row) for row in one], seeds), "shape_and_colour_strict": rate([right(row, "color_strict") for row in one], seeds),
                         "two_objects": rate([right(row) for row in two], seeds),
                         "details": {attribute: rate(values, seeds) for attribute, values in by.items()}}}
