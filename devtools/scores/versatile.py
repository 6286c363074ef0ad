"""Versatile Diffusion on the mini models: variations of a picture, blends of a picture and a text, and the focus of a picture.

Objects are plain, as the mini family draws patterns badly; a picture has one or two of them, where nothing else is said. ddim, ddim_uniform, 20 steps, zero tokens as the
negative of a picture, the empty prompt as that of a text.

variation_kept: fraction of 100 held-out scenes whose variation has as many objects as the scene, each with its shape and color. variation.one_object, .two_objects: of
these; .patterned: 50 scenes with patterns; .details: per attribute of the plain ones; a place by chance is one in nine.

blend_monotonic: 100 pairs of a picture of one object and the full caption of another; shape, color and background all differ. Each pair is drawn from one noise at ratios 0,
.25, .5, .75 and 1. Of the three attributes the reader finds t as the text names them and p as the picture shows them (of the largest object). The pair counts when t - p
never falls from one ratio to the next, is below 0 at ratio 0 and above 0 at ratio 1. blend.monotonic_by_picture: the same pairs by pixels alone: with D the difference of
the pictures at the two ends, the share of D that a picture has gone, <x - x0, D> / <D, D>, is never more than 0.02 below an earlier one.
blend.monotonic_by_both: pairs that count in both. blend.sweep: mean t / 3 (text) and p / 3 (picture) at each ratio.

focus.level_*: 50 pictures of one object, varied with the focus at 0 (semantics) to 1 (style), the same noise at all levels: fractions that keep color and shape of the object.
"""
from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...mini import checkpoint, towers
from ...mini.captions import caption
from ...mini.metrics import holds, shows
from ...mini.reader import ReadObject, Reading, read
from ...mini.scenes import SIZE, Scene, sample_scene
from ...versatile_diffusion.contexts import dual_conditioning, encode_pictures, image_conditioning, zeros_like
from ...versatile_diffusion.focus import focus
from .. import tradeoff
from ..scoring import HELD_OUT, VALIDATION, Mini, batches, mean, pictures, rate, span
from .seecoder import judged, right

# of ten scenes and four pairs; a blend by chance goes from one side to the other without a step back in few of 100 cases
QUICK_LIMITS = {"versatile.variation_kept": 0.6, "versatile.blend_monotonic": 0.5}
COUNT, PATTERNED, PAIRS, FOCUSED = 100, 50, 100, 50
OFFSET, PAIR_OFFSET, APART, FOCUS_OFFSET = 800_000, 10_000, 1_000, 100_000  # seeds of two parts, and of this and other scores, never meet
STEPS, SAMPLER, SCHEDULER = 20, "ddim", "ddim_uniform"
CFG, BLEND_CFG, FOCUS_CFG = 2.0, 3.0, 2.0  # of 40 validation seeds each: variations kept 1.0 at 1.5, 2 and 3; blends monotonic 0.975 at 2, 1.0 at 3
RATIOS = LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
ATTRIBUTES = ("shape", "color", "background")  # in which the two sides of a blend differ
SLACK = 0.02  # of the way by pixels: noise of the autoencoder and of eight bits is well below
FOLDER = Path(__file__).resolve().parents[2] / "web" / "docs" / "pictures"
BLEND_PICTURE, FOCUS_PICTURE = "versatile-blend.png", "versatile-focus.png"


def plain_scene(seed: int, objects: int | None = None) -> Scene:
    """A scene of plain objects; objects: how many, None for what the seed gives."""
    scene = sample_scene(seed, objects)
    return replace(scene, objects=tuple(replace(obj, pattern="plain", color2="") for obj in scene.objects))


@dataclass(frozen=True)
class Pair:
    """picture: the scene that is shown. text: the scene that is named, by a caption of all its attributes."""

    seed: int
    picture: Scene
    text: Scene

    @property
    def caption(self) -> str:
        return caption(self.text, self.seed, 1.0)[0]


def attributes(scene: Scene) -> dict[str, str]:
    """`ATTRIBUTES` of a scene of one object."""
    return {name: getattr(scene if name == "background" else scene.objects[0], name) for name in ATTRIBUTES}


def pair(seed: int) -> Pair:
    """The pair that belongs to a seed: the picture's scene, and the next of a row of scenes that shares none of `ATTRIBUTES` with it."""
    shown, tries = plain_scene(seed, 1), 1
    while any(value == attributes(shown)[name] for name, value in attributes(plain_scene(seed + APART * tries, 1)).items()):
        tries += 1
    return Pair(seed, shown, plain_scene(seed + APART * tries, 1))


def largest(reading: Reading) -> ReadObject | None:
    """The object that covers most of the picture."""
    return max(reading.objects, key=lambda found: int(found.mask.sum()), default=None)


def found_of(reading: Reading, scene: Scene) -> int:
    """How many of `ATTRIBUTES` are read as those of a scene of one object."""
    seen, wanted = largest(reading), attributes(scene)
    return holds(seen, "shape", wanted["shape"]) + shows(seen, "color", wanted["color"], reading.style) + (reading.background == wanted["background"])


