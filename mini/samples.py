"""Pictures of a trained text-to-image model: a sample grid of held-out captions, and how much of them it followed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .captions import caption
from .checkpoint import load_clip, load_model, load_vae
from .metrics import against_caption
from .reader import read
from .scenes import sample_scene

COLUMNS, ROWS, STEPS, CFG = 6, 4, 20, 4.0
FIRST_SEED = 52_000_000  # scored scenes have other seeds, and so has the training


def draw_samples(path: Path, weights: dict[str, torch.Tensor], autoencoder: dict[str, torch.Tensor]) -> dict:
    """Sample held-out captions with the host's own euler sampler, write them to `path` as one picture, and say what the reader found.

    weights, autoencoder: state dicts as in mini/weights. Captions, noise and order are fixed, so that grids of two trainings
    can be laid side by side. Returns figures for the metadata: the fraction of named attributes that the picture has.
    """
    import comfy.sample
    import nodes

    model, clip, vae = load_model(weights), load_clip(weights), load_vae(autoencoder)
    seeds = range(FIRST_SEED, FIRST_SEED + COLUMNS * ROWS)
    captions = [caption(sample_scene(seed), seed) for seed in seeds]
    with torch.inference_mode():
        encoded = [nodes.CLIPTextEncode().encode(clip, text)[0][0] for text in ("", *(text for text, _, _ in captions))]
        negative, *rows = [(states, extra["pooled_output"]) for states, extra in encoded]
        positive = [torch.cat(parts) for parts in zip(*rows)]
        noise = torch.cat([torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        latents = comfy.sample.sample(model, noise, STEPS, CFG, "euler", "normal", *([[states, {"pooled_output": pooled}]] for states, pooled in (positive, negative)),
                                      torch.zeros_like(noise), seed=0)
        pictures = nodes.VAEDecode().decode(vae, {"samples": latents})[0].float().clamp(0, 1).cpu().numpy()
    height, width = pictures.shape[1:3]
    grid = pictures.reshape(ROWS, COLUMNS, height, width, 3).transpose(0, 2, 1, 3, 4).reshape(ROWS * height, COLUMNS * width, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((grid * 255 + 0.5).astype(np.uint8)).save(path)
    followed = [value for picture, (_, named, whole) in zip(pictures, captions)
                for values in against_caption(read(picture), named, whole).values() for value in values]
    share = sum(followed) / len(followed)
    print(f"samples: {path.name} shows {len(captions)} held-out captions; {100 * share:.0f} % of {len(followed)} named attributes are there", flush=True)
    return {"captions_followed": round(share, 4), "captions_attributes": len(followed)}
