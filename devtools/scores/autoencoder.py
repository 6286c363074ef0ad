"""autoencoder.psnr_db: mean PSNR in dB of pictures through the host's VAE Encode and VAE Decode, held-out scenes, values in 0..1."""
from __future__ import annotations

from ...inversion.report import psnr
from ...mini.scenes import sample_scene
from ..scoring import HELD_OUT, Mini, batches, mean, pictures, span

QUICK_LIMITS = {"autoencoder.psnr_db": 27.0}


def score(quick: bool) -> dict:
    """Figures of this module (see its docstring for the keys)."""
    count = 10 if quick else 256
    mini, values = Mini(), []
    for batch in batches([sample_scene(HELD_OUT + i) for i in range(count)]):
        drawn = pictures(batch)
        values += [psnr(a, b, peak=1.0) for a, b in zip(drawn, mini.decode(mini.encode(drawn)["samples"]))]
    return {"autoencoder": {"psnr_db": mean(values, span(HELD_OUT, count))}}
