"""Prompt-to-Prompt edits: is what was asked for there, is everything else kept, and how much of the background moved?

100 edits, 25 each of swap color, swap shape, swap background and add style, once with generated sources (the source prompt's picture
of the same seed) and once with inverted ones (drawn scenes). Prompts name the objects with all they have and the style, and leave the
background unsaid, as people do, unless it is what changes; where a style is added the source prompt has none. Swaps of color and shape carry a local blend
by the swapped words. Objects are plain, as the model redraws patterns badly with any method; p2p.patterned: 40 inverted edits, 10 of each kind, of
scenes with patterns. Seeds whose generated source does not show its own caption's objects are passed over (.skipped).

p2p.{generated,inverted}.edit_success: the edited attribute has its new value. .kept: all others that can be read in the source picture are read the same.
.background_psnr_db: outside the objects, swaps of color and shape only. .background_psnr_gain_db: mean gain over .same_seed, which is the
edit prompt alone from the same noise. .img2img: the stock KSampler on the source picture. p2p.reweight_monotonic: the weight of a color
word at 0.5, 1 and 2 moves the object's color towards that color in this order.
"""
from __future__ import annotations

import colorsys
import random
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch

from ...inversion.run import run_inversion
from ...inversion.trajectory import clean_latent, start_latent
from ...mini.captions import STYLE_WORDS, caption
from ...mini.metrics import OBJECT_ATTRIBUTES, background_psnr, edit_success, match_named, others_kept
from ...mini.reader import Reading, read
from ...mini.scenes import BACKGROUNDS, COLORS, SHAPES, STYLES, Scene, edited, sample_scene
from ...p2p.apply import Settings, apply_p2p
from ...p2p.local import add_blend
from ..scoring import HELD_OUT, Mini, mean, pictures, rate

QUICK_LIMITS = {"p2p.generated.edit_success": 0.3, "p2p.generated.kept": 0.2}
KINDS = {"color": COLORS, "shape": SHAPES, "background": BACKGROUNDS, "style": STYLES}
PER_KIND, PATTERNED, APART, OFFSET = 25, 10, 10_000, 200_000  # seeds of two kinds, and of this and other scores, never meet
STEPS, SCHEDULER, CFG, DENOISE = 25, "ddim_uniform", 4.0, 0.6
START, POOL = 0.2, True
WEIGHTS = (0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Recipe:
    """How a kind of edit is made. blend: threshold of a local blend by the swapped words, None for no blend."""

    settings: Settings
    blend: float | None = None


# chosen on validation seeds, once for both kinds of sources
RECIPES = {
    "color": Recipe(Settings(cross=(0.0, 0.6), self_window=(0.0, 0.8), self_share=1.0), 0.6),
    "shape": Recipe(Settings(cross=(0.0, 0.8), self_window=(0.0, 0.4)), 0.5),
    "background": Recipe(Settings(cross=(0.0, 0.4), self_window=(0.0, 0.6), self_share=1.0)),
    "style": Recipe(Settings(cross=(0.0, 0.4), self_window=(0.0, 0.6), self_share=1.0)),
}


@dataclass(frozen=True)
class Case:
    """One edit: the twin it should become, which attribute of which object, and both prompts."""

    seed: int
    scene: Scene
    target: Scene
    kind: str
    index: int
    source: str
    prompt: str
    named: list


@dataclass
class Figures:
    """What was found, one entry per edit; psnr only for swaps of color and shape."""

    success: list[bool] = field(default_factory=list)
    kept: list[bool] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)

    def add(self, picture: np.ndarray, before: np.ndarray, case: Case, source: Reading) -> None:
        """Judge one edited picture against its source's picture and reading."""
        reading = read(picture)
        # the twin's objects stand where the source's are read, whichever drew them
        self.success.append(edit_success(reading, _there(case, source), case.kind, case.index))
        self.kept.append(others_kept(reading, source, case.kind, _place(case, source)))
        if case.kind in ("color", "shape"):
            self.psnr.append(background_psnr(picture, before, reading, source))

    def leaves(self, seeds: str) -> dict:
        return {"edit_success": rate(self.success, seeds), "kept": rate(self.kept, seeds), "background_psnr_db": mean(self.psnr, seeds)}


