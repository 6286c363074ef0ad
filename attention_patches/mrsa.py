"""FreeCustom's multi-reference self-attention (Ding et al., CVPR 2024) as an edit of a MODEL.

The picture's queries see their own keys and the kept tokens of reference pictures under one softmax, in the last layers of the decoder. With style
fidelity 1 (published) only the positive half does; the negative half mixes in as much as the fidelity leaves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import host
from .blocks import SD1, SD2, SDXL, Point, attention_points, unet_layers
from .collectors import Collector
from .concept_run import FRESH, NEGATIVE, NOISES, ConceptSource
from .edit import Attention, Edit, SourceRows
from .maps import word_maps
from .mrsa_attention import CODE, PAPER, RULES, fold_bias
from .mrsa_concept import Concept, Concepts
from .mrsa_masks import Selection
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


@dataclass(frozen=True, eq=False)
class MRSAEdit(Edit):
    """The composition. concepts: as the branches of `source`, in order. places: "attn1" points. ceiling, floor: noise levels (the floor excluded).

    fidelity: style fidelity 0..1. rule: one of RULES. results: receives under each point how much of the attention each of `count` concepts gets,
    [B, h, w, count], summed over steps, and the number of steps; or None. numbers: the place of each of `concepts` among them.
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

    @property
    def collector(self):
        return self.results

    def points(self, sigma: float) -> frozenset[Point]:
        return self.places if sigma <= self.ceiling and in_window(sigma, self.floor) else frozenset()

    def replaces(self, point: Point, sigma: float) -> bool:
        return True

    def attend(self, point: Point, q: Tensor, k: Tensor, v: Tensor, source: SourceRows, attention: Attention) -> Tensor:
        chunks = source.chunks
        parts = list(zip(*(x.chunk(len(chunks)) for x in (q, k, v))))
        wanted = [self._share(chunk.role) for chunk in chunks]
        if not any(wanted):
            return attention.below(q, k, v)
        # rows that keep nothing of their own attention need not compute it, unless another node's replacement wants all rows
        below = None if attention.alone else attention.below(q, k, v).chunk(len(chunks))
        out = []
        for i, (chunk, share) in enumerate(zip(chunks, wanted)):
            plain = None
            if share < 1.0:
                plain = below[i] if below is not None else attention.plain(*parts[i])
            if share == 0.0:
                out.append(plain)
                continue
            keys, values, bias, groups = self._extended(parts[i][1], parts[i][2], source, attention, NEGATIVE if chunk.role == "negative" else "")
            if groups is None:
                out.append(plain if plain is not None else below[i] if below is not None else attention.plain(*parts[i]))
                continue
            composed = self._attended(parts[i][0], keys, values, bias, attention)
            if self.results is not None and chunk.role == "positive" and chunk.whole:
                self._note(point, parts[i][0], keys, bias, groups, source, attention.heads)
            out.append(composed if plain is None else share * composed + (1.0 - share) * plain)
        return torch.cat(out)

    @staticmethod
    def _attended(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, attention: Attention) -> Tensor:
        """The host's attention, the bias [1, 1, 1, keys] folded into a channel of every head."""
        if bias is None:
            return attention.plain(q, k, v)
        split = [x.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for x in (q, k, v)]
        dim = split[0].shape[-1]
        # kernels want widths in multiples of 8
        folded = fold_bias(*split, bias, 8 - dim % 8)
        out = attention.plain(*(x.transpose(1, 2).flatten(2) for x in folded))
        return out.unflatten(-1, (attention.heads, -1))[..., :dim].flatten(2)

    def _share(self, role: str | None) -> float:
        return {"positive": 1.0, "negative": 1.0 - self.fidelity}.get(role, 0.0)

    def _extended(self, k: Tensor, v: Tensor, source: SourceRows, attention: Attention, prefix: str):
        """Keys, values and bias with the references behind the own tokens, and the number of tokens of each; groups None where nothing is to be seen."""
        keys, values, biases, groups = [k], [v], [k.new_zeros(k.shape[1])], []
        for (name, _), concept in zip(self.source.branches, self.concepts):
            feature = self._feature(source, prefix + name)
            selection = None if feature is None else concept.selection(feature.size)
            if selection is None or not len(selection.indices):
                groups.append(0)
                continue
            tokens = feature.tensor if self.rule == PAPER else feature.tensor[:, selection.indices.to(feature.tensor.device)]
            tokens = tokens.to(k)
            key, bias = self._weighted(attention.to_k(tokens), selection)
            rows = k.shape[0]
            keys.append(key.expand(rows, -1, -1))
            values.append(attention.to_v(tokens).expand(rows, -1, -1))
            biases.append(bias)
            groups.append(key.shape[1])
        if not any(groups):
            return k, v, None, None
        bias = torch.cat(biases)[None, None, None] if self.rule == CODE else None
        return torch.cat(keys, 1), torch.cat(values, 1), bias, groups

    def _weighted(self, key: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
        """A reference's keys and bias [n]: code rule L + w on kept tokens, paper rule L * (w m)."""
        if self.rule == CODE:
            return key, selection.bias.to(key)
        return key * selection.weighted.to(key)[:, None], key.new_zeros(key.shape[1])

    @staticmethod
    def _feature(source: SourceRows, branch: str) -> Feature | None:
        try:
            return source.stored(branch)
        except KeyError:  # the negative prompt is switched off at this step, or there is none
            return None

    def _note(self, point: Point, q: Tensor, keys: Tensor, bias: Tensor | None, groups: list[int], source: SourceRows, heads: int) -> None:
        """Add this step's share of every query's attention that goes to each concept."""
        total, steps, last = self.results.get(point, (0.0, 0, None))
        if last == source.sigma or q.shape[:2] != (source.batch, math.prod(source.size)):
            # a later call at this noise level, or tokens that another node tiles or merges
            return
        words = torch.zeros(keys.shape[1], self.count, device=keys.device)
        start = keys.shape[1] - sum(groups)
        for number, count in zip(self.numbers, groups):
            words[start : start + count, number] = 1.0
            start += count
        shares = word_maps(q, keys, words.expand(q.shape[0], -1, -1), heads, bias).unflatten(1, source.size)
        self.results.add(point, (total + shares.cpu(), steps + 1, source.sigma))


def compose(
    model, concepts: Concepts, *, layers: str = "preset default", start: float = 0.0, end: float = 1.0, fidelity: float = 1.0, rule: str = CODE,
    noise: str = FRESH, seed: int | None = None, empty: list | None = None, watch: bool = False, bank_device: str = "auto",
):
    """A clone of `model` whose pictures see the concepts, the collector of attention shares (None unless `watch`), and a report.

    model: ModelPatcher. start, end: fractions of the schedule. empty: CONDITIONING that replaces the concepts' own prompts, or None. seed: of the references' noise,
    None for the sampler's. Raises ValueError, one sentence, for anything that does not fit together. Concepts without effect install nothing.
    """
    if not len(concepts):
        raise ValueError("There is no concept: connect one or several chained MRSA Concept nodes.")
    if any(isinstance(edit, MRSAEdit) for edit in edits_of(model)):
        raise ValueError("This MODEL comes from an MRSA Concept Composer already: chain all concepts into one composer.")
    if rule not in RULES or noise not in NOISES:
        raise ValueError(f"There is no rule {rule} or noise {noise}: choose {' or '.join(RULES)}, and {' or '.join(NOISES)}.")
    if not 0.0 <= fidelity <= 1.0 or not 0.0 <= start <= end <= 1.0:
        raise ValueError(f"Style fidelity {fidelity:g} and the window {start:g} to {end:g} are fractions between 0 and 1, the start before the end.")
    known = unet_layers(model)
    places = attention_points(layers, known, "attention layers", "attn1", PRESETS)
    width = host.token_width(model)
    for number, concept in enumerate(concepts, 1):
        check_conditioning(empty or concept.conditioning, width, f"concept {number}")
    used = tuple(concept for concept in concepts if concept.weight != 0 and any(len(concept.selection(size).indices) for size in concept.sizes))
    report = [f"model: {known.architecture}", f"self-attention: {len(places)} layers, {start:g} to {end:g} of the schedule", f"rule: {rule}; style fidelity {fidelity:g}"]
    for number, concept in enumerate(concepts, 1):
        idle = "" if concept in used else ", no effect"
        report.append(f"concept {number}: weight {concept.weight:g}, latent {concept.size[1]} x {concept.size[0]}{idle}")
    if not used or not places or start == end:
        report.append("no effect: nothing is installed")
        host.log.warning("Palimpsest: MRSA has nothing to show with these concepts and settings, the model is left as it is.")
        return model, Collector("attention shares") if watch else None, "\n".join(report)
    process = model.get_model_object("latent_format").process_in
    source = ConceptSource(
        None, tuple((f"concept {number}", empty or concept.conditioning) for number, concept in enumerate(used, 1)),
        latents=tuple(process(concept.latent) for concept in used), noise=noise, seed=seed, negatives=fidelity < 1.0,
    )
    sampling = model.get_model_object("model_sampling")
    results = Collector("attention shares") if watch else None
    edit = MRSAEdit(
        source=source, bank_device=bank_device, concepts=used, numbers=tuple(number for number, concept in enumerate(concepts) if concept in used), count=len(concepts),
        places=places, fidelity=fidelity, rule=rule, results=results,
        ceiling=math.inf if start <= 0.0 else float(sampling.percent_to_sigma(start)), floor=-math.inf if end >= 1.0 else float(sampling.percent_to_sigma(end)),
    )
    rows = len(used) * (1 if fidelity == 1.0 else 2)
    report.append(f"rows per step: {rows} more than the plain run, one at a time" + ("" if fidelity == 1.0 else f" ({len(used)} of them for the negative half)"))
    return add_edits(model, edit), results, "\n".join(report)
