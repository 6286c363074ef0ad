"""What an edit is: the base class that every method derives from, and what it is given to work with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Protocol

from torch import Tensor

from .blocks import Point
from .rows import Feature
from .source import Source


@dataclass(frozen=True)
class RunInfo:
    """What is known when a run starts. sigmas: [n + 1] descending, of this run; latent_shape: [B, C, H, W]."""

    sigmas: Tensor
    latent_shape: tuple[int, ...]


@dataclass(frozen=True)
class Chunk:
    """One piece of conditioning in a UNet call: its rows hold all latents of the batch.

    role: name of its list ("positive", "negative", "middle", ...), None where nothing says it. mark: what a node of ours
    wrote on the conditioning (host.MARK), or None. whole: it shows the whole picture and not an area of it.
    """

    role: str | None
    mark: str | None
    whole: bool


@dataclass(frozen=True)
class SourceRows:
    """The source's features of one point, ready to be asked for in the rows of the current UNet call.

    get(branch) -> Tensor: features of that branch, one row per row of the call, in the call's dtype and on its device.
    of(branch, i) -> Tensor: the same for the rows of chunk i alone. stored(branch) -> Feature: as the source's rows gave them, of any
    size. context(branch) -> Tensor: the text tokens [batch, S, D] that the branch was run with. chunks: the pieces of the call, in the order of its rows. batch: rows of each.
    sigma: the noise level. size: (H, W) of the point's map.
    """

    get: Callable[[str], Tensor]
    of: Callable[[str, int], Tensor]
    stored: Callable[[str], Feature]
    context: Callable[[str], Tensor]
    chunks: tuple[Chunk, ...]
    batch: int
    sigma: float
    size: tuple[int, int]


class Attention(Protocol):
    """The attention that an edit stands in for (see `Edit.attend`). Tensors are [rows, tokens, heads * dim], projected."""

    heads: int
    alone: bool  # nothing else stands in for it: `below` is `plain`

    def below(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What would run without this edit: replacements of other nodes, else the host's attention. Rows: those of the call."""

    def plain(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The host's attention, for any number of rows and any size of heads."""

    def to_q(self, x: Tensor) -> Tensor:
        """Projection of query inputs."""

    def to_k(self, x: Tensor) -> Tensor:
        """Projection of key inputs."""

    def to_v(self, x: Tensor) -> Tensor:
        """Projection of value inputs."""


class Visit(Protocol):
    """Where the source is at the current step. See `Edit.predicted`."""

    def visit(self, sigma: float, following: float) -> tuple[Tensor, Tensor] | None:
        """(x, denoised) of the source [B, C, H, W] at `sigma`, such that one Euler step to `following` stays on its path; None if it was not run there."""


@dataclass(frozen=True, eq=False)
class Edit:
    """An immutable edit of the UNet. Subclasses are frozen dataclasses and override what they need.

    Nothing of a run may be kept on an edit: it is shared by all clones of a MODEL. What a run needs to remember belongs to
    the object that `for_run` returns. Features come in through `SourceRows`; results meant for other nodes go to a `Collector`.
    """

    source: Source | None = None
    bank_device: str = "auto"  # where features wait between the two passes: "auto", "gpu" or "cpu"

    def check(self, guider: Any, sampler: Any, info: RunInfo) -> None:
        """Raises ValueError, one sentence, when this run cannot be edited. Called before anything is loaded.

        guider.conds: the run's conditioning, converted and not yet processed, by name.
        """

    def takes_part(self, guider: Any) -> bool:
        """Whether this run is one that the edit is meant for; without it, it costs nothing. guider: as for `check`, or with conditioning processed."""
        return True

    @property
    def one_picture(self) -> bool:
        """Whether all latents of a batch are edits of one generated picture and have to start from one noise."""
        return False

    def for_run(self, info: RunInfo) -> "Edit":
        """The edit as it takes part in one run: itself, or an object of its own that may remember things of the run."""
        return self

    def points(self, sigma: float) -> frozenset[Point]:
        """Points this edit reads or rewrites at this noise level, empty when it does nothing there.

        With a source, it is run up to the last of them first, and they are left alone where it gave no features.
        """
        return frozenset()

    def attention(self, point: Point, n: Tensor, context: Tensor, value: Tensor, source: SourceRows) -> tuple[Tensor, Tensor, Tensor]:
        """New inputs of (q, k, v) for an attention, each [rows, tokens, C]. Called only at own points.

        For "attn2" points context and value are the text tokens.
        """
        return n, context, value

    def replaces(self, point: Point, sigma: float) -> bool:
        """Whether `attend` is to be asked at this point and noise level. Costs nothing elsewhere."""
        return False

    def attend(self, point: Point, q: Tensor, k: Tensor, v: Tensor, source: SourceRows, attention: Attention) -> Tensor:
        """Output of an attention before its output projection, [rows, tokens, heads * dim]; for what no rewrite of inputs can say."""
        return attention.below(q, k, v)

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

    def wants_prediction(self, sigma: float) -> bool:
        """Whether `predicted` is to be asked at this noise level."""
        return False

    def predicted(self, sigma: float, x: Tensor, denoised: Tensor, source: Visit | None) -> Tensor:
        """New guided prediction [B, C, H, W] of a step that starts from x at `sigma`."""
        return denoised

    @property
    def collector(self):
        """A `Collector` that hears when a run starts and ends, or None."""
        return None