def _place(case: Case, source: Reading) -> int:
    """Which read object of the source is the case's edited one."""
    found = match_named(source, case.named)[case.index]
    return next((i for i, read_object in enumerate(source.objects) if read_object is found), 0)


def _there(case: Case, source: Reading) -> Scene:
    """The target with its objects at the places where the source's were read."""
    found = match_named(source, case.named)
    objects = tuple(obj if seen is None else replace(obj, cx=seen.cx, cy=seen.cy) for obj, seen in zip(case.target.objects, found))
    return replace(case.target, objects=objects)


def case(kind: str, seed: int, scene: Scene | None = None, style: str | None = None, plain: bool = True) -> Case:
    """The edit that belongs to a seed. style: of the source picture where that is only known once it is made."""
    rng = random.Random(seed)
    scene = sample_scene(seed) if scene is None else scene
    if plain:
        scene = replace(scene, objects=tuple(replace(obj, pattern="plain", color2="") for obj in scene.objects))
    index = rng.randrange(len(scene.objects))
    obj = scene.objects[index]
    if kind == "style":
        value = next(word for word in STYLES if word != (style or scene.style))
        text, named, _ = caption(scene, seed, 0.0, OBJECT_ATTRIBUTES)
        return Case(seed, scene, edited(scene, kind, value, index, seed), kind, index, text, f"{text}, {STYLE_WORDS[value][0]}", named)
    old = getattr(scene if kind == "background" else obj, kind)
    value = rng.choice([word for word in KINDS[kind] if word not in (old, obj.color2 if kind == "color" else old)])
    target, always = edited(scene, kind, value, index, seed), (*OBJECT_ATTRIBUTES, "style", *([kind] if kind == "background" else []))
    text, named, _ = caption(scene, seed, 0.0, always)
    return Case(seed, scene, target, kind, index, text, caption(target, seed, 0.0, always)[0], named)


def swapped(found: Case) -> tuple[str, str]:
    """(words of the edit prompt that are new, words of the source prompt that they replace), separated by commas."""
    pairs = [pair for pair in zip(found.prompt.replace(",", "").split(), found.source.replace(",", "").split()) if pair[0] != pair[1] and "a" not in pair]
    return ", ".join(new for new, _ in pairs), ", ".join(old for _, old in pairs)


def edit_model(mini: Mini, found: Case, recipe: Recipe, trajectory=None) -> tuple[object, list]:
    """(MODEL, positive CONDITIONING) of a case's edit."""
    edit = apply_p2p(mini.model, mini.clip, found.source, found.prompt, recipe.settings, trajectory=trajectory)
    if recipe.blend is None:
        return edit.model, edit.positive
    return add_blend(edit.model, *swapped(found), "", (recipe.blend, recipe.blend), START, POOL)[0], edit.positive


def run(mini: Mini, model, positive: list, latent: torch.Tensor, seed: int | None, denoise: float = 1.0) -> torch.Tensor:
    return mini.sample(model, positive, latent, None if seed is None else [seed], steps=STEPS, cfg=CFG, scheduler=SCHEDULER, denoise=denoise)


def generated(mini: Mini, kind: str, seed: int, results: dict[str, Figures]) -> bool:
    """Score one edit of a generated source; False when the source is not what its own prompt says."""
    found, empty = case(kind, seed), torch.zeros(1, 4, 16, 16)
    before = mini.decode(run(mini, mini.model, mini.prompts([found.source]), empty, seed))
    source = read(before[0])
    if kind == "style":
        found = case(kind, seed, style=source.style)
    shown = match_named(source, found.named)
    if len(source.objects) != len(found.named) or any(getattr(seen, name) != value for seen, wanted in zip(shown, found.named) for name, value in wanted.items()):
        return False
    model, positive = edit_model(mini, found, RECIPES[kind])
    _judge(mini, results, found, before, source, {
        "p2p": run(mini, model, positive, empty, seed),
        "same_seed": run(mini, mini.model, mini.prompts([found.prompt]), empty, seed),
        "img2img": run(mini, mini.model, mini.prompts([found.prompt]), mini.encode(before)["samples"], seed, DENOISE),
    })
    return True


