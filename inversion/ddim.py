"""DDIM and its inverse in sigma space, as pure functions.

Notation. The papers write x for a latent at level abar; the host's samplers hold y = x / sqrt(abar)
= x sqrt(1 + sigma^2), with sigma = sqrt((1 - abar) / abar). In y the deterministic DDIM step
(Song et al. 2021, "Denoising Diffusion Implicit Models", eq. 12 with eta = 0; in sigma form eq. 14)
is a straight Euler step,

    y_b = y_a + (sigma_b - sigma_a) eps,        eps = (y - D(y, sigma)) / sigma,

in either direction. D is the denoiser: the prediction of the clean latent, guidance included. Because
D is all these functions ask for, eps, v and EDM models are served alike, and a repair for guidance
above 1 (null-text and relatives) is a denoiser that carries its own state, or another step function.

Shapes: y, eps and D(y, sigma) are [B, ...]; sigma arguments are 0-dimensional tensors or floats; a
denoiser receives sigma as a tensor [B]. Nothing is modified in place. The dtype of y is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]
InputScale = Callable[[float], float]

CONVENTIONS = ("destination", "source")


def unit_variance_scale(sigma: float, sigma_data: float = 1.0) -> float:
    """c_in(sigma) = 1 / sqrt(sigma^2 + sigma_data^2), what the network's input is multiplied by (Karras et al. 2022, table 1)."""
    return 1.0 / math.sqrt(sigma * sigma + sigma_data * sigma_data)


def to_eps(y: Tensor, sigma: Tensor | float, denoised: Tensor) -> Tensor:
    """eps = (y - D) / sigma: the noise in units of its own standard deviation. sigma must not be 0."""
    return (y - denoised) / sigma


def ddim_step(y: Tensor, sigma: Tensor | float, sigma_next: Tensor | float, eps: Tensor) -> Tensor:
    """y_b = y_a + (sigma_b - sigma_a) eps: one deterministic DDIM step, up or down."""
    return y + (sigma_next - sigma) * eps


def rescale(y: Tensor, sigma: float, sigma_to: float, input_scale: InputScale = unit_variance_scale) -> Tensor:
    """The latent that the network at `sigma_to` sees as it would see y at `sigma`: y c_in(sigma) / c_in(sigma_to).

    This keeps x and changes the timestep only, which is what "the current latent at the next timestep"
    means in code that works on x.
    """
    return y * (input_scale(sigma) / input_scale(sigma_to))


def rms(x: Tensor) -> Tensor:
    """Root mean square of each row: [B, ...] -> [B]."""
    return x.flatten(1).square().mean(dim=1).sqrt()


@dataclass(frozen=True)
class InversionStep:
    """One step of `invert`, from sigmas[index] to sigmas[index + 1].

    latent: y at the new sigma. denoised: the last D the step computed. corrections: one [B] tensor per
    repeat, the rms distance of the miss on the way back (see `invert_step`), NaN for rows that had already
    settled. grew: [B] bool, rows whose repeats were broken off because the correction grew.
    """

    index: int
    latent: Tensor
    denoised: Tensor
    corrections: tuple[Tensor, ...]
    grew: Tensor


def _rows(mask: Tensor, like: Tensor) -> Tensor:
    return mask.view(-1, *([1] * (like.ndim - 1)))


def invert_step(
    denoiser: Denoiser,
    y: Tensor,
    sigma: float,
    sigma_next: float,
    *,
    convention: str = "destination",
    iterations: int = 2,
    input_scale: InputScale = unit_variance_scale,
    sigma_floor: float = 1e-4,
    tolerance: float = 1e-6,
    index: int = 0,
) -> InversionStep:
    """One DDIM step upwards in noise, from y at `sigma` to `sigma_next` > `sigma` >= 0.

    The exact inverse of the sampling step from b down to a is the fixed point of
    y_b = y_a + (sigma_b - sigma_a) eps(y_b, sigma_b). Plain DDIM inversion replaces the unknown y_b inside
    eps by the current latent. Convention "destination" evaluates it at the new, noisier sigma (null-text
    inversion, diffusers' DDIMInverseScheduler): the same timestep as the sampling step back. "source" evaluates
    at the latent's own sigma (flipped sigmas, Plug-and-Play's own script); eps is undefined at sigma 0, so
    there it is taken at `sigma_floor`, the smallest level the model knows.

    `iterations` repeats put the result into its own equation (fixed-point inversion; Pan et al. 2023,
    "Effective real image editing with accelerated iterative diffusion inversion"; Garibi et al. 2024,
    "ReNoise"). The distance between two iterates is exactly what a sampling step back from the earlier one
    misses y by. A row stops when that is below `tolerance` of its rms, and goes back to its best measured
    iterate when it grew. Rows are independent: a batch gives what its members give alone.

    Raises ValueError for a convention that does not exist or sigmas that do not ascend.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"DDIM inversion knows the conventions {' and '.join(CONVENTIONS)}, not {convention!r}.")
    if not 0.0 <= sigma < sigma_next:
        raise ValueError(f"A DDIM inversion step needs 0 <= sigma < sigma_next, but got {sigma:g} and {sigma_next:g}.")
    ones = y.new_ones(y.shape[0])

    def eps_at(latent: Tensor, level: float) -> tuple[Tensor, Tensor]:
        denoised = denoiser(latent, ones * level)
        return to_eps(latent, level, denoised), denoised

    level = sigma_next if convention == "destination" else (sigma or sigma_floor)
    eps, denoised = eps_at(rescale(y, sigma, level, input_scale) if level != sigma else y, level)
    current = ddim_step(y, sigma, sigma_next, eps)

    best, best_error = current, torch.full_like(ones, math.inf)
    active = torch.ones_like(ones, dtype=torch.bool)
    grew = torch.zeros_like(active)
    corrections: list[Tensor] = []
    for _ in range(iterations):
        eps, denoised = eps_at(current, sigma_next)
        candidate = ddim_step(y, sigma, sigma_next, eps)
        error = rms(candidate - current)
        corrections.append(torch.where(active, error, torch.full_like(error, math.nan)))
        better = active & (error < best_error)
        grew = grew | (active & ~better)
        best = torch.where(_rows(better, y), current, best)
        best_error = torch.where(better, error, best_error)
        # the candidate has not been measured yet; it is the best guess as long as the distances shrink
        current = torch.where(_rows(better, y), candidate, torch.where(_rows(grew, y), best, current))
        active = better & (error > tolerance * rms(candidate))
        if not bool(active.any()):
            break
    return InversionStep(index, current, denoised, tuple(corrections), grew)


def invert(denoiser: Denoiser, y: Tensor, sigmas: Tensor, **options) -> Iterator[InversionStep]:
    """DDIM inversion along `sigmas` [K], ascending, K >= 2, starting from y at sigmas[0]; yields K - 1 steps.

    Options are those of `invert_step`. A generator, so that the caller decides what to keep, shows
    progress and cancels between steps.
    """
    levels = sigmas.tolist()
    for index, (sigma, sigma_next) in enumerate(zip(levels, levels[1:])):
        step = invert_step(denoiser, y, sigma, sigma_next, index=index, **options)
        y = step.latent
        yield step
