"""inversion.round_trip_psnr_db: picture PSNR of invert-and-return against the autoencoder's own reconstruction.

50 held-out scenes with captions that name everything, 50 steps, guidance 1, DDIM Invert's defaults.
.plain_round_trip_psnr_db: the same without fixed-point refinement.
"""
from __future__ import annotations

from ...inversion.run import run_inversion, run_reconstruction
from ...mini.captions import caption
from ...inversion.report import psnr
from ...mini.scenes import sample_scene
from ..scoring import HELD_OUT, Mini, batches, mean, pictures, span

QUICK_LIMITS = {"inversion.round_trip_psnr_db": 25.0}
STEPS = 50


def score(quick: bool) -> dict:
    """Figures of this module (see its docstring for the keys)."""
    count = 10 if quick else 50
    mini, seeds = Mini(), list(range(HELD_OUT, HELD_OUT + count))
    found: dict[str, list[float]] = {"round_trip_psnr_db": [], "plain_round_trip_psnr_db": []}
    for batch in batches(seeds):
        scenes = [sample_scene(seed) for seed in batch]
        prompts = mini.prompts([caption(scene, seed, 1.0)[0] for scene, seed in zip(scenes, batch)])
        latent = mini.encode(pictures(scenes))
        own = mini.decode(latent["samples"])
        for key, iterations in zip(found, (2, 0)):
            trajectory = run_inversion(mini.model, latent, prompts, steps=STEPS, iterations=iterations).trajectory
            back = mini.decode(run_reconstruction(mini.model, trajectory))
            found[key] += [psnr(a, b, peak=1.0) for a, b in zip(own, back)]
    return {"inversion": {key: mean(values, span(HELD_OUT, count)) for key, values in found.items()}}
