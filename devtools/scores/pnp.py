"""Plug-and-Play edits of held-out scenes: is the edit there, and did everything else stay?

200 edits, 50 each of colour, pattern, style and background, of scenes with one or two objects. Captions name the edited
attribute and every other with probability 0.7, as in training: pictures carry more than their words, and what the words
leave out only the source's features can keep.

pnp.edit_success: the edited attribute has its new value. pnp.structure_kept: every object's shape, place and size are
the source's, and none came or went. pnp.object_iou: mean IoU of the objects' silhouettes with the source's.
pnp.img2img: the same with the stock KSampler on the encoded picture, swept over denoise 0.3 to 0.9 (.sweep); its
top-level figures are at .strength, whose edit_success is nearest to ours. pnp.by_edit: ours per kind of edit.
"""
from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import torch

from ...attention_patches.pnp import apply_pnp
from ...inversion.run import run_inversion
from ...inversion.trajectory import start_latent
from ...mini.captions import caption
from ...mini.metrics import edit_success, object_iou, structure_kept
from ...mini.reader import read
from ...mini.scenes import BACKGROUNDS, COLORS, PATTERNS, STYLES, Scene, edited, sample_scene
from ..scoring import HELD_OUT, VALIDATION, Mini, batches, mean, pictures, rate

QUICK_LIMITS = {"pnp.edit_success": 0.4, "pnp.structure_kept": 0.5}
KINDS = {"color": COLORS, "pattern": PATTERNS, "style": STYLES, "background": BACKGROUNDS}
STEPS, SCHEDULER, ITERATIONS = 25, "ddim_uniform", 2
STRENGTHS = tuple(round(0.1 * i, 1) for i in range(3, 10))
PER_KIND, APART = 50, 10_000  # seeds of two kinds never meet

# Found by `tune()` on 12 edits per kind with seeds from VALIDATION on, never the held-out ones; it prefers the largest
# min(edit_success / 0.75, structure_kept / 0.85, 1), ties by the sum. At 16 x 16 latents the published feature layer has 4 x 4
# cells, too few to hold a place (structure kept 0.42 of color edits), so the layer at 8 x 8, u4, joins it. Published fractions (tau_f 0.8,
# tau_A 0.5) came out best, for colors tau_A 0.8. Patterns change in four of ten edits whatever the setting (cfg 4 to 10).
SETTINGS = {
    "color": {"feature_layers": "u1,u4", "attention_layers": "preset default", "tau_f": 0.8, "tau_a": 0.8, "cfg": 4.0, "negative": "empty"},
    "pattern": {"feature_layers": "u1,u4", "attention_layers": "preset default", "tau_f": 0.8, "tau_a": 0.5, "cfg": 4.0, "negative": "empty"},
    "style": {"feature_layers": "u1,u4", "attention_layers": "preset default", "tau_f": 0.8, "tau_a": 0.5, "cfg": 4.0, "negative": "empty"},
    "background": {"feature_layers": "u1,u4", "attention_layers": "preset default", "tau_f": 0.8, "tau_a": 0.5, "cfg": 4.0, "negative": "empty"},
}


@dataclass(frozen=True)
class Case:
    """One edit: the drawn source, the twin it should become, which attribute of which object, and both captions."""

    seed: int
    scene: Scene
    target: Scene
    kind: str
    index: int
    source: str
    prompt: str


@dataclass
class Outcome:
    """Per edit: whether the edit is there, whether the structure is, and the IoU."""

    success: list[bool]
    kept: list[bool]
    iou: list[float]

    def __add__(self, other: Outcome) -> Outcome:
        return Outcome(self.success + other.success, self.kept + other.kept, self.iou + other.iou)

    def leaves(self, seeds: str) -> dict:
        return {"edit_success": rate(self.success, seeds), "structure_kept": rate(self.kept, seeds), "object_iou": mean(self.iou, seeds)}


def case(kind: str, seed: int) -> Case:
    """The edit that belongs to a seed."""
    rng = random.Random(seed)
    scene = sample_scene(seed)
    index = rng.randrange(len(scene.objects))
    obj = scene.objects[index]
    old = getattr(scene if kind in ("style", "background") else obj, kind)
    # A new colour equal to the pattern's would hide the pattern.
    value = rng.choice([word for word in KINDS[kind] if word not in (old, obj.color2 if kind == "color" else old)])
    target = edited(scene, kind, value, index, seed)
    return Case(seed, scene, target, kind, index, *(caption(s, seed, always=(kind,))[0] for s in (scene, target)))


def cases(kind: str, first: int, count: int) -> list[Case]:
    """Edits of one kind with seeds of their own."""
    start = first + APART * list(KINDS).index(kind)
    return [case(kind, seed) for seed in range(start, start + count)]


