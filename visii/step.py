"""The predictions of instruction learning on a MODEL: of a training step, of the validation set, of a preview.

Of the three predictions the two that do not depend on the instruction are one call of two rows without gradient, so that one row is kept for the
backward pass instead of three. The gradient is the same.
"""

from __future__ import annotations

from collections.abc import Callable

import comfy.conds
import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor

from ..inversion.ddim import ddim_step, to_eps
from .learn import Settings
from .objective import fixed_noise, guided, noise_error

PREVIEW_STEPS = 20
VALIDATION = 8  # (timestep, noise) pairs of the fixed set


class Step:
    """The predictions of one training step, from the guider's processed conditioning. targets: [N, C, h, w] of the pairs, sampler scaling.

    denoised: the guided prediction of the clean latent that was made last.
    """

    def __init__(self, guider, private, options: dict, targets: Tensor, settings: Settings):
        self.private, self.options, self.targets, self.settings = private, options, targets, settings
        self.sigmas = private.model_sampling.sigmas.clone().to(targets)
        self.text, self.empty = self._own(guider.conds["positive"][0]), self._own(guider.conds["negative"][0])
        self.denoised: Tensor | None = None

    def _own(self, entry: dict) -> dict:
        """A processed entry with tensors that may take part in a backward pass."""
        conds = {name: type(cond)(cond.cond.clone()) if isinstance(getattr(cond, "cond", None), Tensor) else cond for name, cond in entry["model_conds"].items()}
        return {**entry, "model_conds": conds}

    def entry(self, entry: dict, rows: list[int], tokens: Tensor | None = None, picture: bool = True) -> list:
        """The list of one entry with the pictures of the pairs `rows` (or none at all), and other tokens if given."""
        conds = dict(entry["model_conds"])
        images = conds["c_concat"].cond[rows]
        conds["c_concat"] = comfy.conds.CONDNoiseShape(images if picture else torch.zeros_like(images))
        if tokens is not None:
            conds["c_crossattn"] = comfy.conds.CONDCrossAttn(tokens)
        return [{**entry, "model_conds": conds}]

    def predict(self, conds: list, y: Tensor, levels: Tensor) -> list[Tensor]:
        """D of every list, through the host's own batching."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        found = comfy.samplers.calc_cond_batch(self.private, conds, y, levels, self.options)
        # asked again because older hosts do not ask inside the network, and this may have been the last call
        comfy.model_management.throw_exception_if_processing_interrupted()
        return found

    def without_text(self, y: Tensor, levels: Tensor, rows: list[int]) -> tuple[Tensor, Tensor]:
        """(D of picture and empty text, D of neither), one call without gradient."""
        with torch.no_grad():
            # three lists: a guidance patch that makes its own third prediction knows a pair by its two
            return tuple(self.predict([None, self.entry(self.empty, rows), self.entry(self.empty, rows, picture=False)], y, levels)[1:])

    def with_text(self, tokens: Tensor, y: Tensor, levels: Tensor, rows: list[int]) -> Tensor:
        """D of picture and tokens [1, T, C]."""
        return self.predict([self.entry(self.text, rows, tokens), None, None], y, levels)[0]

    def noisy(self, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """(y, levels, noise, pairs) of timesteps: pair t mod N of N, each with the timestep's own noise."""
        rows = [timestep % len(self.targets) for timestep in chosen.tolist()]
        noise = torch.cat([fixed_noise((1, *self.targets.shape[1:]), timestep, self.settings.seed) for timestep in chosen.tolist()]).to(self.targets)
        levels = self.sigmas[chosen.to(self.sigmas.device)]
        return self.targets[rows] + levels[:, None, None, None] * noise, levels, noise, rows

    def branch(self, timestep: int):
        """A training step, see `learn`."""
        y, levels, noise, rows = self.noisy(torch.tensor([timestep]))
        image, none = self.without_text(y, levels, rows)

        def predict(tokens: Tensor) -> Tensor:
            self.denoised, eps = self._guided(self.with_text(tokens, y, levels, rows), image, none, y, levels)
            return eps

        return predict, noise

    def _guided(self, full: Tensor, image: Tensor, none: Tensor, y: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        """(guided D without gradient, guided eps)."""
        denoised = guided(full, image, none, self.settings.text_scale, self.settings.image_scale)
        return denoised.detach(), to_eps(y, levels[:, None, None, None], denoised)

    def validation(self) -> Callable[[Tensor], float]:
        """The error of tokens on a fixed set of timesteps: the mean of each one's error over that of the first tokens asked about.

        Relative, because an error at little noise is a hundred times one at much, whatever the instruction says.
        """
        count = len(self.sigmas)
        chosen = [round((k + 0.5) * count / VALIDATION) for k in range(VALIDATION)]
        parts = [self.noisy(part) for part in torch.tensor(chosen).split(self._rows_that_fit(VALIDATION))]
        known = [(*part, *self.without_text(part[0], part[1], part[3])) for part in parts]
        first: list[Tensor] = []

        @torch.no_grad()
        def validate(tokens: Tensor) -> float:
            errors = torch.cat([
                noise_error(self._guided(self.with_text(tokens, y, levels, rows), image, none, y, levels)[1], noise) for y, levels, noise, rows, image, none in known
            ])
            if not first:
                first.append(errors.clamp(min=1e-12))
            return float((errors / first[0]).mean())

        return validate

    def _rows_that_fit(self, rows: int) -> int:
        """How many rows, of so many with two predictions each, the host would put into one call with the memory there is."""
        free = comfy.model_management.get_free_memory(self.targets.device)
        while rows > 1 and self.private.memory_required([2 * rows, *self.targets.shape[1:]]) * 1.5 > free:
            rows //= 2
        return rows

    @torch.no_grad()
    def sampled(self, tokens: Tensor):
        """The edit of the first pair's picture: yields (y, guided D) after each deterministic step. The noise is the same every time."""
        levels = comfy.samplers.calculate_sigmas(self.private.model_sampling, "normal", PREVIEW_STEPS).tolist()
        y = levels[0] * fixed_noise((1, *self.targets.shape[1:]), len(self.sigmas), self.settings.seed).to(self.targets)
        for sigma, sigma_next in zip(levels, levels[1:]):
            level = y.new_full((1,), sigma)
            denoised, eps = self._guided(self.with_text(tokens, y, level, [0]), *self.without_text(y, level, [0]), y, level)
            y = ddim_step(y, sigma, sigma_next, eps)
            yield y, denoised
