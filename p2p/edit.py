"""Prompt-to-Prompt (Hertz et al., ICLR 2023) as an edit of a MODEL: rewrites of q, k and v, no attention map is made.

At a step, every cross-attention of the edited prompt's rows becomes  A_source (P V) + A_own (diag(o) V)  with the alignment's
P [S, T] and o [T] (`plan.AlignmentPlan.step`), and small self-attentions take the source's map while their window lasts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attention_patches import host
from ..attention_patches.blocks import Point, UNetLayers
from ..attention_patches.edit import Attention, Edit, RunInfo, SourceRows
from ..attention_patches.pnp import BRANCH
from ..attention_patches.rows import LayoutMismatch
from ..attention_patches.source import CoevolvingSource

SMALLEST_SIDE = 8  # self-attention of maps up to 8 x 8 is always small


def step_of(sigma: float, levels: Tensor) -> int:
    """The step that a call at a noise level belongs to: i while levels[i] >= sigma > levels[i + 1]. levels: [T + 1] descending."""
    steps = len(levels) - 1
    reached = int((levels[:steps] >= sigma * (1 - host.SAME_SIGMA)).sum())
    return min(max(reached - 1, 0), steps - 1)


def small_self_points(layers: UNetLayers, latent: tuple[int, int], share: float) -> tuple[frozenset[Point], tuple[int, int]]:
    """Self-attentions with maps no larger than a share of the latent's sides (H, W), and that limit (h, w).

    share: 1/4 is the published "stable" choice (16 x 16 at 512 px), 1/2 that of null-text. The limit counts tokens, inclusive, and never
    falls below 8 x 8.
    """
    limit = tuple(max(math.ceil(side * share), min(SMALLEST_SIDE, side)) for side in latent)
    tokens = max(limit[0] * limit[1], SMALLEST_SIDE**2)
    fitting = frozenset(point for point in layers.points("attn1") if math.prod(layers.size((point.part, point.number), latent)) <= tokens)
    return fitting, limit


def repeated(tokens: Tensor, length: int) -> Tensor:
    """[B, M, C] -> [B, length, C], the tokens over and over: attention over keys and values repeated together is the same."""
    if length % tokens.shape[1]:
        raise LayoutMismatch(f"{tokens.shape[1]} text tokens do not fit into {length}")
    return tokens.repeat(1, length // tokens.shape[1], 1)


@dataclass(frozen=True, eq=False)
class P2PEdit(Edit):
    """One source prompt and one or several edit prompts. plans: an AlignmentPlan each; mark: on their CONDITIONING.

    layers: of the model. self_share: see `small_self_points`. schedule: [K] ascending noise levels of the trajectory, None for those
    of the run.
    """

    plans: tuple = ()
    mark: str = ""
    layers: UNetLayers | None = None
    self_share: float = 0.25
    schedule: Tensor | None = None

    def check(self, guider: Any, sampler: Any, info: RunInfo) -> None:
        count, latents = len(self.plans), info.latent_shape[0]
        if count not in (1, latents):
            raise ValueError(f"The P2P Controller holds {count} edit prompts, but the sampler got {latents} latents: give it one latent per edit prompt.")
        own = self.own_entries(guider)
        if not own:
            if any(entry.get(host.MARK) for entry in guider.conds.get("positive", [])):
                host.log.info("Palimpsest: the edit prompt of one P2P Controller is not among the sampler's positive conditioning, so that edit is idle.")
                return
            raise ValueError(
                "The sampler's positive conditioning does not come from the P2P Controller: connect the controller's positive (through ControlNet "
                "or area nodes if you like), because the edit follows its words."
            )
        expected = self.plans[0].target.length
        for entry in own:
            tokens = entry.get("cross_attn")
            if tokens is not None and tokens.shape[1] != expected:
                raise ValueError(
                    f"The positive conditioning has {tokens.shape[1]} text tokens, but the edit prompt has {expected}: "
                    "connect the controller's positive without joining other prompts to it."
                )

        self._check_layers(info)
        if self.schedule is not None and not all(bool(((self.schedule / level - 1.0).abs() <= host.SAME_SIGMA).any()) for level in info.sigmas[:-1].cpu() if level > 0):
            host.log.info(
                "Palimpsest: the sampler visits other noise levels than the trajectory has: the source is interpolated, "
                "it is exact on the trajectory's own steps and scheduler."
            )

    def _check_layers(self, info: RunInfo) -> None:
        run = self.bound(info)
        steps = len(run.levels) - 1
        if not run.small and any(plan.self_active(step, steps) for plan in self.plans for step in range(steps)):
            height, width = info.latent_shape[-2:]
            smallest = min((self.layers.size((point.part, point.number), (height, width)) for point in self.layers.points("attn1")), key=math.prod)
            raise ValueError(
                f"The self-attention window is open, but the smallest map of this model at this size is {smallest[0]} x {smallest[1]}: "
                f"raise self_limit to {max(smallest[0] / height, smallest[1] / width):g} or more, or set self_end to 0."
            )

    def own_entries(self, guider: Any) -> list[dict]:
        """The run's positive conditioning that came from this edit's node."""
        return [entry for entry in guider.conds.get("positive", []) if entry.get(host.MARK) == self.mark]

    def takes_part(self, guider: Any) -> bool:
        return bool(self.own_entries(guider))

    @property
    def one_picture(self) -> bool:
        return len(self.plans) > 1 and isinstance(self.source, CoevolvingSource)

    def for_run(self, info: RunInfo) -> "P2PRun":
        run = self.bound(info)
        limit = small_self_points(self.layers, info.latent_shape[-2:], self.self_share)[1]
        host.log.info("Palimpsest: P2P edits %d cross-attentions and the %d self-attentions of maps up to %d x %d.", len(run.crosses), len(run.small), *limit)
        return run

    def bound(self, info: RunInfo) -> "P2PRun":
        """The edit with a run's noise levels and latent size."""
        levels = info.sigmas.detach().cpu() if self.schedule is None else self.schedule.flip(0)
        small, _ = small_self_points(self.layers, info.latent_shape[-2:], self.self_share)
        return P2PRun(source=self.source, bank_device=self.bank_device, edit=self, levels=levels, small=small, crosses=self.layers.points("attn2"))


