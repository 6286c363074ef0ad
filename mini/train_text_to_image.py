"""Training recipe of the text-to-image model: noise prediction on Stable Diffusion's schedule, captions of the scenes grammar.

Offset noise lets the net learn flat backgrounds from the words: SD's schedule leaves sqrt(abar) = 0.068 of signal at the
last step, and the mean of a plain background over 256 latent cells would otherwise be read from the noise.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .autoencoder import SCALE, Autoencoder
from .captions import caption
from .nets import attention_for_training, new_text_encoder, new_unet, text_states
from .optim import Trainer
from .scenes import sample_scene
from .tokens import GrammarTokens
from .train_autoencoder import pictures

BATCH, SCENES, LEARNING_RATE = 64, 40_000, 1e-3
TRAIN_SEED = 2_000_000
OFFSET_NOISE, PROMPT_DROPOUT, UNKNOWN_WORDS = 0.12, 0.1, 0.02
SNR_LIMIT, V_EXPONENT, STEP_EXPONENT = 5.0, 0.85, 0.5


def schedule() -> torch.Tensor:
    """abar [1000] of Stable Diffusion: beta = linspace(sqrt 0.00085, sqrt 0.012)^2."""
    return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0).float()


def precompute(folder: Path, autoencoder: Autoencoder, count: int = SCENES) -> torch.Tensor:
    """Latents of the training scenes at unit spread (0.18215 times the autoencoder's), fp16 [count, 4, 16, 16]; drawn once, then read from `folder`."""
    # Named after the autoencoder's weights: latents of another one are useless, silently.
    digest = hashlib.sha256(b"".join(v.numpy().tobytes() for _, v in sorted(autoencoder.state_dict().items()))).hexdigest()[:12]
    file = Path(folder) / f"latents-{count}-{digest}.safetensors"
    if file.exists():
        return load_file(file)["latents"]
    parts = []
    for start in range(0, count, 2000):
        batch = pictures(TRAIN_SEED + start, min(2000, count - start))
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            parts += [(autoencoder.encode(b.float() / 127.5 - 1) * SCALE).half() for b in batch.split(100)]
        print(f"latents: {start + len(batch)} of {count}", flush=True)
    latents = torch.cat(parts).clone()
    file.parent.mkdir(parents=True, exist_ok=True)
    # half a file, from a run that was stopped here, would be taken for a whole one
    partial = file.with_suffix(".partial")
    save_file({"latents": latents}, partial)
    partial.replace(file)
    return latents


def batch_tokens(tokens: GrammarTokens, picks: list[int], generator: torch.Generator) -> torch.Tensor:
    """Fresh captions of the picked scenes as compact ids [B, 77]; some dropped for guidance, a few words made unknown."""
    rows, empty = [], tokens.encode("")
    seeds = torch.randint(1 << 40, (len(picks),), generator=generator).tolist()
    dropped = torch.rand(len(picks), generator=generator) < PROMPT_DROPOUT
    for pick, seed, drop in zip(picks, seeds, dropped):
        # One caption in four names everything, so that full prompts are no rarity.
        probability = 1.0 if seed % 4 == 0 else 0.7
        rows.append(empty if drop else tokens.encode(caption(sample_scene(TRAIN_SEED + pick), seed, probability)[0]))
    ids = torch.stack(rows)
    padding = (ids == empty[1]) | (ids == empty[0])
    unknown = (torch.rand(ids.shape, generator=generator) < UNKNOWN_WORDS) & ~padding
    return ids.masked_fill(unknown, tokens.unknown)


def batch_steps(generator: torch.Generator) -> torch.Tensor:
    """Training steps t [BATCH] with density proportional to t^STEP_EXPONENT, one from each of BATCH equal shares.

    Layout and colours, which the words decide, are made above t = 500; the shares keep the loss from jumping with the draw.
    """
    share = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH
    return (1000 * share ** (1 / (1 + STEP_EXPONENT))).long().clamp(max=999)


def muon_weights(model: torch.nn.Module) -> set[str]:
    """Names of the hidden layers' matrices; tables, first and last layer, biases and norms stay with AdamW."""
    outer = ("unet.input_blocks.0.", "unet.out.")
    return {k for k, p in model.named_parameters() if p.ndim >= 2 and "embedding" not in k and not k.startswith(outer)}


def train(folder: Path, minutes: float, device: torch.device, autoencoder: Autoencoder, seed: int = 0,
          weights: dict | None = None, resume: bool = True, compiled: bool = False) -> tuple[dict, dict]:
    """Train UNet and text encoder together for `minutes`; returns (state dict of the averaged weights, metadata).

    weights: state dict to start from, keys "unet." and "text.". folder: where state and latents are kept; resume: go on
    from the state that is there, whose weights then replace `weights`. Loss: see the comment on the weighting.
    compiled: through torch.compile. Raises KeyboardInterrupt, with the state saved.
    """
    torch.manual_seed(seed)
    tokens = GrammarTokens()
    model = torch.nn.ModuleDict({"unet": new_unet(), "text": new_text_encoder(tokens.unknown + 1)})
    if weights:
        model.load_state_dict(weights)
    model.to(device)
    latents = precompute(folder, autoencoder)
    abar = schedule().to(device)
    for name, net in model.items():
        print(f"{name}: {sum(p.numel() for p in net.parameters())} parameters", flush=True)
    trainer = Trainer(model, folder, minutes, LEARNING_RATE, seed, muon=muon_weights(model))
    if resume:
        trainer.resume()
    g = trainer.generator

    def predict(noisy, t, ids):
        with torch.autocast(device.type, torch.bfloat16):
            context = text_states(model["text"], ids)
            return model["unet"](noisy, t, context=context, transformer_options={"optimized_attention_override": attention_for_training}).float()

    if compiled:
        print("compiling, some minutes without a line", flush=True)
        predict = torch.compile(predict, dynamic=False)
    going = True
    with trainer.saving():
        while going:
            pick = torch.randint(len(latents), (BATCH,), generator=g)
            ids = batch_tokens(tokens, pick.tolist(), g).to(device)
            clean = latents[pick].to(device).float()
            t = batch_steps(g).to(device)
            noise = (torch.randn(clean.shape, generator=g) + OFFSET_NOISE * torch.randn(BATCH, 4, 1, 1, generator=g)).to(device)
            a = abar[t][:, None, None, None]
            predicted = predict(a.sqrt() * clean + (1 - a).sqrt() * noise, t.float(), ids)
            # Min-SNR weighting (Hang et al. 2023, eq. 5) for eps prediction: the last, nearly clean steps would crowd out layout.
            # The second factor leans towards the loss in v (exponent 1; Salimans and Ho 2022): layout and colours are decided
            # at the noisiest levels, where an error in the picture is a tiny error in eps and words are learned last.
            noise_to_signal = (1 - abar[t]) / abar[t]
            weight = (SNR_LIMIT * noise_to_signal).clamp(max=1) * (1 + noise_to_signal) ** V_EXPONENT
            loss = (weight * (predicted - noise).square().mean((1, 2, 3))).mean()
            going = trainer.update(loss, BATCH)
    trainer.report()
    weighting = f"min-SNR {SNR_LIMIT:g}, (1 + noise / signal)^{V_EXPONENT:g}, steps t^{STEP_EXPONENT:g}"
    return trainer.averaged(), {"recipe": "text_to_image", **trainer.record(BATCH), "data_seed": TRAIN_SEED, "scenes": len(latents),
                                "weighting": weighting, "offset_noise": OFFSET_NOISE, "prompt_dropout": PROMPT_DROPOUT}
