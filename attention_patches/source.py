"""The source of an edit: where reference features come from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, ClassVar, Hashable

import torch
from torch import Tensor

from . import samplers


def conditioning_key(conditioning: list) -> Hashable:
    """Equal for CONDITIONING of the same tokens and options, whichever nodes made it: two nodes often encode one prompt."""

    def key(value: Any) -> Hashable:
        if isinstance(value, Tensor):
            data = value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()
            return (tuple(value.shape), hashlib.blake2b(data, digest_size=16).digest())
        return value if isinstance(value, (str, int, float, bool, type(None))) else id(value)

    return tuple((key(tokens), tuple(sorted((name, key(value)) for name, value in extra.items() if value is not None))) for tokens, extra in conditioning)


@dataclass(frozen=True, eq=False)
class Source:
    """A latent path and the conditioning it is run with, one or several branches.

    trajectory: an object with `.sigmas` [K] ascending, `.latents` [K, B, C, H, W] and `.at(sigma)` -> [B, C, H, W], all
    in sampler scaling (see inversion.trajectory.Trajectory). branches: (name, host CONDITIONING) pairs; each is run
    alone, in a call of its own. Two edits whose sources have the same `key` share one reference pass.
    """

    trajectory: Any
    branches: tuple[tuple[str, list], ...]
    key: Hashable = field(init=False)
    starts: ClassVar[bool] = True  # a run may start from its noise
    together: ClassVar[bool] = True  # an edit needs all branches; else it acts wherever one of them has features

    def __post_init__(self):
        object.__setattr__(self, "key", (id(self.trajectory), tuple((name, conditioning_key(conditioning)) for name, conditioning in self.branches)))

    @property
    def rows(self) -> int:
        """Latents in the source's batch."""
        return int(self.trajectory.latents.shape[1])

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, H, W) of the source's latents."""
        return tuple(int(n) for n in self.trajectory.latents.shape[2:])

    def check_run(self, shape: tuple[int, ...], sampler) -> None:
        """Raises ValueError, one sentence, when a run of latents [B, C, H, W] with this sampler object cannot have this source."""
        check_latent(self, shape)


@dataclass(frozen=True, eq=False)
class CoevolvingSource(Source):
    """A source that starts where the user's run starts and is generated beside it, by the same guider with another positive prompt.

    trajectory: None. branches: one (name, host CONDITIONING) pair: what takes the place of the positive prompt. inherits: it takes over
    ControlNet, ranges, in-painting channels and hooks from the positive prompt, because only its words are another's.
    """

    starts: ClassVar[bool] = False
    inherits: bool = True

    def check_run(self, shape: tuple[int, ...], sampler) -> None:
        samplers.check_deterministic(sampler)


def check_conditioning(conditioning: list, width: int | None, what: str) -> None:
    """Raises ValueError, one sentence, when CONDITIONING cannot be run alone as the source of an edit.

    width: channels of a text token the model expects (768 for SD1.x), None when unknown. what: the input's name.
    """
    if not conditioning:
        raise ValueError(f"The {what} conditioning is empty: connect a CLIP Text Encode (its text may be empty).")
    if all("area" in extra or "mask" in extra for _, extra in conditioning):
        raise ValueError(f"Every entry of the {what} conditioning is limited to an area or a mask, but the source is run as a whole picture: connect one without area and mask.")
    if any("hooks" in extra for _, extra in conditioning):
        raise ValueError(f"The {what} conditioning carries hooks (a LoRA or weights of its own), but the source is run without them: connect the prompt before the hook node.")
    for tokens, _ in conditioning:
        found = None if tokens is None else int(tokens.shape[-1])
        if width is not None and found is not None and found != width:
            raise ValueError(f"The {what} conditioning has {found} values per token, but the connected model wants {width}: encode it with the CLIP of the same checkpoint.")


def check_latent(source: Source, shape: tuple[int, ...]) -> None:
    """Raises ValueError, one sentence, when a latent batch of `shape` [B, C, H, W] cannot take the source's features."""
    channels, height, width = source.latent_shape
    if tuple(shape[1:]) != (channels, height, width):
        # the host's latent is 1/8 of the picture; people know the size of their picture
        found = "x".join(str(n) for n in shape[1:])
        raise ValueError(
            f"The trajectory was made from a latent of {channels}x{height}x{width} (channels, height, width), but the sampler got {found}: "
            "start from the LATENT of the node that got the trajectory, or invert a picture of the new size."
        )
    if source.rows not in (1, shape[0]):
        raise ValueError(
            f"The trajectory holds {source.rows} pictures, but the sampler got {shape[0]} latents: use one picture for all, or as many latents as pictures."
        )