def never_falls(values: list[float], slack: float = 0.0) -> bool:
    """Whether no value is more than `slack` below the largest before it, and the last is above the first."""
    return values[-1] > values[0] and all(value >= max(values[:i]) - slack for i, value in enumerate(values) if i)


def way(images: torch.Tensor) -> list[float]:
    """How far each of the pictures [R, H, W, 3] has gone from the first to the last, as a share of that difference; zeros where there is none."""
    moved = (images - images[:1]).double().flatten(1)
    length = float((moved[-1] ** 2).sum())
    return [float((one * moved[-1]).sum()) / length if length > 1e-12 else 0.0 for one in moved]


@dataclass(frozen=True)
class Blend:
    """What a pair's pictures were read as, per ratio. text, picture: attributes of that side. way: by pixels."""

    text: tuple[int, ...]
    picture: tuple[int, ...]
    way: tuple[float, ...]

    @property
    def by_reader(self) -> bool:
        nearer = [t - p for t, p in zip(self.text, self.picture)]
        return nearer[0] < 0 < nearer[-1] and never_falls(nearer)

    @property
    def by_picture(self) -> bool:
        return never_falls(list(self.way), SLACK)


def judge_blend(images: torch.Tensor, found: Pair) -> Blend:
    """images: [R, H, W, 3], one per ratio, ascending."""
    readings = [read(image) for image in images]
    return Blend(*(tuple(found_of(reading, scene) for reading in readings) for scene in (found.text, found.picture)), tuple(way(images)))


