"""Where the features of a source live during one run."""

from __future__ import annotations

from collections import OrderedDict
from typing import Hashable

import torch

from .blocks import Point
from .rows import Feature

# Solvers of second order come back to a noise level at the next step (heun), none goes further back.
KEEP_SIGMAS = 2


class FeatureStore:
    """Features by (sigma, cut, branch, point), for the last noise levels visited.

    `cut` names a context window of the host, None without one. Freed noise levels are computed again when asked for.
    """

    def __init__(self):
        self._levels: OrderedDict[float, dict[Hashable, dict[tuple[str, Point], Feature]]] = OrderedDict()
        self.device: torch.device | None = None  # None: features stay where they were computed

    def get(self, sigma: float, cut: Hashable = None) -> dict[tuple[str, Point], Feature] | None:
        """All features stored for a noise level, or None if there was no pass for it yet."""
        return self._levels.get(sigma, {}).get(cut)

    def put(self, sigma: float, features: dict[tuple[str, Point], Feature], cut: Hashable = None) -> None:
        """Store the features of one pass; the oldest noise level is dropped when there are more than `KEEP_SIGMAS`."""
        level = self._levels.setdefault(sigma, {})
        self._levels.move_to_end(sigma)
        level[cut] = {key: self._banked(feature) for key, feature in features.items()}
        while len(self._levels) > KEEP_SIGMAS:
            self._levels.popitem(last=False)

    def move(self, device: torch.device) -> None:
        """Keep features on `device` from now on, those stored already included."""
        self.device = device
        for level in self._levels.values():
            for features in level.values():
                features.update({key: self._banked(feature) for key, feature in features.items()})

    def clear(self) -> None:
        self._levels.clear()

    def __len__(self) -> int:
        return len(self._levels)

    def _banked(self, feature: Feature) -> Feature:
        if self.device is None or feature.tensor.device == self.device:
            return feature
        return Feature(feature.tensor.to(self.device), feature.size)


def feature_bytes(features: dict[tuple[str, Point], Feature]) -> int:
    """Memory of the features of one pass, in bytes."""
    return sum(feature.tensor.nelement() * feature.tensor.element_size() for feature in features.values())
