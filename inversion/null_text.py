"""Null-text inversion: one embedding of the empty prompt per step, with which guided sampling returns to the inverted picture.

Mokady et al., "Null-text Inversion for Editing Real Images using Guided Diffusion Models" (CVPR 2023), section 4. A picture is
inverted at guidance 1; sampling back with guidance w leaves that path. From noise to picture, each step's unconditional
tokens are trained until the guided step lands on the stored latent. Here in sigma space with denoised predictions (see `ddim`),
so eps and v models are one case. The loss is that of the paper, on x = y / sqrt(1 + sigma^2), so its thresholds mean the same.

`optimise` is the method, `null_text_run` runs it on a MODEL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .ddim import ddim_step, to_eps, unit_variance_scale

# As published: the rate falls by 1/100 of itself per step (to nothing after 100 steps: held at its hundredth from there), and
# the loss that ends a step early grows by 2e-5 per step.
RATE_STEPS = 100
RATE_FLOOR = 0.01
STOP_GROWTH = 2e-5

Guided = Callable[[Tensor], Tensor]
Branch = Callable[[Tensor, float], Guided]
Tell = Callable[[int, int, Tensor, Tensor], None]


@dataclass(frozen=True)
class Settings:
    """guidance: w, the cfg of the later sampler. inner_steps: at most so many trainings per step. early_stop: mean squared error that is
    good enough at the first step. learning_rate: Adam's, at the first step. Defaults are the published ones.
    checkpointing: "auto", "on" or "off", see gradients.private_model.
    """

    guidance: float = 7.5
    inner_steps: int = 10
    early_stop: float = 1e-5
    learning_rate: float = 0.01
    checkpointing: str = "auto"


@dataclass(frozen=True)
class NullStep:
    """One step of `optimise`, from sigmas[index] to sigmas[index + 1].

    tokens: [B, T, C] the step's unconditional tokens. latent: y [B, ...] after the step. denoised: D of the step. loss: [B] mean
    squared error of the latent, x scaling. inner: [B] trainings it took.
    """

    index: int
    tokens: Tensor
    latent: Tensor
    denoised: Tensor
    loss: Tensor
    inner: Tensor


def learning_rate_at(index: int, base: float) -> float:
    """base (1 - index / 100), never below base / 100."""
    return base * max(1.0 - index / RATE_STEPS, RATE_FLOOR)


def stop_at(index: int, base: float) -> float:
    """base + 2e-5 index: the loss below which a step is done."""
    return base + STOP_GROWTH * index


def optimise(branch: Branch, y: Tensor, targets: Tensor, sigmas: list[float], tokens: Tensor, settings: Settings, tell: Tell | None = None) -> Iterator[NullStep]:
    """Null-text optimisation along descending `sigmas` [N + 1], from y [B, ...] at sigmas[0]; yields N steps.

    branch(y, sigma) prepares a step (the conditional prediction, once) and returns guided(tokens), the denoised prediction with guidance
    in which the unconditional tokens are `tokens`. targets: [N, B, ...], targets[i] belongs to sigmas[i + 1], sampler
    scaling like y. tokens: [B, T, C] to start from; each step starts from the one before, with a fresh Adam. Rows are trained
    together and stop by themselves, so that a batch gives what its members give alone. tell(index, inner, losses [B], denoised): called after
    each training. inner_steps 0 trains nothing: plain guided sampling.

    To be called outside inference mode. Raises ValueError, one sentence, for a loss that is no number, and where no gradient arrives.
    """
    for index, (sigma, sigma_next) in enumerate(zip(sigmas, sigmas[1:])):
        guided = branch(y, sigma)
        scale = unit_variance_scale(sigma_next)
        target = targets[index]

        def land(denoised, number=index + 1, y=y, sigma=sigma, sigma_next=sigma_next, scale=scale, target=target):
            """The latent after the step, and its loss [B]."""
            after = ddim_step(y, sigma, sigma_next, to_eps(y, sigma, denoised))
            losses = ((after - target) * scale).square().flatten(1).mean(dim=1)
            if not bool(torch.isfinite(losses).all()):
                raise ValueError(
                    f"The loss of null-text optimisation became NaN or infinite at step {number} of {len(sigmas) - 1} (sigma {sigma:.4g}): "
                    "lower the learning rate, or check the model's weights."
                )
            return after, losses

        rows = [row.detach().clone().requires_grad_() for row in tokens.split(1)]
        adam = torch.optim.Adam(rows, lr=learning_rate_at(index, settings.learning_rate))
        training = [True] * len(rows)
        inner = torch.zeros(len(rows), dtype=torch.long)
        for count in range(settings.inner_steps):
            denoised = guided(torch.cat(rows))
            losses = land(denoised)[1]
            _gradients(losses, rows, training)
            adam.step()
            found = losses.detach()
            inner += torch.tensor(training)
            # as published: the loss that is good enough is that of the tokens before this training
            training = [on and loss >= stop_at(index, settings.early_stop) for on, loss in zip(training, found.tolist())]
            if tell is not None:
                tell(index, count + 1, found, denoised.detach())
            if not any(training):
                break
        tokens = torch.cat(rows).detach()
        with torch.no_grad():
            denoised = guided(tokens)
            y, loss = land(denoised)
        yield NullStep(index, tokens, y, denoised, loss, inner)


def _gradients(losses: Tensor, rows: list[Tensor], training: list[bool]) -> None:
    """Gradients of each row's own loss onto the rows in training; Adam passes over rows that have none.

    Not backward(): that would leave gradients on every other tensor in the network that asks for one.
    """
    chosen = [row for row, on in zip(rows, training) if on]
    found = [None]
    if losses.requires_grad:
        found = torch.autograd.grad(losses[torch.tensor(training, device=losses.device)].sum(), chosen, allow_unused=True)
    if any(gradient is None for gradient in found):
        raise ValueError(
            "No gradient reaches the tokens of the negative prompt: another node on the MODEL (an attention patch, say) or a fast mode of ComfyUI "
            "cuts it off; connect the MODEL without it, or start ComfyUI without --fast."
        )
    for row in rows:
        row.grad = None
    for row, gradient in zip(chosen, found):
        row.grad = gradient
