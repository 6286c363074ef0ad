"""Layout from one picture, content from another, no words: the mini ControlNet and the mini SeeCoder together.

seecoder_controlnet.both: fraction of pairs of held-out scenes with one object each whose drawing has the hint's layout (place, size
and silhouette: IoU above 0.6, which a square inside a circle's outline passes) and the reference's colour, of filled even marks either one.
.layout and .colour: each of the two by itself.
"""
from __future__ import annotations

import torch

from ...mini import checkpoint
from ...mini.metrics import match_objects, object_iou, shows
from ...mini.reader import read
from ...mini.scenes import masks, outline, sample_scene
from ..scoring import HELD_OUT, Mini, batches, pictures, rate, span
from .seecoder import CFG, STEPS, conditioning, shipped

QUICK_LIMITS = {"seecoder_controlnet.both": 0.3}
OVERLAP, APART = 0.6, 5_000  # seeds of hints and references never meet


def score(quick: bool) -> dict:
    """Figures of this module (see its docstring for the keys)."""
    import nodes

    count = 10 if quick else 100
    mini, model, control = Mini(), shipped(), checkpoint.load_controlnet()
    layout, colour = [], []
    for seeds in batches(list(range(HELD_OUT, HELD_OUT + count))):
        shapes, contents = ([sample_scene(seed + shift, 1) for seed in seeds] for shift in (0, APART))
        hints = torch.stack([torch.from_numpy(outline(masks(scene))) for scene in shapes])[..., None].expand(-1, -1, -1, 3)
        positive, negative = conditioning(model, pictures(contents))
        positive, negative = nodes.ControlNetApplyAdvanced().apply_controlnet(positive, negative, control, hints, 1.0, 0.0, 1.0)
        samples = mini.sample(mini.model, positive, torch.zeros(len(seeds), 4, 16, 16), seeds, steps=STEPS, cfg=CFG, scheduler="ddim_uniform", negative=negative, sampler="ddim")
        for image, shape, content in zip(mini.decode(samples), shapes, contents):
            reading = read(image)
            found = match_objects(reading, shape)[0]
            there = len(reading.objects) == 1 and found is not None and object_iou(reading, shape) > OVERLAP
            layout.append(there and (found.place, found.size) == (shape.objects[0].place, shape.objects[0].size))
            colour.append(shows(found, "color", content.objects[0].color, reading.style))
    seeds = span(HELD_OUT, count)
    return {"seecoder_controlnet": {"both": rate([a and b for a, b in zip(layout, colour)], seeds), "layout": rate(layout, seeds), "colour": rate(colour, seeds)}}
