"""InstructPix2Pix on the mini edit model: is the instruction followed, and does everything else stay?

200 held-out triples, all kinds of edit alike, at image scale 1.5 and the text scale of the sample graph. followed: fraction of pictures in which the
edit is there; for a new object its shape, color, size and place, for a new pattern its color as well. unchanged: fraction in which every other attribute
of every object, background, style and the number of objects are read as in the edited scene. Objects are plain before the edit, as the mini family
draws patterns badly; .patterned: 100 triples of any objects, edits of second colors among them. .by_edit: per kind. .text_scale_7_5: 100 of the triples
at the published text scale. .sweep: 100 of them over image scales 1.0 to 2.2, the trade-off of the paper's figure 8, which `plot` draws.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...mini.instructions import KINDS, PLAIN_KINDS, Triple, triple
from ...mini.metrics import OBJECT_ATTRIBUTES, match_objects, shows
from ...mini.reader import Reading, read
from .. import tradeoff
from ..scoring import HELD_OUT, Mini, batches, pictures, rate, span

QUICK_LIMITS: dict[str, float] = {}
COUNT, FEWER, OFFSET = 200, 100, 600_000  # seeds of this and other scores never meet
STEPS, SCHEDULER = 20, "normal"
TEXT_SCALE, PUBLISHED_TEXT_SCALE, IMAGE_SCALE = 2.5, 7.5, 1.5
SWEEP = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2)
PICTURE = Path(__file__).resolve().parents[2] / "web" / "docs" / "pictures" / "instruct-pix2pix-tradeoff.png"
CHANGES = {"color": ("color",), "color2": ("color2",), "pattern": ("pattern", "color2"), "shape": ("shape",), "move": ("place",), "size": ("size",),
           "background": (), "style": (), "remove": (), "add": OBJECT_ATTRIBUTES}  # of the object that the instruction is about
ASKED = {"add": ("shape", "color", "size", "place")}


def followed(found: Triple, reading: Reading) -> bool:
    """Whether the picture shows what the instruction asks for."""
    after = found.after
    if found.kind in ("background", "style"):
        return getattr(reading, found.kind) == getattr(after, found.kind)
    if found.kind in ("add", "remove") and len(reading.objects) != len(after.objects):
        return False
    if found.kind == "remove":
        # the other one is left
        return shows(match_objects(reading, after)[0], "place", after.objects[0].place, reading.style)
    seen = match_objects(reading, after)[found.index]
    return all(shows(seen, name, getattr(after.objects[found.index], name), reading.style) for name in ASKED.get(found.kind, CHANGES[found.kind]))


def unchanged(found: Triple, reading: Reading) -> bool:
    """Whether all that the instruction does not speak of is as it was."""
    after = found.after
    if len(reading.objects) != len(after.objects) or any(getattr(reading, name) != getattr(after, name) for name in ("background", "style") if name != found.kind):
        return False
    for number, (seen, obj) in enumerate(zip(match_objects(reading, after), after.objects)):
        free = CHANGES[found.kind] if number == found.index and found.kind != "remove" else ()
        if not all(shows(seen, name, getattr(obj, name), reading.style) for name in OBJECT_ATTRIBUTES if name not in free):
            return False
    return True


@dataclass
class Found:
    """What was read, an entry per triple."""

    followed: list[bool] = field(default_factory=list)
    unchanged: list[bool] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)

    def add(self, found: Triple, reading: Reading) -> None:
        self.followed.append(followed(found, reading))
        self.unchanged.append(unchanged(found, reading))
        self.kinds.append(found.kind)

    def leaves(self, seeds: str, by_edit: bool = False) -> dict:
        leaves = {"followed": rate(self.followed, seeds), "unchanged": rate(self.unchanged, seeds)}
        if by_edit:
            leaves["by_edit"] = {kind: {name: rate([value for value, of in zip(getattr(self, name), self.kinds) if of == kind], seeds) for name in ("followed", "unchanged")}
                                 for kind in KINDS if kind in self.kinds}
        return leaves


def triples(first: int, count: int, plain: bool = True) -> list[Triple]:
    """Triples of these seeds, the kinds in turn; plain objects have no second color to edit."""
    kinds = PLAIN_KINDS if plain else KINDS
    return [triple(seed, kinds[seed % len(kinds)], plain) for seed in range(first, first + count)]


@torch.inference_mode()
def edited_pictures(mini: Mini, found: list[Triple], seeds: list[int], text_scale: float = TEXT_SCALE, image_scale: float = IMAGE_SCALE) -> torch.Tensor:
    """Pictures [B, 128, 128, 3] of one batch of triples, through the node's own guidance and the stock sampler."""
    from ...instruct_pix2pix.guidance import add_image_guidance

    picture = mini.encode(pictures([one.before for one in found]))["samples"]
    (positive,), (negative,) = mini.prompts([one.instruction for one in found]), mini.prompts([""] * len(found))
    positive, negative = ([[states, {**extra, "concat_latent_image": picture}]] for states, extra in (positive, negative))
    model = add_image_guidance(mini.model, image_scale)
    return mini.decode(mini.sample(model, positive, torch.zeros_like(picture), seeds, steps=STEPS, cfg=text_scale, scheduler=SCHEDULER, negative=negative))


