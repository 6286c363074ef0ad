"""What an edit is: the base class that every method of this folder derives from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

from torch import Tensor

from .blocks import Point
from .source import Source


@dataclass(frozen=True)
class SourceRows:
    """The source's features of one point, ready to be asked for in the rows of the current UNet call.

    get(branch) -> Tensor: features of that branch, one row per row of the call, in the call's dtype and on its device.
    roles: name of each chunk ("positive", "negative", "middle", ...), None where nothing says it.
    """

    get: Callable[[str], Tensor]
    roles: tuple[str | None, ...]


@dataclass(frozen=True, eq=False)
class Edit:
    """An immutable edit of the UNet. Subclasses are frozen dataclasses and override what they need.

    Nothing of a run may be kept on an edit: it is shared by all clones of a MODEL. Features come in through
    `SourceRows`; results meant for other nodes go to a `Collector`.
    """

    source: Source | None = None
    bank_device: str = "auto"  # where features wait between the two passes: "auto", "gpu" or "cpu"

    def points(self, sigma: float) -> frozenset[Point]:
        """Points this edit reads or rewrites at this noise level, empty when it does nothing there.

        With a source, it is run up to the last of them first, and they are left alone where it gave no features.
        """
        return frozenset()

    def attention(self, point: Point, n: Tensor, context: Tensor, value: Tensor, source: SourceRows) -> tuple[Tensor, Tensor, Tensor]:
        """New inputs of (q, k, v) for a self-attention, each [rows, tokens, C]. Called only at own points."""
        return n, context, value

    def resblock(self, point: Point, h: Tensor, source: SourceRows) -> Tensor:
        """New residual branch [rows, C, H, W] of a ResBlock. Called only at own points."""
        return h

    def extra_conditioning(self) -> list | None:
        """CONDITIONING that this edit runs beside the user's in some calls, or None."""
        return None

    def wants_extra(self, role: str, sigma: float) -> bool:
        """Whether the prediction of branch `role` is to be combined with that of `extra_conditioning` at this noise level."""
        return False

    def combine(self, role: str, sigma: float, own: Tensor, extra: Tensor) -> Tensor:
        """New prediction (denoised latents [B, C, H, W]) of branch `role` from its own and the extra one."""
        return own

    @property
    def collector(self):
        """A `Collector` that hears when a run starts and ends, or None."""
        return None
