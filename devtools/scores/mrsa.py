"""Multi-reference self-attention: do two things of two pictures both arrive in one, on the right object, although its prompt does not name how they look?

50 held-out pairs. A pair is a scene of two objects of different shapes that is never shown to the model: each object is drawn alone in a reference of its own, at
its place; the reference's prompt is its caption, its mask the object. The new picture's prompt names shape, place and size of both objects, the background and the
style, and neither colors nor patterns. Objects are plain and filled, which the mini model can draw; WAY.patterned: 20 pairs of any pattern and style, which it
draws badly even when its prompt tells all.

both_concepts: fraction of pairs in which both objects have color, pattern and second color of their references, as the scene reader reads them (of filled even
marks either color comes first). .one_concept: the same for single objects. .details: per attribute, and whether the prompt itself is followed.
mrsa: the rule of the authors' code; mrsa_paper_rule: the paper's formula, at the weight that serves it best; prompt_only: the same prompt and noise without
references; prompt_naming_all: without references, but with a prompt that names colors and patterns too, which is what the mini model can draw at best. All four
with the LoRA "strips" (see mini/train_strips.py), which teaches the mini model what photographs teach others: to look at one thing while it draws another of
its kind. It was trained with attention to whole references, without masks, weights and rules, and with a loss on where to look.
mrsa_bare, mrsa_paper_rule_bare: without that LoRA, each with the settings that served it best.
"""
from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from ...attention_patches.mrsa import compose
from ...attention_patches.mrsa_attention import CODE, PAPER
from ...attention_patches.mrsa_concept import Concepts, encode_concept
from ...mini import checkpoint
from ...mini.captions import caption
from ...mini.metrics import match_named, shows
from ...mini.reader import Reading, read
from ...mini.scenes import SIZE, Scene, masks, sample_scene
from ..scoring import HELD_OUT, Mini, pictures, rate, span

# of six pairs; without references 0.1 of the colors are right
QUICK_LIMITS = {"mrsa.both_concepts": 0.5, "mrsa.details.color": 0.6}
COUNT, PATTERNED, OFFSET, APART = 50, 20, 400_000, 1_000  # seeds of this and other scores never meet
LOOKS = ("color", "pattern", "color2")  # what only the references know
NAMED = ("shape", "place", "size", "background", "style")
STEPS, SCHEDULER, CFG = 25, "ddim_uniform", 4.0
THRESHOLD = 0.25


class Way(NamedTuple):
    """rule of the references, None for none; whether the prompt names their looks too; whether the model has the LoRA; layers and weight."""

    rule: str | None = None
    telling: bool = False
    lora: bool = True
    layers: str = "u3-5"
    weight: float = 1.0


# layers and weights chosen on validation seeds; without the LoRA u5 is the only layer whose attention tells two things apart, the finer ones blur the picture
WAYS = {
    "mrsa": Way(CODE), "mrsa_paper_rule": Way(PAPER), "prompt_only": Way(), "prompt_naming_all": Way(telling=True),
    "mrsa_bare": Way(CODE, lora=False, layers="u5", weight=2.0), "mrsa_paper_rule_bare": Way(PAPER, lora=False, layers="u5", weight=3.0),
}


@dataclass(frozen=True)
class Pair:
    """scene: what the picture should become. references: one scene per object. captions: theirs. prompt, named: of the new picture, see captions.caption.

    telling: the same prompt with colors and patterns.
    """

    seed: int
    scene: Scene
    references: tuple[Scene, ...]
    captions: tuple[str, ...]
    prompt: str
    named: list
    telling: str


@dataclass
class Found:
    """What was read, one entry per pair (both) or per object."""

    both: list[bool] = field(default_factory=list)
    one: list[bool] = field(default_factory=list)
    details: dict[str, list[bool]] = field(default_factory=dict)

    def add(self, reading: Reading, pair: Pair) -> None:
        rights = []
        for obj, seen in zip(pair.scene.objects, match_named(reading, pair.named)):
            right = {name: shows(seen, name, getattr(obj, name), reading.style) for name in (*LOOKS, "shape", "place", "size")}
            for name, value in right.items():
                self.details.setdefault(name, []).append(value)
            rights.append(all(right[name] for name in LOOKS))
        self.details.setdefault("count", []).append(len(reading.objects) == len(pair.scene.objects))
        self.one += rights
        self.both.append(all(rights))

    def leaves(self, seeds: str) -> dict:
        details = {name: rate(values, seeds) for name, values in self.details.items()}
        return {"both_concepts": rate(self.both, seeds), "one_concept": rate(self.one, seeds), "details": details}


def pair(seed: int, plain: bool = True) -> Pair:
    """The pair of concepts that belongs to a seed; plain: two filled objects of one color each."""
    scene, tries = sample_scene(seed, 2), 0
    while scene.objects[0].shape == scene.objects[1].shape or scene.objects[0].color == scene.objects[1].color:
        # two stars cannot be told apart by what the prompt says about them, nor two red things by what becomes of them
        tries += 1
        scene = sample_scene(seed + APART * tries, 2)
    if plain:
        scene = replace(scene, style="flat", objects=tuple(replace(obj, pattern="plain", color2="") for obj in scene.objects))
    references = tuple(replace(scene, objects=(obj,)) for obj in scene.objects)
    prompt, named, _ = caption(scene, seed, 0.0, NAMED)
    telling, _, _ = caption(scene, seed, 0.0, (*NAMED, "color", "pattern"))
    return Pair(seed, scene, references, tuple(caption(reference, seed, 1.0)[0] for reference in references), prompt, named, telling)


@torch.inference_mode()
def composing(mini: Mini, model, found: Pair, way: Way):
    """`model` made to see a pair's references; itself without a rule."""
    if way.rule is None:
        return model
    concepts = Concepts()
    for scene, text in zip(found.references, found.captions):
        mask = torch.from_numpy(masks(scene))
        concept, _ = encode_concept(pictures([scene]), mini.vae, mask, mini.prompts([text]), way.weight, size=(SIZE, SIZE), threshold=THRESHOLD)
        concepts = concepts.joined(concept)
    return compose(model, concepts, layers=way.layers, rule=way.rule, seed=found.seed)[0]


def judge(mini: Mini, models: dict[bool, object], found: Pair, results: dict[str, Found]) -> None:
    """Make the picture of a pair in every way and note what is read in it. models: without and with the LoRA."""
    empty = torch.zeros(1, 4, SIZE // 8, SIZE // 8)
    for name, way in WAYS.items():
        prompt = mini.prompts([found.telling if way.telling else found.prompt])
        samples = mini.sample(composing(mini, models[way.lora], found, way), prompt, empty, [found.seed], steps=STEPS, cfg=CFG, scheduler=SCHEDULER)
        results[name].add(read(mini.decode(samples)[0]), found)


def score(quick: bool) -> dict:
    """Figures of this module (see its docstring for the keys)."""
    mini, first, leaves = Mini(), HELD_OUT + OFFSET, {}
    models = {False: mini.model, True: checkpoint.with_lora(mini.model, 1.0)}
    for plain, count in ((True, 6 if quick else COUNT), (False, 1 if quick else PATTERNED)):
        results = {way: Found() for way in WAYS}
        for seed in range(first, first + count):
            judge(mini, models, pair(seed, plain), results)
        for way, found in results.items():
            named = found.leaves(span(first, count))
            leaves[way] = named if plain else {**leaves[way], "patterned": named}
        print(f"  {'plain' if plain else 'patterned'}: both right in {sum(results['mrsa'].both)} of {count}", flush=True)
    return leaves