@dataclass(frozen=True, eq=False)
class P2PRun(Edit):
    """A `P2PEdit` during one run. levels: [T + 1] descending noise levels that the windows are counted in."""

    edit: P2PEdit | None = None
    levels: Tensor | None = None
    small: frozenset[Point] = frozenset()
    crosses: frozenset[Point] = frozenset()

    def __post_init__(self):
        object.__setattr__(self, "_steps", {})

    def at(self, sigma: float) -> tuple[Tensor | None, Tensor | None]:
        """(P [E, S, T], o [E, T]) of all edit prompts at a noise level; None for all zero; (None, None) where nothing is edited."""
        step, steps = step_of(sigma, self.levels), len(self.levels) - 1
        if step not in self._steps:
            self._steps[step] = _stacked([plan.step(step, steps) for plan in self.edit.plans], self.edit.plans)
        return self._steps[step]

    def edits_words(self, sigma: float) -> bool:
        """Whether cross-attentions are edited at a noise level."""
        return any(part is not None for part in self.at(sigma))

    def self_active(self, sigma: float) -> bool:
        """Whether the self-attention window is open."""
        return any(plan.self_active(step_of(sigma, self.levels), len(self.levels) - 1) for plan in self.edit.plans)

    def points(self, sigma: float) -> frozenset[Point]:
        crossing = self.crosses if self.edits_words(sigma) else frozenset()
        return crossing | self.small if self.self_active(sigma) else crossing

    def mine(self, source: SourceRows) -> list[bool]:
        """Per chunk of a call, whether it is the edited prompt's."""
        return [chunk.role == "positive" and chunk.mark == self.edit.mark for chunk in source.chunks]

    def attention(self, point: Point, n: Tensor, context: Tensor, value: Tensor, source: SourceRows) -> tuple[Tensor, Tensor, Tensor]:
        mine = self.mine(source)
        if not any(mine):
            return n, context, value
        if point.kind == "attn1":
            # A_source V: q and k are the source's, but for prompts of the batch that leave self-attention alone
            step, steps = step_of(source.sigma, self.levels), len(self.levels) - 1
            active = torch.tensor([plan.self_active(step, steps) for plan in self.edit.plans], device=n.device)[:, None, None]
            chunks = ([torch.where(active, source.of(BRANCH, i), rows) if own else rows for i, (own, rows) in enumerate(zip(mine, x.chunk(len(mine))))] for x in (n, context))
            return *(torch.cat(rows) for rows in chunks), value
        mapping, kept = self.at(source.sigma)
        if (mapping is None) == (kept is None):
            return n, context, value  # nothing, or two maps: see attend
        if mapping is None:
            kept = kept.to(value)[..., None]
            scaled = [repeated(kept.expand(source.batch, -1, -1), rows.shape[1]) * rows if own else rows for own, rows in zip(mine, value.chunk(len(mine)))]
            return n, context, torch.cat(scaled)
        return self._swap(mapping.to(value), n, context, value, source, mine)

    def _swap(self, mapping: Tensor, n: Tensor, context: Tensor, value: Tensor, source: SourceRows, mine: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        """A_source (P V), on inputs: q and k from the source, v := P v."""
        source_text = source.context(BRANCH)[:, : mapping.shape[1]]
        # all rows of a call share one number of keys
        length = math.lcm(context.shape[1], source_text.shape[1])
        out: tuple[list, list, list] = ([], [], [])
        for i, (own, q, k, v) in enumerate(zip(mine, *(x.chunk(len(mine)) for x in (n, context, value)))):
            if own:
                q, k, v = source.of(BRANCH, i), source_text, _mapped(mapping, v)
            for rows, tokens in zip(out, (q, repeated(k, length), repeated(v, length))):
                rows.append(tokens)
        return tuple(torch.cat(rows) for rows in out)

    def replaces(self, point: Point, sigma: float) -> bool:
        mapping, kept = self.at(sigma) if point.kind == "attn2" else (None, None)
        return mapping is not None and kept is not None

    def attend(self, point: Point, q: Tensor, k: Tensor, v: Tensor, source: SourceRows, attention: Attention) -> Tensor:
        """A_source (P V) + A_own (diag(o) V): to_v has no bias, so both act on projected values too."""
        mine = self.mine(source)
        if not any(mine):
            return attention.below(q, k, v)
        mapping, kept = (x.to(v) for x in self.at(source.sigma))
        kept = kept[..., None].expand(source.batch, -1, -1)
        values = v.chunk(len(mine))
        own = attention.below(q, k, torch.cat([repeated(kept, rows.shape[1]) * rows if edited else rows for edited, rows in zip(mine, values)]))
        keys = attention.to_k(source.context(BRANCH)[:, : mapping.shape[1]])
        out = list(own.chunk(len(mine)))
        for i, edited in enumerate(mine):
            if edited:
                out[i] = out[i] + attention.plain(attention.to_q(source.of(BRANCH, i)), keys, _mapped(mapping, values[i]))
        return torch.cat(out)


def _mapped(mapping: Tensor, value: Tensor) -> Tensor:
    """P V for the first copy of the own tokens. mapping: [E, S, T], value: [B, T or a multiple, C], E is 1 or B. Returns [B, S, C]."""
    if value.shape[1] % mapping.shape[2]:
        raise LayoutMismatch(f"the call has {value.shape[1]} text tokens, the edit prompt {mapping.shape[2]}")
    return torch.einsum("est,etc->esc", mapping.expand(value.shape[0], -1, -1), value[:, : mapping.shape[2]])


def _stacked(parts: list[tuple[Tensor | None, Tensor | None]], plans: tuple) -> tuple[Tensor | None, Tensor | None]:
    """The steps of several plans as one: (P [E, S, T] or None, o [E, T] or None)."""
    if all(mapping is None and kept is None for mapping, kept in parts):
        return None, None
    mappings, keeps = [], []
    for (mapping, kept), plan in zip(parts, plans):
        idle = mapping is None and kept is None
        mappings.append(torch.zeros(plan.source.length, plan.target.length) if mapping is None else mapping)
        keeps.append((torch.ones if idle else torch.zeros)(plan.target.length) if kept is None else kept)
    mapping, kept = torch.stack(mappings), torch.stack(keeps)
    if not bool(mapping.any()):
        return None, kept
    return mapping, kept if bool(kept.any()) else None
