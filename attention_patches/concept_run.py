"""Reference pictures as the source of an edit: each noised anew to the level of the step, and run with a prompt of its own."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import ClassVar, Hashable

import torch
from torch import Tensor

from . import host
from .source import Source
from .source_run import SourceRun, first_usable

FRESH, FIXED = NOISES = ("fresh every step (published)", "fixed")
NEGATIVE = "negative "  # before a branch's name: the same picture run with the sampler's negative prompt


@dataclass(frozen=True, eq=False)
class ConceptSource(Source):
    """Several pictures, each a branch. trajectory: None. latents: per branch [1, C, h, w] in sampler scaling, of any size.

    noise: one of NOISES. seed: of the noise; None for the run's. negatives: also run every picture with the sampler's negative prompt.
    """

    starts: ClassVar[bool] = False
    together: ClassVar[bool] = False  # a concept whose prompt is switched off leaves the others as they are
    latents: tuple[Tensor, ...] = ()
    noise: str = FRESH
    seed: int | None = None
    negatives: bool = False

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "key", (*self.key, tuple(map(id, self.latents)), self.noise, self.seed, self.negatives))

    def check_run(self, shape: tuple[int, ...], sampler) -> None:
        """Pictures of any size go with a run of any size; that they are latents of the model's kind is known before."""


def noise_like(latent: Tensor, seed: int, branch: int, sigma: float | None) -> Tensor:
    """Unit noise of a picture at a step, from a generator of its own: the host's generators are left as they are.

    Depends on the run's seed, the picture's place and, unless sigma is None, the noise level; never on what ran before.
    """
    digest = hashlib.blake2b(struct.pack("<QIf", seed & (2**64 - 1), branch, -1.0 if sigma is None else sigma), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(latent.shape, generator=generator, dtype=torch.float32)


class ConceptRun(SourceRun):
    """The reference pictures of one run: x = z + sigma e at each noise level, with e drawn anew or once."""

    windowed = False  # a reference is seen as a whole, whatever part of a long picture the run is at
    inactive = "a concept's prompt is switched off at some steps (start and end percent): the concept is not seen there"

    def __init__(self, source: ConceptSource, bank_device, counters, once, guider):
        super().__init__(source, bank_device, counters, once)
        self._guider = guider
        self._seed = 0

    def prepare(self, model, noise: Tensor, seed: int | None, latent_image: Tensor | None = None, denoise_mask: Tensor | None = None) -> None:
        """Process every reference's conditioning for its own picture. latent_image, denoise_mask: the run's, which say nothing about a reference."""
        self._seed = self.source.seed if self.source.seed is not None else int(seed or 0)
        negatives = self._guider.conds.get("negative") or [] if self.source.negatives else []
        for (name, conditioning), latent in zip(self.source.branches, self.source.latents):
            clean = latent.to(noise.device)
            own = self.branches[name] = host.process_alone(conditioning, model, torch.zeros_like(clean), noise.device, latent_image=clean, seed=seed)
            if negatives:
                self.branches[NEGATIVE + name] = [host.elsewhere(entry, own[0]) for entry in negatives]

    def cut(self, sigma: float, window) -> Hashable:
        # a pass with the negative prompt also serves later calls at its level that hold none (PAG)
        asked = self.source.negatives and "negative" in self.roles
        return NEGATIVE if asked or self.store.get(sigma, NEGATIVE) is not None else None

    def due(self, sigma: float) -> list[tuple[str, list[dict]]]:
        found = []
        for name, entries in self.branches.items():
            if name.startswith(NEGATIVE):
                # not where the call holds no negative (cfg 1), nor for a concept that the positive half does not see
                if "negative" not in self.roles or first_usable(self.branches[name.removeprefix(NEGATIVE)], sigma) is None:
                    continue
                if first_usable(entries, sigma) is None:
                    self.once("negative", "the negative prompt has no entry for the whole picture at some steps: its half does not see the concepts there")
                    continue
            found.append((name, entries))
        return found

    def close(self) -> None:
        # the negative's entries belong to the run
        self.branches = {name: entries for name, entries in self.branches.items() if not name.startswith(NEGATIVE)}
        super().close()

    def latents_of(self, branch: str, sigma: float) -> Tensor:
        place = [name for name, _ in self.source.branches].index(branch.removeprefix(NEGATIVE))
        latent = self.source.latents[place]
        # both halves of guidance see the same noise, as in the published code
        return latent + sigma * noise_like(latent, self._seed, place, sigma if self.source.noise == FRESH else None)
