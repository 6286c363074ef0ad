"""Instructions learned from one pair, on the mini edit model: does the learned instruction do its edit in new scenes, and does everything else stay?

20 held-out edits, 4 each of color, shape, background, style and size; each is learned from one drawn pair, starting from a caption of the picture after it, and applied
to 10 new scenes of one plain object. visii.followed, .unchanged: as in the score of instruct_pix2pix. visii_ceiling: the same scenes with a written instruction;
visii_floor: with the caption that learning started from, which a small model takes for an instruction. visii_blank: BLANK of the edits learned from a caption that
names nothing of them, which does not carry over to new scenes. visii.hybrid: learned colors with "turn the thing into a ..." added, 10 scenes each: is the color there, the
shape, both. visii.by_edit: per kind. visii.seconds: mean of one learning, on the machine that scored. visii.direction_similarity, where the mini
towers are shipped: mean cosine between instruction and edit, at the start and learned.
"""
from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, replace

import torch

from ...instruct_pix2pix.conditioning import with_image
from ...instruct_pix2pix.guidance import add_image_guidance
from ...mini.captions import caption
from ...mini.instructions import Triple
from ...mini.reader import read
from ...mini.scenes import BACKGROUNDS, COLORS, EXTENT, SHAPES, SIZE, SIZES, STYLES, Scene, edited, sample_scene
from ...visii.compose import combine
from ...visii.direction import SHIPPED, Direction, make_direction
from ...visii.instruction import Instruction
from ...visii.learn import Settings
from ...visii.learn_run import run_learn
from ...visii.pairs import encode_pairs
from ...visii.start import from_text, null_text
from ..scoring import HELD_OUT, Mini, mean, pictures, rate
from .instruct_pix2pix import IMAGE_SCALE, SCHEDULER, STEPS, TEXT_SCALE, Found, followed

QUICK_LIMITS: dict[str, float] = {}
TABLES = {"color": COLORS, "shape": SHAPES, "background": BACKGROUNDS, "style": STYLES, "size": SIZES}
WRITTEN = {"color": "make the thing {v}", "shape": "turn the thing into a {v}", "background": "make the background {v}", "size": "make the thing {v}",
           "style": {"flat": "make it a flat drawing", "outline": "make it an outline sketch"}}
EDITS, SCENES, OFFSET, APART = 20, 10, 700_000, 100  # seeds of two edits, and of this and other scores, never meet
BLANK = 5
HYBRID_TEXT_SCALE = 4.0  # more than alone, as the authors advise
# fewer steps than published; the rate is about as far as the words' vectors may move without leaving what the model reads, chosen on other seeds
SETTINGS = Settings(steps=300, learning_rate=0.002, text_scale=TEXT_SCALE, image_scale=IMAGE_SCALE, preview_every=0, choice="late average", checkpointing="off")


@dataclass(frozen=True)
class Edit:
    """kind becomes value: in the pair that it is learned from, and in new scenes."""

    seed: int
    kind: str
    value: str
    pair: Triple
    scenes: tuple[Triple, ...]

    @property
    def start(self) -> str:
        """What learning starts from: a caption of the picture after that names what was edited. Few words leave little room to learn the pair by heart."""
        return caption(self.pair.after, self.seed, 0.0, (self.kind,))[0]

    @property
    def blank(self) -> str:
        """A caption of the picture after that names nothing."""
        return caption(self.pair.after, self.seed, 0.0, ())[0]


def written(kind: str, value: str) -> str:
    """The instruction that a person would give."""
    form = WRITTEN[kind]
    return form[value] if isinstance(form, dict) else form.format(v=value).replace("a orange", "an orange")


def changed(scene: Scene, kind: str, value: str, seed: int) -> Scene:
    """The scene after the edit; an object that grows stays inside the picture."""
    after = edited(scene, kind, value, 0, seed)
    if kind != "size":
        return after
    obj = after.objects[0]
    margin = obj.radius * EXTENT + 2
    return replace(after, objects=(replace(obj, cx=min(SIZE - margin, max(margin, obj.cx)), cy=min(SIZE - margin, max(margin, obj.cy))),))


def scene_for(seed: int, kind: str, value: str, **others: str) -> Triple:
    """A scene of one plain object whose `kind`, and what else is named, is not yet `value`, with the edit."""
    rng = random.Random(seed)
    while True:
        scene = sample_scene(rng.randrange(1 << 40), 1)
        scene = replace(scene, objects=(replace(scene.objects[0], pattern="plain", color2=""),))
        if all(getattr(scene if name in ("background", "style") else scene.objects[0], name) != word for name, word in {kind: value, **others}.items()):
            index = None if kind in ("background", "style") else 0
            return Triple(scene, written(kind, value), changed(scene, kind, value, seed), kind, index)


