"""The mini family's autoencoder: RGB pictures to 4-channel latents at 1/8 size and back.

The signature follows what the host's `comfy.sd.VAE` asks of a first stage: `encode` takes pictures [B, 3, H, W] in -1..1
and returns latents [B, 4, H/8, W/8]; `decode` is its inverse. Latents leave at the scale of Stable Diffusion's own
autoencoder (standard deviation 1 / 0.18215), so the host's SD1.x latent format applies unchanged.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

SCALE = 0.18215  # latent_formats.SD15.scale_factor
CHANNELS = 4


class Residual(nn.Module):
    """x + conv(silu(conv(silu(norm(x)))))"""

    def __init__(self, channels: int, operations=nn):
        super().__init__()
        self.norm = operations.GroupNorm(8, channels)
        self.conv1 = operations.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = operations.Conv2d(channels, channels, 3, padding=1)
        # Each block starts as the identity; without this the net diverged at learning rates above 1e-3.
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x):
        return x + self.conv2(F.silu(self.conv1(F.silu(self.norm(x)))))


class Autoencoder(nn.Module):
    """Unshuffle by 4, 64 channels at 1/4 and 1/8 size; back through 96 at 1/8, 64 at 1/4 and two pixel shuffles. No attention: any size that is a multiple of 8."""

    def __init__(self, operations=nn):
        super().__init__()
        conv = operations.Conv2d
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4), conv(48, 64, 3, padding=1), Residual(64, operations),
            conv(64, 64, 3, stride=2, padding=1), Residual(64, operations), Residual(64, operations), nn.SiLU(),
            conv(64, CHANNELS, 3, padding=1))
        self.decoder = nn.Sequential(
            conv(CHANNELS, 96, 3, padding=1), Residual(96, operations), Residual(96, operations),
            conv(96, 256, 3, padding=1), nn.PixelShuffle(2), Residual(64, operations), nn.SiLU(),
            conv(64, 96, 3, padding=1), nn.PixelShuffle(2), nn.SiLU(), conv(24, 12, 3, padding=1), nn.PixelShuffle(2))
        # Per-channel statistics of raw latents over the scenes, so that every channel leaves with mean 0 and the same spread.
        self.register_buffer("mean", torch.zeros(CHANNELS))
        self.register_buffer("std", torch.ones(CHANNELS))

    def statistics(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(t.to(like)[None, :, None, None] for t in (self.mean, self.std))

    def encode(self, pictures: torch.Tensor, **kwargs) -> torch.Tensor:
        """[B, 3, H, W] in -1..1 to latents [B, 4, H/8, W/8] of standard deviation 1 / 0.18215."""
        raw = self.encoder(pictures)
        mean, std = self.statistics(raw)
        return (raw - mean) / (std * SCALE)

    def decode(self, latents: torch.Tensor, **kwargs) -> torch.Tensor:
        """[B, 4, h, w] to pictures [B, 3, 8h, 8w], nominally in -1..1 (not clamped). Raises ValueError for another number of channels."""
        if latents.shape[1] != CHANNELS:
            raise ValueError(f"The mini autoencoder decodes latents of {CHANNELS} channels, but this one has {latents.shape[1]}: decode it with its own model's VAE.")
        mean, std = self.statistics(latents)
        return self.decoder(latents * (std * SCALE) + mean)
