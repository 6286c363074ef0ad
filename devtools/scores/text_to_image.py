"""Pictures from captions: is what the caption says there?

text_to_image.one_object, .two_objects: fraction of held-out captions whose every object has the right shape, colour and
place, with no object too many or too few. .details: per attribute, where the caption named it. Captions always name
shape, colour and place, everything else with probability 0.7; 30 steps of euler, cfg 4, stock sampler, 128 px.
"""
from __future__ import annotations

from collections import defaultdict

import torch

from ...mini.captions import caption
from ...mini.metrics import against_caption
from ...mini.reader import read
from ...mini.scenes import sample_scene
from ..scoring import HELD_OUT, Mini, batches, rate, span

# n = 10: well below the full figures, well above what an untrained or miswired model reaches by chance.
QUICK_LIMITS = {"text_to_image.one_object": 0.4, "text_to_image.two_objects": 0.2}
ALWAYS = ("shape", "color", "place")
STEPS, CFG = 30, 4.0


def results(mini: Mini, objects: int, first: int, count: int) -> list[dict[str, list[bool]]]:
    """Per caption, what `against_caption` says about its picture."""
    out = []
    for seeds in batches(list(range(first, first + count))):
        captions = [caption(sample_scene(seed, objects), seed, always=ALWAYS) for seed in seeds]
        samples = mini.sample(mini.model, mini.prompts([text for text, _, _ in captions]), torch.zeros(len(seeds), 4, 16, 16), seeds, steps=STEPS, cfg=CFG)
        out += [against_caption(read(image), named, whole) for image, (_, named, whole) in zip(mini.decode(samples), captions)]
    return out


def score(quick: bool) -> dict:
    """Figures of this module (see its docstring for the keys)."""
    count = 10 if quick else 200
    mini, seeds = Mini(), span(HELD_OUT, count)
    found: dict = {"details": {}}
    for key, objects in (("one_object", 1), ("two_objects", 2)):
        rows = results(mini, objects, HELD_OUT, count)
        found[key] = rate([row["count"][0] and all(all(row[attribute]) for attribute in ALWAYS) for row in rows], seeds)
        by = defaultdict(list)
        for row in rows:
            for attribute, values in row.items():
                by[attribute] += values
        found["details"][key] = {attribute: rate(values, seeds) for attribute, values in by.items()}
    return {"text_to_image": found}
