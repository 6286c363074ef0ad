"""Shared by the scores: the mini model, pictures and prompts in batches, the stock sampler, and figures with intervals.

Everything runs on the host's stock path. A row's noise comes from a seed of its own, so results do not depend on how
rows are put into batches.
"""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from ..mini import checkpoint
from ..mini.metrics import wilson
from ..mini.scenes import Scene, render

BATCH = 10
HELD_OUT, VALIDATION = 50_000_000, 51_000_000  # first seeds; training uses 1 to 3 million


def rate(results: list[bool], seeds: str) -> dict:
    """Leaf of a rate 0..1 with its 95 % interval."""
    low, high = wilson(sum(results), len(results))
    return {"value": sum(results) / len(results), "n": len(results), "seeds": seeds, "low": low, "high": high}


def mean(values: list[float], seeds: str) -> dict:
    """Leaf of a mean with its 95 % interval (normal approximation)."""
    values = np.asarray(values, np.float64)
    half = 1.96 * values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
    middle = float(values.mean())
    return {"value": middle, "n": len(values), "seeds": seeds, "low": middle - float(half), "high": middle + float(half)}


def span(first: int, count: int) -> str:
    """Seeds of a leaf, in words."""
    return f"{first}..{first + count - 1}"


def batches(items: list, size: int = BATCH) -> Iterator[list]:
    for start in range(0, len(items), size):
        yield items[start:start + size]


class Mini:
    """The shipped mini checkpoint with what scores need of it."""

    def __init__(self, name: str = "text_to_image"):
        import comfy.utils

        # scores print lines of their own
        comfy.utils.set_progress_bar_enabled(False)
        self.model, self.clip, self.vae = checkpoint.load(name)

    @torch.inference_mode()
    def prompts(self, texts: list[str]) -> list:
        """CONDITIONING of one batch with a prompt per row."""
        import nodes

        rows = [nodes.CLIPTextEncode().encode(self.clip, text)[0][0] for text in texts]
        return [[torch.cat([states for states, _ in rows]), {"pooled_output": torch.cat([extra["pooled_output"] for _, extra in rows])}]]

    @torch.inference_mode()
    def encode(self, pictures: torch.Tensor) -> dict:
        """LATENT of pictures [B, H, W, 3]."""
        import nodes

        return nodes.VAEEncode().encode(self.vae, pictures)[0]

    @torch.inference_mode()
    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        """Pictures [B, H, W, 3] of samples [B, 4, h, w]."""
        import nodes

        return nodes.VAEDecode().decode(self.vae, {"samples": samples})[0].cpu().float()

    @torch.inference_mode()
    def sample(self, model, positive: list, latent: torch.Tensor, seeds: list[int] | None, *, steps: int, cfg: float, scheduler: str = "normal",
               denoise: float = 1.0, negative: list | None = None, sampler: str = "euler") -> torch.Tensor:
        """KSampler's result from `latent` [B, 4, h, w]; `seeds` one per row, None for no added noise; `negative` None is the empty prompt."""
        import comfy.sample

        noise = torch.zeros_like(latent) if seeds is None else torch.cat([
            torch.randn(1, *latent.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        negative = self.prompts([""]) if negative is None else negative
        return comfy.sample.sample(model, noise, steps, cfg, sampler, scheduler, positive, negative, latent, denoise=denoise,
                                   disable_noise=seeds is None, disable_pbar=True, seed=0)


def pictures(scenes: list[Scene]) -> torch.Tensor:
    """IMAGE [B, 128, 128, 3] of scenes."""
    return torch.from_numpy(np.stack([render(scene) for scene in scenes]))