class Versatile:
    """The mini member with its vision tower, through the nodes' own functions and the stock sampler."""

    def __init__(self, mini: Mini | None = None, vision=None):
        self.mini = mini or Mini("versatile")
        self.vision = vision or towers.load_clip_vision(checkpoint.WEIGHTS)

    @torch.inference_mode()
    def read_pictures(self, scenes: list[Scene], level: float = 0.5) -> list:
        """Image CONDITIONING of one batch, a picture per row, with the focus at `level`."""
        return image_conditioning([focus(encode_pictures(self.vision, pictures(scenes)), level)])

    @torch.inference_mode()
    def draw(self, positive: list, negative: list, seeds: list[int], cfg: float) -> torch.Tensor:
        """Pictures [B, 128, 128, 3] of one batch."""
        empty = torch.zeros(len(seeds), 4, SIZE // 8, SIZE // 8)
        return self.mini.decode(self.mini.sample(
            self.mini.model, positive, empty, seeds, steps=STEPS, cfg=cfg, scheduler=SCHEDULER, negative=negative, sampler=SAMPLER))

    def variations(self, scenes: list[Scene], seeds: list[int], level: float = 0.5, cfg: float = CFG) -> torch.Tensor:
        """A variation of each scene's picture."""
        positive = self.read_pictures(scenes, level)
        return self.draw(positive, zeros_like(positive), seeds, cfg)

    def blends(self, pairs: list[Pair], cfg: float = BLEND_CFG) -> torch.Tensor:
        """Pictures [ratios, pairs, H, W, 3], the same noise for all ratios of a pair."""
        shown, seeds = self.read_pictures([one.picture for one in pairs]), [one.seed for one in pairs]
        words, no_words = self.mini.prompts([one.caption for one in pairs]), self.mini.prompts([""] * len(pairs))
        sides = ((words, shown), (no_words, zeros_like(shown)))
        return torch.stack([self.draw(*(dual_conditioning(text, image, ratio) for text, image in sides), seeds, cfg) for ratio in RATIOS])


def kept(model: Versatile, scenes: list[Scene], first: int, cfg: float = CFG) -> list[dict[str, list[bool]]]:
    """Per scene, what of it is found in its variation."""
    rows = []
    for batch in batches(list(zip(scenes, range(first, first + len(scenes))))):
        shown, seeds = (list(part) for part in zip(*batch))
        rows += [judged(read(image), scene) for image, scene in zip(model.variations(shown, seeds, cfg=cfg), shown)]
    return rows


def variation(model: Versatile, first: int, count: int, patterned: int) -> tuple[dict, dict]:
    """(leaf of variation_kept, group of what belongs to it)."""
    seeds, scenes = span(first, count), [plain_scene(seed) for seed in range(first, first + count)]
    rows, by = kept(model, scenes, first), defaultdict(list)
    for row in rows:
        for attribute, values in row.items():
            by[attribute] += values
    group = {"details": {attribute: rate(values, seeds) for attribute, values in by.items()}}
    for name, number in (("one_object", 1), ("two_objects", 2)):
        of = [right(row) for row, scene in zip(rows, scenes) if len(scene.objects) == number]
        group |= {name: rate(of, seeds)} if of else {}
    group["patterned"] = rate([right(row) for row in kept(model, [sample_scene(seed) for seed in range(first, first + patterned)], first)], span(first, patterned))
    return rate([right(row) for row in rows], seeds), group


def blended(model: Versatile, first: int, count: int, cfg: float = BLEND_CFG) -> list[Blend]:
    """The blends of the pairs of these seeds, read."""
    out = []
    for batch in batches([pair(seed) for seed in range(first, first + count)]):
        out += [judge_blend(images, one) for images, one in zip(model.blends(batch, cfg).unbind(1), batch)]
    return out


def blend(found: list[Blend], seeds: str) -> tuple[dict, dict]:
    """(leaf of blend_monotonic, group of what belongs to it)."""
    sweep = {ratio_key(ratio): {side: mean([getattr(one, side)[i] / len(ATTRIBUTES) for one in found], seeds) for side in ("text", "picture")} for i, ratio in enumerate(RATIOS)}
    group = {"monotonic_by_picture": rate([one.by_picture for one in found], seeds), "monotonic_by_both": rate([one.by_reader and one.by_picture for one in found], seeds)}
    return rate([one.by_reader for one in found], seeds), {**group, "sweep": sweep}


def focused(model: Versatile, first: int, count: int, levels: tuple[float, ...] = LEVELS) -> dict:
    """Per level, whether the largest object has the color and the shape of the one that was shown."""
    seen, seeds = {level: {"color": [], "shape": []} for level in levels}, span(first, count)
    for batch in batches(list(range(first, first + count))):
        scenes = [plain_scene(seed, 1) for seed in batch]
        for level in levels:
            for image, scene in zip(model.variations(scenes, batch, level, FOCUS_CFG), scenes):
                reading, obj = read(image), scene.objects[0]
                for name in ("color", "shape"):
                    seen[level][name].append(shows(largest(reading), name, getattr(obj, name), reading.style))
    return {level_key(level): {name: rate(values, seeds) for name, values in found.items()} for level, found in seen.items()}


def ratio_key(ratio: float) -> str:
    return f"ratio_{ratio:g}".replace(".", "_")


def level_key(level: float) -> str:
    return f"level_{level:g}".replace(".", "_")


def score(quick: bool) -> dict:
    """Figures of this module (see its docstring for the keys)."""
    model, first = Versatile(), HELD_OUT + OFFSET
    count, patterned, pairs, seen = (10, 4, 4, 4) if quick else (COUNT, PATTERNED, PAIRS, FOCUSED)
    leaf, group = variation(model, first, count, patterned)
    print(f"  variations: kept {leaf['value']:.2f} of {count}", flush=True)
    monotonic, ways = blend(blended(model, first + PAIR_OFFSET, pairs), f"{span(first + PAIR_OFFSET, pairs)}, texts from the same + {APART} k")
    print(f"  blends: monotonic {monotonic['value']:.2f} of {pairs}", flush=True)
    levels = focused(model, first + FOCUS_OFFSET, seen)
    return {"versatile": {"variation_kept": leaf, "variation": group, "blend_monotonic": monotonic, "blend": ways, "focus": levels}}


def tune(scales: tuple[float, ...] = (1.5, 2.0, 3.0, 4.0), count: int = 30) -> dict[float, tuple[float, float]]:
    """(variation_kept, blend_monotonic) of guidance scales on the validation seeds. Prints as it goes."""
    model, first, found = Versatile(), VALIDATION + OFFSET, {}
    scenes = [plain_scene(seed) for seed in range(first, first + count)]
    for scale in scales:
        rows, blends = kept(model, scenes, first, scale), blended(model, first + PAIR_OFFSET, count, scale)
        found[scale] = sum(map(right, rows)) / count, sum(one.by_reader for one in blends) / count
        print(f"cfg {scale:g}: variation kept {found[scale][0]:.2f}, blend monotonic {found[scale][1]:.2f}", flush=True)
    return found


def curves(figures: dict) -> dict[str, dict[str, list[tuple[str, float, float]]]]:
    """Points (label, x, y) of a score's figures, the whole scores.json: per picture file the curves over ratio, and over level."""
    mine = figures.get("versatile", {})
    sweep, levels = mine.get("blend", {}).get("sweep", {}), mine.get("focus", {})

    def curve(group: dict, key, places: tuple[float, ...], name: str) -> list[tuple[str, float, float]]:
        return [("", place, group[key(place)][name]["value"]) for place in places if key(place) in group]

    return {
        BLEND_PICTURE: {"as the text names it": curve(sweep, ratio_key, RATIOS, "text"), "as the picture shows it": curve(sweep, ratio_key, RATIOS, "picture")},
        FOCUS_PICTURE: {"color kept": curve(levels, level_key, LEVELS, "color"), "shape kept": curve(levels, level_key, LEVELS, "shape")},
    }


def plot(figures: dict, folder: Path = FOLDER) -> None:
    """Draw both pictures from scores.json's figures. Raises ValueError where they hold no full score."""
    found = curves(figures)
    tradeoff.write(folder / BLEND_PICTURE, found[BLEND_PICTURE], "ratio: 0 the picture alone, 1 the text alone", "shape, color and background: fraction that is")
    tradeoff.write(folder / FOCUS_PICTURE, found[FOCUS_PICTURE], "focus: 0 semantics, 0.5 untouched, 1 style", "of the object that was shown: fraction of variations with")