def judge(images: torch.Tensor, batch: list[Case]) -> Outcome:
    readings = [read(image) for image in images]
    return Outcome([edit_success(r, c.target, c.kind, c.index) for r, c in zip(readings, batch)],
                   [structure_kept(r, c.scene) for r, c in zip(readings, batch)],
                   [object_iou(r, c.scene) for r, c in zip(readings, batch)])


class Source:
    """A batch of encoded source pictures, inverted once for all settings."""

    def __init__(self, mini: Mini, batch: list[Case]):
        self.mini, self.batch = mini, batch
        self.latent = mini.encode(pictures([c.scene for c in batch]))
        self.prompt = mini.prompts([c.prompt for c in batch])
        self.words = mini.prompts([c.source for c in batch])
        self.trajectory = run_inversion(mini.model, self.latent, self.words, steps=STEPS, scheduler=SCHEDULER, iterations=ITERATIONS).trajectory

    def negative(self, setting: dict) -> list | None:
        """None: the empty prompt."""
        return self.words if setting["negative"] == "source" else None

    def pnp(self, setting: dict) -> Outcome:
        model, _ = apply_pnp(self.mini.model, self.trajectory, **{k: setting[k] for k in ("feature_layers", "attention_layers", "tau_f", "tau_a")})
        start = start_latent(self.trajectory, self.mini.model)["samples"]
        samples = self.mini.sample(model, self.prompt, start, None, steps=STEPS, cfg=setting["cfg"], scheduler=SCHEDULER, negative=self.negative(setting))
        return judge(self.mini.decode(samples), self.batch)

    def img2img(self, setting: dict, strength: float) -> Outcome:
        """The same prompts and cfg, without the injection."""
        samples = self.mini.sample(self.mini.model, self.prompt, self.latent["samples"], [c.seed for c in self.batch], steps=STEPS, cfg=setting["cfg"],
                                   scheduler=SCHEDULER, denoise=strength, negative=self.negative(setting))
        return judge(self.mini.decode(samples), self.batch)


def score(quick: bool) -> dict:
    """Figures of this module (see its docstring for the keys)."""
    count = 3 if quick else PER_KIND
    strengths = (0.5, 0.8) if quick else STRENGTHS
    mini, seeds = Mini(), f"{count} from {HELD_OUT} + {APART} k for each kind k"
    ours = {kind: Outcome([], [], []) for kind in KINDS}
    swept = {strength: Outcome([], [], []) for strength in strengths}
    for kind in KINDS:
        for batch in batches(cases(kind, HELD_OUT, count)):
            source = Source(mini, batch)
            ours[kind] += source.pnp(SETTINGS[kind])
            for strength in strengths:
                swept[strength] += source.img2img(SETTINGS[kind], strength)
            print(f"  {kind}: {len(ours[kind].iou)} of {count}", flush=True)
    total = sum(ours.values(), Outcome([], [], [])).leaves(seeds)
    sweep = {strength: outcome.leaves(seeds) for strength, outcome in swept.items()}
    nearest = min(strengths, key=lambda s: abs(sweep[s]["edit_success"]["value"] - total["edit_success"]["value"]))
    one = sweep[nearest]["edit_success"]
    return {"pnp": {**total, "by_edit": {kind: outcome.leaves(seeds) for kind, outcome in ours.items()},
                    "img2img": {**sweep[nearest], "strength": {"value": nearest, "n": one["n"], "seeds": seeds},
                                "sweep": {f"denoise_{int(100 * s)}": leaves for s, leaves in sweep.items()}}}}


GRID = {
    "feature_layers": ("u1", "u1,u4"),
    "attention_layers": ("u1-8",),
    "tau_f": (0.5, 0.8),
    "tau_a": (0.5, 0.8),
    "cfg": (4.0, 7.0),
    "negative": ("empty",),
}


def tune(kinds=tuple(KINDS), count: int = 12, grid: dict = GRID) -> dict[str, list[tuple[float, float, dict]]]:
    """Per kind, (edit_success, structure_kept, setting) of every setting of the grid on the validation seeds, best first. Prints as it goes."""
    mini, found = Mini(), {}
    for kind in kinds:
        sources = [Source(mini, batch) for batch in batches(cases(kind, VALIDATION, count), 12)]
        rows = []
        for values in itertools.product(*grid.values()):
            setting = dict(zip(grid, values))
            outcome = sum((source.pnp(setting) for source in sources), Outcome([], [], []))
            success, kept = sum(outcome.success) / count, sum(outcome.kept) / count
            rows.append((success, kept, setting))
            print(f"{kind}: edit {success:.2f} kept {kept:.2f} iou {sum(outcome.iou) / count:.2f} {setting}", flush=True)
        found[kind] = sorted(rows, key=lambda r: (min(r[0] / 0.75, r[1] / 0.85, 1.0), r[0] + r[1]), reverse=True)
    return found
