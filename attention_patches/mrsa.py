"""FreeCustom's multi-reference self-attention (Ding et al., CVPR 2024) as an edit of a MODEL.

The picture's queries see their own keys and the kept tokens of reference pictures under one softmax, in the last layers of the decoder. With style
fidelity 1 (published) only the positive half does; the negative half mixes in as much as the fidelity leaves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from . import host
from .blocks import SD1, SD2, SDXL, Point, UNetLayers, attention_points, unet_layers
from .collectors import Collector
from .concept_run import FRESH, NEGATIVE, NOISES, ConceptSource
from .edit import Attention, Edit, RunInfo, SourceRows
from .mrsa_attention import CODE, RULES, References, attend, blend_style, pick, shares
from .mrsa_concept import Concept, Concepts
from .pnp import in_window
from .reference_pass import add_edits, edits_of
from .rows import Feature
from .source import check_conditioning

# "the last two blocks" of the paper: SD1's self-attentions 10 to 15, SDXL's 34 to 69
PRESETS = {
    "default": {SD1: "u3-8", SD2: "u3-8", SDXL: "u0-5"},
    "last": {SD1: "u6-8", SD2: "u6-8", SDXL: "u3-5"},
    "all": {SD1: "d0-5,m0,u0-8", SD2: "d0-5,m0,u0-8", SDXL: "d0-3,m0,u0-5"},
}


NOTHING = "no concept has an effect with these weights, masks, layers and window, so nothing was composed: see the report of MRSA Concept Composer, and queue again"


@dataclass(frozen=True, eq=False)
class MRSAEdit(Edit):
    """The composition. concepts: as the branches of `source`, in order. places: "attn1" points. ceiling, floor: noise levels (the floor excluded).

    fidelity: style fidelity 0..1. rule: one of RULES. results: receives under each point how much of the attention each of `count` concepts gets,
    [B, h, w, count], summed over steps, and the number of steps; or None. numbers: the place of each of `concepts` among them. watched: at which
    points, watch_ceiling, watch_floor: at which noise levels.
    """

    concepts: tuple[Concept, ...] = ()
    numbers: tuple[int, ...] = ()
    count: int = 0
    places: frozenset[Point] = frozenset()
    ceiling: float = math.inf
    floor: float = -math.inf
    fidelity: float = 1.0
    rule: str = CODE
    results: Collector | None = None
    watched: frozenset[Point] = frozenset()
    watch_ceiling: float = math.inf
    watch_floor: float = -math.inf

    @property
    def collector(self):
        return self.results

    def points(self, sigma: float) -> frozenset[Point]:
        return self.places if sigma <= self.ceiling and in_window(sigma, self.floor) else frozenset()

    def replaces(self, point: Point, sigma: float) -> bool:
        return True

    def __post_init__(self):
        # of one run, see for_run
        object.__setattr__(self, "_picked", {})
        object.__setattr__(self, "_said", set())

    def for_run(self, info: RunInfo) -> "MRSAEdit":
        return replace(self)

    def attend(self, point: Point, q: Tensor, k: Tensor, v: Tensor, source: SourceRows, attention: Attention) -> Tensor:
        chunks = source.chunks
        # chunks of one side share the references' keys and values
        sides = {role: self._references(role, source, k, attention) for role in dict.fromkeys(chunk.role for chunk in chunks) if self._sees(role)}
        if all(seen is None for seen in sides.values()):
            return attention.below(q, k, v)
        if sides.get("positive") is not None and not attention.alone:
            self._say_replaced(point)
        parts = list(zip(*(x.chunk(len(chunks)) for x in (q, k, v))))
        rest: list[Tensor] = []

        def plain(i: int) -> Tensor:
            if attention.alone:
                return attention.plain(*parts[i])
            if not rest:
                # another node's replacement wants the rows of the whole call
                rest.extend(attention.below(q, k, v).chunk(len(chunks)))
            return rest[i]

        def composed(i: int) -> Tensor:
            references, numbers, counts = sides[chunks[i].role]
            noted = self._watches(point, source.sigma) and chunks[i].role == "positive" and chunks[i].whole
            watch = partial(self._note, point, source, attention, numbers, counts) if noted else None
            return attend(*parts[i], references, self.rule, attention.heads, attention.plain, watch)

        out = []
        for i, chunk in enumerate(chunks):
            if sides.get(chunk.role) is None:
                out.append(plain(i))
            else:
                # only the unconditional half is blended
                out.append(blend_style(partial(composed, i), partial(plain, i), 0.0 if chunk.role == "positive" else self.fidelity))
        return torch.cat(out) if len(out) > 1 else out[0]

    def _sees(self, role: str | None) -> bool:
        return role == "positive" or (role == "negative" and self.fidelity < 1.0)

    def _references(self, role: str, source: SourceRows, like: Tensor, attention: Attention) -> tuple[References, tuple[int, ...], tuple[int, ...]] | None:
        """What one side of guidance sees at a layer, projected; the numbers of the concepts in it and how many tokens each has. None for nothing."""
        prefix = NEGATIVE if role == "negative" else ""
        found = [self._feature(source, prefix + name) for name, _ in self.source.branches]
        there = [(place, feature) for place, feature in enumerate(found) if feature is not None]
        if not there:
            return None
        bank = there[0][1].tensor.device
        # masks are looked at once in a run: a copy to the GPU in every call would make the CPU wait for it
        key = (tuple((place, feature.size) for place, feature in there), bank, like.device)
        if key not in self._picked:
            self._picked[key] = pick([self.concepts[place].selection(feature.size) for place, feature in there], self.rule).moved(bank, like.device)
        picked = self._picked[key]
        if not len(picked.weights):
            return None
        tokens = picked.of([feature.tensor for _, feature in there]).to(like)
        references = References(attention.to_k(tokens), attention.to_v(tokens), picked.weights)
        return references, tuple(self.numbers[place] for place, _ in there), picked.counts

    def _say_replaced(self, point: Point) -> None:
        if not self._said:
            self._said.add("replaced")
            host.log.warning(
                "Palimpsest: another node replaces the self-attention of block %s %d too: where both do, the positive rows are MRSA's and the other's are not used.",
                point.part, point.number,
            )

    @staticmethod
    def _feature(source: SourceRows, branch: str) -> Feature | None:
        try:
            return source.stored(branch)
        except KeyError:  # the negative prompt is switched off at this step, or there is none
            return None

    def _watches(self, point: Point, sigma: float) -> bool:
        return self.results is not None and point in self.watched and sigma <= self.watch_ceiling and in_window(sigma, self.watch_floor)

    def _note(self, point: Point, source: SourceRows, attention: Attention, numbers: tuple[int, ...], counts: tuple[int, ...], q: Tensor, k: Tensor) -> None:
        """Add this step's share of every query's attention that goes to each concept. q, k: as the attention got them."""
        total, steps, last = self.results.get(point, (0.0, 0, None))
        if last == source.sigma or q.shape[:2] != (source.batch, math.prod(source.size)):
            # a later call at this noise level, or tokens that another node tiles or merges
            return
        found = torch.zeros(*q.shape[:2], self.count)
        found[..., list(numbers)] = shares(q, k, counts, attention.heads, attention.plain).cpu()
        self.results.add(point, (total + found.unflatten(1, source.size), steps + 1, source.sigma))


def compose(
    model, concepts: Concepts, *, layers: str = "preset default", start: float = 0.0, end: float = 1.0, fidelity: float = 1.0, rule: str = CODE,
    noise: str = FRESH, seed: int | None = None, empty: list | None = None, watch: bool = False, bank_device: str = "auto",
    watch_layers: str = "", watch_start: float = 0.0, watch_end: float = 1.0,
):
    """A clone of `model` whose pictures see the concepts, the collector of attention shares (None unless `watch`), and a report.

    model: ModelPatcher. start, end: fractions of the schedule. empty: CONDITIONING that replaces the concepts' own prompts, or None. seed: of the references' noise,
    None for the sampler's. watch_layers: of the composed ones, all where it is empty; watch_start, watch_end: fractions. Raises ValueError, one sentence, for anything
    that does not fit together. Concepts without effect install nothing.
    """
    if any(isinstance(edit, MRSAEdit) for edit in edits_of(model)):
        raise ValueError("This MODEL comes from an MRSA Concept Composer already: chain all concepts into one composer.")
    if rule not in RULES or noise not in NOISES:
        raise ValueError(f"There is no rule {rule} or noise {noise}: choose {' or '.join(RULES)}, and {' or '.join(NOISES)}.")
    if not 0.0 <= fidelity <= 1.0 or not 0.0 <= start <= end <= 1.0:
        raise ValueError(f"Style fidelity {fidelity:g} and the window {start:g} to {end:g} are fractions between 0 and 1, the start before the end.")
    # first what the model is: a text diffuser's channels say nothing to people
    known = unet_layers(model)
    _check_concepts(model, concepts, empty)
    places = attention_points(layers, known, "attention layers", "attn1", PRESETS)
    watched = _watched(known, places, watch_layers, watch_start, watch_end) if watch else frozenset()
    used = []
    report = [f"model: {known.architecture}", f"self-attention: {len(places)} layers, {start:g} to {end:g} of the schedule", f"rule: {rule}; style fidelity {fidelity:g}"]
    for number, concept in enumerate(concepts, 1):
        # a thin thing may be kept at the finest layers only
        kept = concept.weight != 0 and any(len(concept.selection(size).indices) for size in {known.size((place.part, place.number), concept.size) for place in places})
        used += [concept] if kept else []
        report.append(f"concept {number}: weight {concept.weight:g}, latent {concept.size[1]} x {concept.size[0]}" + ("" if kept else ", no effect"))
        if not kept and places and any(len(concept.selection(size).indices) for size in concept.sizes):
            report[-1] += ": its mask keeps no token at the sizes of these layers"
            host.log.warning("Palimpsest: concept %d has no effect, its mask keeps no token at the sizes of the chosen layers.", number)
    if not used or not places or start == end:
        report.append("no effect: nothing is installed")
        host.log.warning("Palimpsest: MRSA has nothing to show with these concepts and settings, the model is left as it is.")
        return model, Collector("attention shares", NOTHING) if watch else None, "\n".join(report)
    process = model.get_model_object("latent_format").process_in
    source = ConceptSource(
        None, tuple((f"concept {number}", empty or concept.conditioning) for number, concept in enumerate(used, 1)),
        latents=tuple(process(concept.latent) for concept in used), noise=noise, seed=seed, negatives=fidelity < 1.0,
    )
    results = Collector("attention shares") if watch else None
    (ceiling, floor), (watch_ceiling, watch_floor) = host.window(model, start, end), host.window(model, watch_start, watch_end)
    edit = MRSAEdit(
        source=source, bank_device=bank_device, concepts=tuple(used), numbers=tuple(number for number, concept in enumerate(concepts) if concept in used), count=len(concepts),
        places=places, fidelity=fidelity, rule=rule, ceiling=ceiling, floor=floor, results=results, watched=watched, watch_ceiling=watch_ceiling, watch_floor=watch_floor,
    )
    rows = len(used) * (1 if fidelity == 1.0 else 2)
    report.append(f"rows per step: {rows} more than the plain run, one at a time" + ("" if fidelity == 1.0 else f" ({len(used)} of them for the negative half, where it runs)"))
    if watch:
        report.append(f"watched: {len(watched)} of these layers, {watch_start:g} to {watch_end:g} of the schedule")
    return add_edits(model, edit), results, "\n".join(report)


def _check_concepts(model, concepts: Concepts, empty: list | None) -> None:
    if not len(concepts):
        raise ValueError("There is no concept: connect one or several chained MRSA Concept nodes.")
    width, channels = host.token_width(model), model.get_model_object("latent_format").latent_channels
    if empty is not None:
        check_conditioning(empty, width, "empty_prompt")
    for number, concept in enumerate(concepts, 1):
        if empty is None:
            check_conditioning(concept.conditioning, width, f"concept {number}")
        if concept.latent.shape[1] != channels:
            raise ValueError(
                f"The latent of concept {number} has {concept.latent.shape[1]} channels, but the connected model works on {channels}: "
                "encode its picture with the VAE of this checkpoint."
            )


def _watched(known: UNetLayers, places: frozenset[Point], layers: str, start: float, end: float) -> frozenset[Point]:
    if not 0.0 <= start < end <= 1.0:
        raise ValueError(f"The watch window goes from {start:g} to {end:g}, but it needs two fractions between 0 and 1, the smaller first.")
    if not layers.strip():
        return places
    chosen = attention_points(layers, known, "watch layers", "attn1", PRESETS) & places
    if places and not chosen:
        raise ValueError("None of the watch layers sees the concepts: choose among the layers of this node, or leave watch_layers empty for all of them.")
    return chosen
