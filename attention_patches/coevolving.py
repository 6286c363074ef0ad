"""A source that is generated beside the user's run: same start, same guider, another positive prompt."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from . import host
from .blocks import Point
from .rows import Feature
from .source_run import SourceRun


class CoevolvingRun(SourceRun):
    """The source of one run as an ordinary generation of its own, advanced by Euler steps from noise level to noise level.

    Its prediction comes from a copy of the run's guider in whose conditioning the source stands for the positive prompt, so
    guidance scale, guidance patches and negative prompt are the run's. With euler it equals that generation bit for bit.
    """

    stops = False

    def __init__(self, source, bank_device, counters, once, guider, sigmas: Tensor):
        super().__init__(source, bank_device, counters, once)
        self._guider = guider
        self._sigmas = sigmas
        # of in-painting: (mask, noise, latent_image), all of the run
        self._given: tuple[Tensor, Tensor, Tensor] | None = None
        # by noise level: (sigma, x, denoised), between the sampler's steps; and (x, denoised) as the model saw and gave them
        self._path: dict[float, tuple[Tensor, Tensor, Tensor]] = {}
        self._seen: dict[float, tuple[Tensor, Tensor]] = {}

    def prepare(self, model, noise: Tensor, seed: int | None, latent_image: Tensor | None = None, denoise_mask: Tensor | None = None) -> None:
        if denoise_mask is not None and latent_image is not None:
            self._given = (denoise_mask, noise, latent_image)
        clean = torch.zeros_like(noise) if latent_image is None else latent_image
        for name, conditioning in self.source.branches:
            entries = host.process_alone(conditioning, model, noise, noise.device, latent_image=clean, denoise_mask=denoise_mask, seed=seed)
            own = next((entry for entry in self._guider.conds.get("positive", []) if host.MARK in entry), None)
            self.branches[name] = [host.reworded(own, entry) for entry in entries] if own is not None and self.source.inherits else entries

    def visit(self, sigma: float, following: float) -> tuple[Tensor, Tensor] | None:
        return self._seen.get(sigma)

    def close(self) -> None:
        super().close()
        self._path, self._seen = {}, {}

    def _run_pass(self, executor, model, sigma, x, timestep, model_options, window) -> dict[tuple[str, Point], Feature]:
        if window is not None:
            self.once("window", "a source without trajectory cannot follow context windows: nothing is injected there, connect a TRAJECTORY from DDIM Invert", warn=True)
            return {}
        latents = self._advanced(sigma, x, timestep[0])
        mask = self._mask(timestep, model_options)
        seen = latents if mask is None else mask * latents + (1.0 - mask) * self._noised(model, x, timestep)
        ((name, entries),) = self.branches.items()
        shadow = copy.copy(self._guider)
        shadow.conds = {**self._guider.conds, "positive": entries}

        def run(options):
            # no run state in there: our own wrappers leave this call alone
            options["transformer_options"].pop(host.KEY, None)
            denoised = shadow.predict_noise(seen, timestep, model_options=options)
            self._seen[sigma] = (seen, denoised)
            self._path[sigma] = (timestep[0], latents, denoised if mask is None else mask * denoised + (1.0 - mask) * self._given[2])

        entry = self.usable_entry(entries, sigma) if self._wanted else None
        taken = self.capture(entry, seen, model_options, run)
        return {(name, point): feature for point, feature in taken.items()}

    def _mask(self, timestep: Tensor, model_options: dict) -> Tensor | None:
        """Where the run paints at this noise level, as the host's KSamplerX0Inpaint finds it; None for everywhere."""
        if self._given is None:
            return None
        mask, of_step = self._given[0], model_options.get("denoise_mask_function")
        return mask if of_step is None else of_step(timestep, mask, extra_options={"model": self._guider, "sigmas": self._sigmas})

    def _noised(self, model, x: Tensor, timestep: Tensor) -> Tensor:
        """The given picture at this noise level: what the host puts outside the mask."""
        _, noise, latent_image = self._given
        return model.scale_latent_inpaint(x=x, sigma=timestep, noise=noise, latent_image=latent_image)

    def _advanced(self, sigma: float, x: Tensor, level: Tensor) -> Tensor:
        """The source's latents [B, C, H, W] at a noise level: one Euler step (Karras et al. 2022, algorithm 1 without churn) from the nearest level above."""
        above = [visited for visited in self._path if visited > sigma]
        if not above:
            # the first call: where the user's run starts, the source starts
            return x.clone()
        start, latents, denoised = self._path[min(above)]
        return latents + (latents - denoised) / start * (level - start)