def judge(mini: Mini, found: list[Triple], first: int, text_scale: float = TEXT_SCALE, image_scale: float = IMAGE_SCALE) -> Found:
    """Edit every triple's picture and read it."""
    result = Found()
    for batch in batches(list(zip(found, range(first, first + len(found))))):
        edits, seeds = [list(part) for part in zip(*batch)]
        for one, picture in zip(edits, edited_pictures(mini, edits, seeds, text_scale, image_scale)):
            result.add(one, read(picture))
    return result


def scale_key(scale: float) -> str:
    return f"image_scale_{scale:g}".replace(".", "_")


def score(quick: bool) -> dict:
    """Figures of this module (see its docstring for the keys)."""
    mini, first = Mini("instruct_pix2pix"), HELD_OUT + OFFSET
    count, fewer = (18, 9) if quick else (COUNT, FEWER)
    plain = triples(first, count)
    leaves = judge(mini, plain, first).leaves(span(first, count), by_edit=True)
    print(f"  plain: followed {leaves['followed']['value']:.2f}, unchanged {leaves['unchanged']['value']:.2f} of {count}", flush=True)
    few = span(first, fewer)
    leaves["patterned"] = judge(mini, triples(first, fewer, plain=False), first).leaves(few, by_edit=True)
    leaves["text_scale_7_5"] = judge(mini, plain[:fewer], first, PUBLISHED_TEXT_SCALE).leaves(few)
    leaves["sweep"] = {scale_key(scale): judge(mini, plain[:fewer], first, image_scale=scale).leaves(few) for scale in (SWEEP[:1] if quick else SWEEP)}
    return {"instruct_pix2pix": leaves}


def curves(figures: dict) -> dict[str, list[tuple[str, float, float]]]:
    """Points (label, unchanged, followed) of a score's figures, the whole scores.json: over image scales, and at the published text scale."""
    mine = figures.get("instruct_pix2pix", {})
    swept = [(f"{scale:g}", mine.get("sweep", {}).get(scale_key(scale))) for scale in SWEEP]
    groups = {f"text scale {TEXT_SCALE:g}, image scale {SWEEP[0]:g} to {SWEEP[-1]:g}": swept,
              f"text scale {PUBLISHED_TEXT_SCALE:g}": [(f"{IMAGE_SCALE:g}", mine.get("text_scale_7_5"))]}
    return {name: [(label, leaves["unchanged"]["value"], leaves["followed"]["value"]) for label, leaves in group if leaves] for name, group in groups.items()}


def plot(figures: dict, path: Path = PICTURE) -> None:
    """Draw the trade-off of the paper's figure 8 from scores.json's figures. Raises ValueError where they hold no sweep."""
    tradeoff.write(path, curves(figures), "everything else unchanged, fraction of pictures", "instruction followed, fraction of pictures")
