"""LocalBlend of Prompt-to-Prompt (Hertz et al., ICLR 2023, section 3.2 "local editing"): change the picture only where the words are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attention_patches import host
from ..attention_patches.blocks import Point
from ..attention_patches.collectors import Collector
from ..attention_patches.edit import Attention, Edit, RunInfo, SourceRows
from ..attention_patches.maps import word_maps
from ..attention_patches.pnp import BRANCH
from ..attention_patches.samplers import Solver, sampler_name, solver_of
from ..attention_patches.source import CoevolvingSource
from .edit import P2PEdit, P2PRun, step_of

MAP_HALVINGS = 2  # word maps are read at 1/4 of the latent's sides: 16 x 16 at 512 px
SMALLEST_MAP = 16  # and at fewer halvings where that would be smaller than the published 16 x 16


def map_halvings(latent: tuple[int, int]) -> int:
    """At how many halvings of latents (H, W) word maps are read."""
    halvings = MAP_HALVINGS
    while halvings and min(latent) < SMALLEST_MAP << halvings:
        halvings -= 1
    return halvings


def blend_mask(maps: Tensor, size: tuple[int, int], threshold: float, pool: bool) -> Tensor:
    """Where the words are: [B, 1, H, W] bool from summed maps [B, h, w].

    pool: 3 x 3 maximum first. Then nearest-neighbour resize to the latents' (H, W), division by the maximum, threshold. A map that is
    zero everywhere (no such word) gives no mask.
    """
    maps = maps[:, None].float()
    if pool:
        maps = torch.nn.functional.max_pool2d(maps, 3, 1, 1)
    maps = torch.nn.functional.interpolate(maps, size=size)
    peak = maps.amax((2, 3), keepdim=True)
    return (maps / torch.where(peak > 0, peak, torch.ones_like(peak)) > threshold) & (peak > 0)


def blended(x: Tensor, denoised: Tensor, source_x: Tensor, source_denoised: Tensor, mask: Tensor, ratio: float) -> Tensor:
    """A prediction that makes an Euler step end at  x_source + mask (x_own - x_source).

    All [B, C, H, W]; mask [B, 1, H, W] 0..1; ratio = next sigma / sigma, below 1. With D' = m D + (1 - m) (D_s + r / (1 - r) (x_s - x))
    the step r x + (1 - r) D' equals the published blend of the stepped latents.
    """
    outside = source_denoised + ratio / (1.0 - ratio) * (source_x - x)
    return mask * denoised + (1.0 - mask) * outside


@dataclass(frozen=True, eq=False)
class LocalBlend(Edit):
    """Local blend of one `P2PEdit`.

    target_words [E, T], source_words [S]: 1 for the tokens of the blend words. target_out, source_out: the same for subtracted words, or None.
    thresholds: of the mask and of the subtracted one. start: fraction of the run that stays unblended. pool: see `blend_mask`.
    user_mask: [B, H, W] 0..1 in place of words, or None. results: receives one mask [B, 1, H, W] per step.
    """

    edit: P2PEdit | None = None
    target_words: Tensor | None = None
    source_words: Tensor | None = None
    target_out: Tensor | None = None
    source_out: Tensor | None = None
    thresholds: tuple[float, float] = (0.3, 0.3)
    start: float = 0.2
    pool: bool = True
    user_mask: Tensor | None = None
    results: Collector | None = None

    @property
    def collector(self):
        return self.results

    def check(self, guider: Any, sampler: Any, info: RunInfo) -> None:
        if solver_of(sampler) is not Solver.EULER:
            raise ValueError(f"P2P Local Blend needs a sampler of first order, but the sampler is {sampler_name(sampler)}: choose euler or ddim, or remove the blend.")
        own = self.edit.own_entries(guider)
        if self.user_mask is None and own and all("area" in entry for entry in own):
            raise ValueError(
                "P2P Local Blend reads its words where they are in the whole picture, but the controller's positive is limited to an area: "
                "connect a mask to the blend in place of words."
            )
        if self.user_mask is not None and self.user_mask.shape[0] not in (1, info.latent_shape[0]):
            raise ValueError(
                f"P2P Local Blend got {self.user_mask.shape[0]} masks, but the sampler got {info.latent_shape[0]} latents: "
                "connect one mask for all, or one per latent."
            )

    def takes_part(self, guider: Any) -> bool:
        return self.edit.takes_part(guider)

    def for_run(self, info: RunInfo) -> "LocalBlendRun":
        p2p = self.edit.bound(info)
        halvings = map_halvings(info.latent_shape[-2:])
        maps = frozenset(point for point in p2p.crosses if self.edit.layers.halvings[(point.part, point.number)] == halvings)
        if self.user_mask is not None:
            maps = frozenset()
        levels, size = info.sigmas.detach().cpu(), tuple(info.latent_shape[-2:])
        return LocalBlendRun(source=self.source, bank_device=self.bank_device, blend=self, p2p=p2p, maps=maps, run_levels=levels, size=size)


@dataclass(frozen=True, eq=False)
class LocalBlendRun(Edit):
    """A `LocalBlend` during one run. maps: where word maps are read; run_levels: [n + 1] the run's own noise levels; size: (H, W) of its latents."""

    blend: LocalBlend | None = None
    p2p: P2PRun | None = None
    maps: frozenset[Point] = frozenset()
    run_levels: Tensor | None = None
    size: tuple[int, int] = (0, 0)

    def __post_init__(self):
        # word maps [B, h, w, K] by point, summed over all noise levels so far; and the levels that were seen there
        object.__setattr__(self, "_sums", {})
        object.__setattr__(self, "_seen", set())

    @property
    def collector(self):
        return self.blend.results

    def points(self, sigma: float) -> frozenset[Point]:
        return self.maps

    def replaces(self, point: Point, sigma: float) -> bool:
        return point in self.maps

    def attend(self, point: Point, q: Tensor, k: Tensor, v: Tensor, source: SourceRows, attention: Attention) -> Tensor:
        mine = self.p2p.mine(source)
        place = mine.index(True) if any(mine) else None
        # the first call at a noise level counts: later ones may be disturbed (PAG)
        if place is not None and (source.sigma, point) not in self._seen and source.chunks[place].whole:
            self._seen.add((source.sigma, point))
            maps = self._maps(q.chunk(len(mine))[place], k.chunk(len(mine))[place], place, source, attention)
            self._sums[point] = self._sums[point] + maps if point in self._sums else maps
        return attention.below(q, k, v)

    def _maps(self, q: Tensor, k: Tensor, place: int, source: SourceRows, attention: Attention) -> Tensor:
        """[B, h, w, K]: what the edited map and the source's give to the words, K = (own, source's[, subtracted own, subtracted source's])."""
        blend, batch = self.blend, source.batch
        own_words = torch.stack([words for words in (blend.target_words, blend.target_out) if words is not None], -1).to(q.device, torch.float32)
        source_words = torch.stack([words for words in (blend.source_words, blend.source_out) if words is not None], -1).to(q.device, torch.float32)
        own_words = own_words.expand(batch, -1, -1)
        text = source.context(BRANCH)[:, : source_words.shape[0]]
        source_q, source_k = attention.to_q(source.of(BRANCH, place)), attention.to_k(text)
        mapping, kept = (None if part is None else part.to(q.device, torch.float32) for part in self.p2p.at(source.sigma))
        own = torch.zeros(batch, q.shape[1], own_words.shape[-1], device=q.device)
        if mapping is not None:
            # (A_source P) w = A_source (P w)
            own = own + word_maps(source_q, source_k, mapping.expand(batch, -1, -1) @ own_words, attention.heads)
        if kept is not None or mapping is None:
            share = own_words if kept is None else kept.expand(batch, -1)[..., None] * own_words
            own = own + word_maps(q, k[:, : own_words.shape[1]], share, attention.heads)
        sources = word_maps(source_q, source_k, source_words.expand(batch, -1, -1), attention.heads)
        return torch.cat([own, sources], -1).unflatten(1, source.size)

    def wants_prediction(self, sigma: float) -> bool:
        # int(start T) steps are left out, counted in the run's own steps
        return step_of(sigma, self.run_levels) >= int(self.blend.start * (len(self.run_levels) - 1) + 1e-9)

    def predicted(self, sigma: float, x: Tensor, denoised: Tensor, source) -> Tensor:
        step = step_of(sigma, self.run_levels)
        following = float(self.run_levels[step + 1])
        mask, visited = self._mask(x), source.visit(sigma, following)
        if mask is None or visited is None:
            return denoised
        if self.blend.results is not None:
            self.blend.results.add(step, mask.cpu())
        there, predicted = (part.to(x) for part in visited)
        return blended(x, denoised, there, predicted, mask.to(x), following / sigma)

    def _mask(self, x: Tensor) -> Tensor | None:
        blend = self.blend
        if blend.user_mask is not None:
            mask = torch.nn.functional.interpolate(blend.user_mask[:, None].float(), size=self.size, mode="area")
            return mask.expand(x.shape[0], -1, -1, -1) if mask.shape[0] == 1 else mask
        if not self._sums:
            return None
        own, *rest = torch.stack(list(self._sums.values())).mean(0).unbind(-1)
        groups = 2 if blend.target_out is not None else 1
        sources = rest[groups - 1 :]
        mask = blend_mask(own, self.size, blend.thresholds[0], blend.pool) | blend_mask(sources[0], self.size, blend.thresholds[0], blend.pool)
        if groups == 2:
            mask = mask & ~(blend_mask(rest[0], self.size, blend.thresholds[1], False) | blend_mask(sources[1], self.size, blend.thresholds[1], False))
        return mask.float()


def check_blendable(edits: tuple) -> P2PEdit:
    """The P2P edit among a MODEL's edits that a blend belongs to: the last one. Raises ValueError, one sentence, when there is none."""
    found = [edit for edit in edits if isinstance(edit, P2PEdit)]
    if not found:
        raise ValueError(
            "P2P Local Blend limits the edit of a P2P Controller, but the connected model has none: "
            "connect the controller's MODEL (an edit that changes nothing installs nothing)."
        )
    if isinstance(found[-1].source, CoevolvingSource):
        host.log.info("Palimpsest: the local blend keeps the source running to the last step.")
    return found[-1]
