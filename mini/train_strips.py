"""Training recipe of the mini LoRA "strips": the last self-attentions of the text-to-image model learn to look at the earlier panels of a strip.

A panel is a row of its own with a caption of its own; in the last two decoder levels with attention the last panel's queries also see the keys of the
panels before it, unmasked and unweighted, as a picture's patches see each other. Everything but those self-attentions stays as it is.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch

from . import train_text_to_image as base
from .autoencoder import SCALE, Autoencoder
from .nets import attention_for_training, text_states
from .optim import Trainer
from .scenes import render
from .strips import PANELS, captions, sample_strip
from .tokens import GrammarTokens

BATCH, POOL, RATE, TRAIN_SEED = 12, 5_000, 6e-4, 7_000_000  # strips
SILENT = 0.6  # of the last captions name no looks
BLOCKS = range(6, 12)  # the host's output blocks
LORA = "lora_unet_"  # the host's LoRA names of a UNet's layers


def is_trained(name: str) -> bool:
    """Whether a parameter of the UNet belongs to the self-attentions that learn."""
    parts = name.split(".")
    return parts[0] == "output_blocks" and int(parts[1]) in BLOCKS and ("attn1" in parts or "norm1" in parts)


def strip_attention(original, q, k, v, heads, mask=None, transformer_options=None, **kwargs):
    """The host's `optimized_attention_override`: rows are strips of PANELS panels, [strips * PANELS, tokens, C]; the last panel sees all."""
    part, number = transformer_options["block"]
    if part != "output" or number not in BLOCKS or k.shape[1] != q.shape[1]:
        return attention_for_training(original, q, k, v, heads, mask)
    strips, tokens = len(q) // PANELS, q.shape[1]
    rows = [x.unflatten(0, (strips, PANELS)) for x in (q, k, v)]
    alone = attention_for_training(original, *(x[:, :-1].flatten(0, 1) for x in rows), heads)
    last = attention_for_training(original, rows[0][:, -1], *(x.reshape(strips, PANELS * tokens, -1) for x in rows[1:]), heads)
    return torch.cat([alone.unflatten(0, (strips, PANELS - 1)), last[:, None]], 1).flatten(0, 1)


def precompute(autoencoder: Autoencoder, count: int) -> torch.Tensor:
    """Latents of the training strips at unit spread, fp16 [count, PANELS, 4, 16, 16]."""
    parts = []
    for start in range(0, count, 50):
        drawn = np.stack([render(panel) for i in range(start, min(start + 50, count)) for panel in sample_strip(TRAIN_SEED + i).panels])
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            parts.append((autoencoder.encode(torch.from_numpy(drawn).movedim(-1, 1) * 2 - 1) * SCALE).half())
    return torch.cat(parts).clone().unflatten(0, (-1, PANELS))


def as_lora(trained: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Differences of weights under the host's LoRA names (`.diff` for weights, `.diff_b` for biases)."""
    out = {}
    for name, value in trained.items():
        layer, kind = name.rsplit(".", 1)
        out[f"{LORA}{layer.replace('.', '_')}.{'diff' if kind == 'weight' else 'diff_b'}"] = value - start[name]
    return out


def train(folder: Path, minutes: float, device: torch.device, unet: torch.nn.Module, text: torch.nn.Module, autoencoder: Autoencoder, seed: int = 0,
          resume: bool = True) -> tuple[dict, dict]:
    """Train for `minutes`; returns (LoRA, metadata). unet, text: the text-to-image model. Raises KeyboardInterrupt, with the state saved."""
    torch.manual_seed(seed)
    tokens = GrammarTokens()
    unet, text = unet.to(device), text.to(device).requires_grad_(False)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(is_trained(name))
    start = {name: p.detach().clone() for name, p in unet.named_parameters() if p.requires_grad}
    latents, abar = precompute(autoencoder, POOL), base.schedule().to(device)
    print(f"{POOL} strips drawn; {sum(p.numel() for p in start.values())} parameters learn", flush=True)
    trainer = Trainer(unet, folder, minutes, RATE, seed, muon={name for name, p in start.items() if p.ndim >= 2})
    if resume:
        trainer.resume()
    g, going = trainer.generator, True
    options = {"optimized_attention_override": strip_attention}
    with trainer.saving():
        while going:
            pick = torch.randint(POOL, (BATCH,), generator=g)
            clean = latents[pick].to(device).float().flatten(0, 1)
            rng = random.Random(int(torch.randint(1 << 40, (1,), generator=g)))
            dropped = (torch.rand(BATCH * PANELS, generator=g) < base.PROMPT_DROPOUT).tolist()
            words = [word for i in pick.tolist() for word in captions(sample_strip(TRAIN_SEED + i), rng, SILENT)]
            ids = torch.stack([tokens.encode("" if drop else word) for word, drop in zip(words, dropped)]).to(device)
            # one noise level per strip: a sampler draws all panels together
            t = base.batch_steps(g, BATCH).repeat_interleave(PANELS).to(device)
            noise = base.draw_noise(clean.shape, g).to(device)
            a = abar[t][:, None, None, None]
            with torch.autocast(device.type, torch.bfloat16):
                with torch.no_grad():
                    context = text_states(text, ids)
                predicted = unet(a.sqrt() * clean + (1 - a).sqrt() * noise, t.float(), context=context, transformer_options=options).float()
            loss = (base.weights_at(abar[t]) * (predicted - noise).square().mean((1, 2, 3))).mean()
            going = trainer.update(loss, BATCH * PANELS)
    trainer.report()
    averaged = trainer.averaged()
    return as_lora({name: averaged[name] for name in start}, start), {
        "recipe": "strips", **trainer.record(BATCH * PANELS), "data_seed": TRAIN_SEED, "strips": POOL, "silent": SILENT}