def edit(number: int, first: int, scenes: int = SCENES) -> Edit:
    """The edit of this number, from the seeds at `first` on."""
    seed, kind = first + APART * number, list(TABLES)[number % len(TABLES)]
    words = list(TABLES[kind])
    # every word of a short table comes by in turn
    value = words[(number // len(TABLES)) % len(words)] if len(words) < 4 else random.Random(seed).choice(words)
    return Edit(seed, kind, value, scene_for(seed, kind, value), tuple(scene_for(seed + 1 + k, kind, value) for k in range(scenes)))


@torch.inference_mode()
def applied(mini: Mini, tokens: torch.Tensor, scenes: list[Scene], first: int, text_scale: float = TEXT_SCALE) -> list:
    """Readings of the scenes' pictures edited with an instruction [1, T, C], through the node's own guidance and the stock sampler."""
    picture = mini.encode(pictures(scenes))["samples"]
    prompts = [[tokens.expand(len(scenes), -1, -1).clone(), {}]], mini.prompts([""] * len(scenes))
    positive, negative = (with_image(prompt, picture) for prompt in prompts)
    samples = mini.sample(add_image_guidance(mini.model, IMAGE_SCALE), positive, torch.zeros_like(picture), list(range(first, first + len(scenes))),
                          steps=STEPS, cfg=text_scale, scheduler=SCHEDULER, negative=negative)
    return [read(found) for found in mini.decode(samples)]


@torch.inference_mode()
def learned(mini: Mini, found: Edit, settings: Settings = SETTINGS, text: str | None = None):
    """The learning of an edit (a `learn_run.Result`), from `text` or its start."""
    before, after = pictures([found.pair.before]), pictures([found.pair.after])
    pairs = encode_pairs(mini.vae, before, after, 4)
    start = from_text(mini.clip, text or found.start)
    return run_learn(mini.model, pairs, start, null_text(mini.clip), replace(settings, seed=found.seed), _direction(pairs.before, pairs.after, start.width))


def _direction(before: torch.Tensor, after: torch.Tensor, width: int) -> Direction:
    from ...mini import checkpoint, towers

    name, path = next(iter(SHIPPED.items()))
    if not path.is_file():
        return Direction(reason="the mini towers are not shipped")
    return make_direction(towers.load_clip_vision(checkpoint.WEIGHTS), name, before, after, width)


def hybrid(mini: Mini, instruction: Instruction, found: Edit, count: int) -> list[tuple[bool, bool]]:
    """Whether color and shape are there, of `count` scenes edited with a learned color and a written shape."""
    shape = random.Random(found.seed + 50).choice(SHAPES)
    cases = [scene_for(found.seed + 60 + k, "color", found.value, shape=shape) for k in range(count)]
    both = [replace(one, after=edited(one.after, "shape", shape, 0)) for one in cases]
    readings = applied(mini, combine(instruction, mini.clip, written("shape", shape)).tokens, [one.before for one in cases], found.seed + 60, HYBRID_TEXT_SCALE)
    return [(followed(one, reading), followed(replace(one, kind="shape"), reading)) for one, reading in zip(both, readings)]


def score(quick: bool) -> dict:
    """Figures of this module (see its docstring for the keys)."""
    mini, first = Mini("instruct_pix2pix"), HELD_OUT + OFFSET
    count, scenes = (5, 1) if quick else (EDITS, SCENES)
    settings = replace(SETTINGS, steps=5) if quick else SETTINGS
    seeds = f"{count} edits from {first} + {APART} k, {scenes} scenes each"
    ways: dict[str, Found] = defaultdict(Found)
    seconds, alike, mixed = [], [], []
    for number in range(count):
        found = edit(number, first, scenes)
        result = learned(mini, found, settings)
        seconds.append(result.seconds)
        alike += [result.alike] if result.alike else []
        tokens = {"visii": result.instruction.tokens, "visii_ceiling": from_text(mini.clip, written(found.kind, found.value)).tokens, "visii_floor": result.start.tokens}
        if number < BLANK:
            tokens["visii_blank"] = learned(mini, found, settings, found.blank).instruction.tokens
        for way, states in tokens.items():
            for one, reading in zip(found.scenes, applied(mini, states, [one.before for one in found.scenes], found.seed + 1)):
                ways[way].add(one, reading)
        if found.kind == "color":
            mixed += hybrid(mini, result.instruction, found, scenes)
        right = {way: f"{sum(ways[way].followed[-scenes:])}/{sum(ways[way].unchanged[-scenes:])}" for way in tokens}
        print(f"  {found.kind} {found.value}: followed/unchanged of {scenes}: {right}, {result.seconds:.0f} s", flush=True)
    out = {way: values.leaves(seeds, by_edit=way == "visii") for way, values in ways.items()}
    color, shape = zip(*mixed)
    out["visii"]["hybrid"] = {"color": rate(list(color), seeds), "shape": rate(list(shape), seeds), "both": rate([a and b for a, b in mixed], seeds)}
    out["visii"]["seconds"] = mean(seconds, seeds)
    if alike:
        out["visii"]["direction_similarity"] = {name: mean(list(values), seeds) for name, values in zip(("start", "learned"), zip(*alike))}
    return out
