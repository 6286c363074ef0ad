"""Attention maps as a product: what a picture's places give to words. Made only where and when somebody asks for them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .blocks import Point
from .collectors import Collector
from .edit import Attention, Edit, RunInfo, SourceRows
from .pnp import in_window

QUERIES_AT_ONCE = 1024  # explicit maps of 8 heads and 77 tokens then take 2.5 MB per row


def word_maps(q: Tensor, k: Tensor, words: Tensor, heads: int) -> Tensor:
    """Attention that each query gives to groups of words, averaged over heads: [B, N, K] float32.

    q: [B, N, heads * dim], k: [B, M, heads * dim]; words: [B, M, K] weights of the tokens. Softmax in float32 (SD2 overflows
    in half).
    """
    q, k = (x.unflatten(-1, (heads, -1)).transpose(1, 2).float() for x in (q, k))
    k, words = k.transpose(-1, -2) * q.shape[-1] ** -0.5, words[:, None].float()
    parts = [(torch.softmax(part @ k, dim=-1) @ words).mean(1) for part in q.split(QUERIES_AT_ONCE, dim=2)]
    return torch.cat(parts, dim=1)


@dataclass(frozen=True, eq=False)
class CollectMaps(Edit):
    """Notes, per layer, the maps of groups of words in the positive prompt, summed over the steps of a window. Changes nothing.

    places: "attn2" points. words: [T, K], 1 for the tokens of each group. ceiling, floor: noise levels between which maps are noted (the floor excluded).
    results: receives under each point (maps [B, h, w, K] summed, number of steps).
    """

    places: frozenset[Point] = frozenset()
    words: Tensor | None = None
    ceiling: float = math.inf
    floor: float = -math.inf
    results: Collector | None = None

    @property
    def collector(self):
        return self.results

    def points(self, sigma: float) -> frozenset[Point]:
        return self.places if sigma <= self.ceiling and in_window(sigma, self.floor) else frozenset()

    def replaces(self, point: Point, sigma: float) -> bool:
        return True

    def attend(self, point: Point, q: Tensor, k: Tensor, v: Tensor, source: SourceRows, attention: Attention) -> Tensor:
        place = next((i for i, chunk in enumerate(source.chunks) if chunk.role == "positive" and chunk.whole), None)
        total, steps, last = self.results.get(point, (0.0, 0, None))
        # one map per noise level: further calls at it (PAG, heun) do not count
        if place is not None and last != source.sigma and k.shape[1] % len(self.words) == 0:
            rows, keys = q.chunk(len(source.chunks))[place], k.chunk(len(source.chunks))[place]
            words = self.words.to(q.device).expand(rows.shape[0], -1, -1)
            maps = word_maps(rows, keys[:, : len(self.words)], words, attention.heads).unflatten(1, source.size)
            self.results.add(point, (total + maps.cpu(), steps + 1, source.sigma))
        return attention.below(q, k, v)


@dataclass(frozen=True, eq=False)
class CollectFeatures(Edit):
    """Notes the features of points in the positive prompt's rows at the last step of a window. Changes nothing.

    places: "resblock" or "attn1" points. results: receives under each point the features [B, C, h, w] float32.
    """

    places: frozenset[Point] = frozenset()
    ceiling: float = math.inf
    floor: float = -math.inf
    results: Collector | None = None

    @property
    def collector(self):
        return self.results

    def points(self, sigma: float) -> frozenset[Point]:
        return self.places if sigma <= self.ceiling and in_window(sigma, self.floor) else frozenset()

    def __post_init__(self):
        object.__setattr__(self, "_seen", set())

    def for_run(self, info: RunInfo) -> "CollectFeatures":
        return replace(self)

    def _note(self, point: Point, features: Tensor, source: SourceRows) -> None:
        place = next((i for i, chunk in enumerate(source.chunks) if chunk.role == "positive" and chunk.whole), None)
        # further calls at a noise level (PAG) may be disturbed
        if place is not None and (source.sigma, point) not in self._seen:
            self._seen.add((source.sigma, point))
            self.results.add(point, features.chunk(len(source.chunks))[place].detach().to("cpu", torch.float32, copy=True))

    def attention(self, point: Point, n: Tensor, context: Tensor, value: Tensor, source: SourceRows) -> tuple[Tensor, Tensor, Tensor]:
        self._note(point, n.movedim(-1, 1).unflatten(-1, source.size), source)
        return n, context, value

    def resblock(self, point: Point, h: Tensor, source: SourceRows) -> Tensor:
        self._note(point, h, source)
        return h


def average_maps(collected: dict) -> Tensor:
    """One map per picture and word [B, K, H, W] from what `CollectMaps` noted: mean over steps and layers, at the size of the largest."""
    means = [(total / steps).movedim(-1, 1) for total, steps, _ in collected.values()]
    size = max((tuple(mean.shape[-2:]) for mean in means), key=math.prod)
    return torch.stack([torch.nn.functional.interpolate(mean, size=size, mode="bilinear", align_corners=False) for mean in means]).mean(0)


def principal_components(features: Tensor, count: int = 3) -> Tensor:
    """First principal components of features [B, C, h, w], over all their places: [B, h, w, count], each in 0..1.

    Plug-and-Play (Tumanyan et al., CVPR 2023, figure 3): similar places of all pictures get similar colours. Signs are fixed so that the largest loading
    is positive; a component without variance is 0.5.
    """
    places = features.movedim(1, -1).flatten(0, -2).double()
    centred = places - places.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    vectors = vectors.flip(-1)[:, :count]
    vectors = vectors * torch.sign(vectors.gather(0, vectors.abs().argmax(0, keepdim=True)))
    found = centred @ vectors
    if found.shape[-1] < count:
        found = torch.nn.functional.pad(found, (0, count - found.shape[-1]))
    low, high = found.amin(0), found.amax(0)
    # float32 features carry rounding of about 1e-7
    flat = high - low <= 1e-5 * values.clamp(min=0).max().sqrt().clamp(min=1e-12)
    scaled = torch.where(flat, torch.full_like(found, 0.5), (found - low) / torch.where(flat, torch.ones_like(low), high - low))
    return scaled.float().unflatten(0, (features.shape[0], *features.shape[-2:]))
