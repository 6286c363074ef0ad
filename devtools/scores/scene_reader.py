"""How well the scene reader reads: drawn scenes, and the same scenes through the mini autoencoder.

scene_reader.accuracy: fraction of all attribute values read right, both kinds of pictures together; .rendered and
.autoencoded: the same per attribute. Held-out scenes of one or two objects.
"""
from __future__ import annotations

from collections import defaultdict

from ...mini.metrics import against_scene
from ...mini.reader import read
from ...mini.scenes import sample_scene
from ..scoring import HELD_OUT, Mini, batches, pictures, rate, span

QUICK_LIMITS = {"scene_reader.rendered.shape": 0.9, "scene_reader.rendered.color": 0.9, "scene_reader.autoencoded.shape": 0.8}


def score(quick: bool) -> dict:
    """Figures of this module (see its docstring for the keys)."""
    count = 10 if quick else 500
    mini, seeds = Mini(), span(HELD_OUT, count)
    scenes = [sample_scene(HELD_OUT + i) for i in range(count)]
    found = {"rendered": defaultdict(list), "autoencoded": defaultdict(list)}
    for batch in batches(scenes):
        drawn = pictures(batch)
        for kind, images in (("rendered", drawn), ("autoencoded", mini.decode(mini.encode(drawn)["samples"]))):
            for scene, image in zip(batch, images):
                for attribute, values in against_scene(read(image), scene).items():
                    found[kind][attribute] += values
    everything = [value for kind in found.values() for values in kind.values() for value in values]
    return {"scene_reader": {"accuracy": rate(everything, seeds),
                             **{kind: {attribute: rate(values, seeds) for attribute, values in by.items()} for kind, by in found.items()}}}
