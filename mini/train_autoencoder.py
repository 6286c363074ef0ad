"""Training recipe of the autoencoder: squared and absolute error on drawn scenes, latents jittered so that decoding forgives sampling noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from .autoencoder import Autoencoder
from ..inversion.report import psnr
from .nets import mixed_precision
from .optim import Trainer
from .scenes import SIZE, render, sample_scene

BATCH, POOL, JITTER, LEARNING_RATE = 32, 16000, 0.05, 1.2e-3
TRAIN_SEED, HELD_OUT_SEED = 1_000_000, 50_000_000  # first seeds of the two sets; they never meet


def pictures(first_seed: int, count: int) -> torch.Tensor:
    """Scenes first_seed, first_seed + 1, ... as uint8 [count, 3, 128, 128]."""
    # NumPy until the end: one small torch call per scene costs more in thread hand-over than the drawing itself.
    out = np.empty((count, SIZE, SIZE, 3), np.uint8)
    for i in range(count):
        out[i] = render(sample_scene(first_seed + i)) * 255 + 0.5
    return torch.from_numpy(out).permute(0, 3, 1, 2).contiguous()


def mean_psnr(model: Autoencoder, held_out: torch.Tensor) -> float:
    """Mean PSNR in dB of decode(encode(x)) against x, both in 0..1, over pictures uint8 [n, 3, H, W]; the model on the CPU."""
    values = []
    with torch.inference_mode():
        for batch in held_out.split(32):
            x = batch.float() / 255
            y = ((model.decode(model.encode(x * 2 - 1)) + 1) / 2).clamp(0, 1)
            values += [psnr(a, b, peak=1.0) for a, b in zip(x, y)]
    return sum(values) / len(values)


def train(folder: Path, minutes: float, device: torch.device, seed: int = 0, weights: dict | None = None,
          decoder_only: bool = False, resume: bool = True) -> tuple[dict, dict]:
    """Train for `minutes`; returns (state dict of the averaged weights, metadata). `weights` is a state dict to start from.

    folder: where the state is kept; resume: go on from the state that is there, whose weights then replace `weights`.
    decoder_only: keep the encoder and the statistics of `weights`, so that models trained on its latents stay valid.
    Raises ValueError for decoder_only without weights, and KeyboardInterrupt, with the state saved.
    """
    torch.manual_seed(seed)
    model = Autoencoder().to(device, memory_format=torch.channels_last)
    if weights:
        model.load_state_dict(weights)
        # Training works on raw latents: undo the normalisation that the shipped weights carry.
        if not decoder_only:
            model.mean.zero_()
            model.std.fill_(1)
    if decoder_only:
        if not weights:
            raise ValueError("Training the decoder alone needs weights to start from; pass --from-shipped.")
        model.encoder.requires_grad_(False)
    print(f"autoencoder: {sum(p.numel() for p in model.parameters())} parameters; drawing {POOL} scenes", flush=True)
    pool = pictures(TRAIN_SEED, POOL)
    trainer = Trainer(model, folder, minutes, LEARNING_RATE, seed)
    if resume:
        trainer.resume()
    going = True
    with trainer.saving():
        while going:
            pick = torch.randint(POOL, (BATCH,), generator=trainer.generator)
            x = pool[pick].to(device).float().to(memory_format=torch.channels_last) / 127.5 - 1
            with mixed_precision(device.type):
                raw = model.encoder(x)
                spread = raw.detach().float().std((0, 2, 3), keepdim=True)
                y = model.decoder(raw + JITTER * spread * torch.randn(raw.shape, generator=trainer.generator).to(device))
            error = y.float() - x
            # The last term only keeps raw latents from drifting without bound.
            loss = error.square().mean() + 0.1 * error.abs().mean() + 1e-4 * raw.float().square().mean()
            going = trainer.update(loss, BATCH)
    trainer.report()
    model.load_state_dict(trainer.averaged())
    if not decoder_only:
        with torch.inference_mode():
            raw = torch.cat([model.encoder(b.to(device).float() / 127.5 - 1) for b in pool[:2000].split(100)])
        model.mean.copy_(raw.mean((0, 2, 3)))
        model.std.copy_(raw.std((0, 2, 3)))
    model.cpu().eval()
    quality = mean_psnr(model, pictures(HELD_OUT_SEED, 256))
    print(f"autoencoder: PSNR {quality:.2f} dB on 256 held-out scenes", flush=True)
    return model.state_dict(), {"recipe": "autoencoder", **trainer.record(BATCH), "data_seed": TRAIN_SEED, "psnr_db": round(quality, 3)}
