"""The objective of visual instruction inversion, as pure functions.

Nguyen et al., "Visual Instruction Inversion: Image Editing via Visual Prompting" (NeurIPS 2023), section 3, and the released code. For a
pair (x before, y after), t a timestep and n its noise,

    z_t = sqrt(abar_t) z_y + sqrt(1 - abar_t) n
    e   = e_none + s_T (e_full(c) - e_img) + s_I (e_img - e_none)
    L   = l_mse mean((e - n)^2) - l_direction clamp(cos(d, p(c)), -1, 0.5)

e_full, e_img, e_none: predictions with text c and picture x, with the empty text and x, with neither (InstructPix2Pix, eq. 3). d: the edit's
direction between CLIP's image features. p(c): CLIP's text projection of the mean of all of c's tokens. Only e_full depends on c, so that the
other two need no gradient. In the host's scaling y_t = z_t sqrt(1 + sigma^2) = z_y + sigma n.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, linear, normalize

CLOSE_ENOUGH = 0.5  # cosine above which the direction term has no gradient, as published
_MIX = 0x9E3779B97F4A7C15  # odd: the seeds of neighbouring timesteps lie far apart


def guided(full: Tensor, image: Tensor, none: Tensor, text_scale: float, image_scale: float) -> Tensor:
    """e_none + s_T (e_full - e_img) + s_I (e_img - e_none); holds for eps and, because its weights sum to 1, for denoised predictions."""
    return none + text_scale * (full - image) + image_scale * (image - none)


def noise_error(predicted: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error over everything but the first axis: [B, ...] -> [B]."""
    return (predicted - noise).square().flatten(1).mean(1)


def text_feature(tokens: Tensor, projection: Tensor) -> Tensor:
    """p(c) [B, P] of unit length: the mean over all positions of tokens [B, T, C] through projection [P, C]."""
    return normalize(linear(tokens.mean(1), projection), dim=-1)


def direction_between(before: Tensor, after: Tensor) -> Tensor:
    """d [1, P] of unit length: from the mean of image features before [N, P] to that after. Features as CLIP projects them, not normalised."""
    return normalize(after.float().mean(0, keepdim=True) - before.float().mean(0, keepdim=True), dim=-1)


def similarity(tokens: Tensor, direction: Tensor, projection: Tensor) -> Tensor:
    """cos(d, p(c)) of tokens [1, T, C], a scalar."""
    return cosine_similarity(direction, text_feature(tokens, projection), dim=-1).mean()


def total_loss(error: Tensor, alike: Tensor | None, mse_weight: float, direction_weight: float) -> Tensor:
    """L from the mean squared error and the cosine, None for no direction term."""
    loss = mse_weight * error
    return loss if alike is None else loss - direction_weight * alike.clamp(-1.0, CLOSE_ENOUGH)


def generator(seed: int, stream: int) -> torch.Generator:
    """A generator of its own for each `stream` of a run's `seed`."""
    return torch.Generator().manual_seed((seed + _MIX * (stream + 1)) % 2**63)


def timesteps(steps: int, count: int, seed: int) -> list[int]:
    """The timesteps of a run in random order: one from each of `steps` equal shares of 0..count - 1.

    With as many steps as timesteps every one comes once, as published.
    """
    chosen = generator(seed, -1)
    places = (torch.arange(steps, dtype=torch.float64) + torch.rand(steps, generator=chosen, dtype=torch.float64)) / steps
    return (places * count).long().clamp(max=count - 1)[torch.randperm(steps, generator=chosen)].tolist()


def fixed_noise(shape: tuple[int, ...], timestep: int, seed: int) -> Tensor:
    """The unit noise that belongs to a timestep, float32 on the CPU: the same whenever it comes again."""
    return torch.randn(shape, generator=generator(seed, timestep))