def inverted(mini: Mini, kind: str, seed: int, results: dict[str, Figures], plain: bool = True) -> bool:
    """Score one edit of a drawn scene."""
    found = case(kind, seed, plain=plain)
    latent, words = mini.encode(pictures([found.scene])), mini.prompts([found.source])
    trajectory = run_inversion(mini.model, latent, words, steps=STEPS, scheduler=SCHEDULER).trajectory
    before = mini.decode(clean_latent(trajectory, mini.model)["samples"])
    source = read(before[0])
    if len(source.objects) != len(found.scene.objects):
        return False
    model, positive = edit_model(mini, found, RECIPES[kind], trajectory)
    start, prompt = start_latent(trajectory, mini.model)["samples"], mini.prompts([found.prompt])
    _judge(mini, results, found, before, source, {
        "p2p": run(mini, model, positive, start, None),
        "same_seed": run(mini, mini.model, prompt, start, None),
        "img2img": run(mini, mini.model, prompt, latent["samples"], seed, DENOISE),
    })
    return True


def _judge(mini: Mini, results: dict[str, Figures], found: Case, before: torch.Tensor, source: Reading, samples: dict[str, torch.Tensor]) -> None:
    for name, latents in samples.items():
        results[name].add(mini.decode(latents)[0].numpy(), before[0].numpy(), found, source)


def reweighted(mini: Mini, seed: int) -> bool | None:
    """Whether the object's color moves towards the weighted word's with the weight; None where the source is not what its prompt says."""
    scene = sample_scene(seed, 1)
    text, named, _ = caption(scene, seed, always=("color", "shape"))
    word, wanted = scene.objects[0].color, np.array(colorsys.hsv_to_rgb(COLORS[scene.objects[0].color][0] / 360, *COLORS[scene.objects[0].color][1:]))
    empty, nearness = torch.zeros(1, 4, 16, 16), []
    before = mini.decode(run(mini, mini.model, mini.prompts([text]), empty, seed))[0].numpy()
    reading = read(before)
    if len(reading.objects) != 1 or reading.objects[0].color != word:
        return None
    mask = reading.objects[0].mask
    ground = np.array(reading.background_rgb)
    for weight in WEIGHTS:
        edit = apply_p2p(mini.model, mini.clip, text, text, Settings(weights=f"{word}: {weight}", cross=(0.0, 1.0), self_window=(0.0, 1.0)))
        picture = before if weight == 1.0 else mini.decode(run(mini, edit.model, edit.positive, empty, seed))[0].numpy()
        # how far the object's mean color lies along the way from the background to the pure color
        nearness.append(float((picture[mask].mean(0) - ground) @ (wanted - ground) / ((wanted - ground) @ (wanted - ground))))
    return nearness[0] < nearness[1] < nearness[2]


def score(quick: bool) -> dict:
    """Figures of this module (see its docstring for the keys)."""
    mini, out = Mini(), {}
    for name, judge, count in (("generated", generated, PER_KIND), ("inverted", inverted, PER_KIND), ("patterned", partial(inverted, plain=False), PATTERNED)):
        count = 1 if quick else count
        results: dict[str, Figures] = {"p2p": Figures(), "same_seed": Figures(), "img2img": Figures()}
        skipped, seeds = 0, f"{count} from {HELD_OUT + OFFSET} + {APART} k for each kind k"
        for number, kind in enumerate(KINDS):
            seed, done = HELD_OUT + OFFSET + APART * number, 0
            while done < count:
                if judge(mini, kind, seed, results):
                    done += 1
                else:
                    skipped += 1
                seed += 1
            right = results["p2p"]
            print(f"  {name}, {kind}: {count}, success {sum(right.success[-count:])}, kept {sum(right.kept[-count:])}", flush=True)
        leaves = {key: found.leaves(seeds) for key, found in results.items()}
        gains = [a - b for a, b in zip(results["p2p"].psnr, results["same_seed"].psnr)]
        out[name] = {**leaves.pop("p2p"), "background_psnr_gain_db": mean(gains, seeds), "skipped": {"value": skipped, "n": skipped + 4 * count, "seeds": seeds}, **leaves}
    return {"p2p": {**out, "reweight_monotonic": _reweighting(mini, 1 if quick else 50)}}


def _reweighting(mini: Mini, count: int) -> dict:
    found, seed = [], HELD_OUT + OFFSET + APART * len(KINDS)
    while len(found) < count:
        result = reweighted(mini, seed)
        found += [] if result is None else [result]
        seed += 1
    return rate(found, f"{count} from {HELD_OUT + OFFSET + APART * len(KINDS)}")
