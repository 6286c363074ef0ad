"""Training recipe of the mini ControlNet (Zhang et al. 2023): a copy of the UNet's encoder that reads outlines, the UNet itself frozen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from . import train_text_to_image as base
from .autoencoder import SCALE, Autoencoder
from .captions import caption
from .nets import attention_for_training, controlnet_config, initialise, mixed_precision, text_states
from .optim import Trainer
from .scenes import masks, outline, render, sample_scene
from .tokens import GrammarTokens

BATCH, POOL, RATE, TRAIN_SEED = 48, 16_000, 6e-4, 5_000_000
BLIND = 0.5  # of the captions are empty: the hint alone has to say where things are
SILENT = 0.15  # of the contexts are zeros, the negative that goes with a picture as prompt


def new_controlnet(unet: torch.nn.Module) -> torch.nn.Module:
    """The host's ControlNet class at the mini width: the UNet's encoder as start, zero convolutions at zero."""
    import comfy.cldm.cldm
    import comfy.ops

    net = comfy.cldm.cldm.ControlNet(**controlnet_config(), dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    initialise(net)
    ours, theirs = net.state_dict(), unet.state_dict()
    net.load_state_dict({key: theirs[key] if key in theirs and theirs[key].shape == value.shape else value for key, value in ours.items()})
    for name, parameter in net.named_parameters():
        if name.startswith(("zero_convs.", "middle_block_out.", "input_hint_block.14.")):
            torch.nn.init.zeros_(parameter)
    return net


def train(folder: Path, minutes: float, device: torch.device, unet: torch.nn.Module, text: torch.nn.Module, autoencoder: Autoencoder, seed: int = 0,
          resume: bool = True) -> tuple[dict, dict]:
    """Train for `minutes`; returns (state dict, metadata). unet, text: the frozen text-to-image model. Raises KeyboardInterrupt, with the state saved."""
    torch.manual_seed(seed)
    tokens = GrammarTokens()
    net = new_controlnet(unet).to(device)
    unet, text = unet.to(device).requires_grad_(False), text.to(device).requires_grad_(False)
    hints, latents = torch.empty(POOL, 128, 128, dtype=torch.uint8), []
    for start in range(0, POOL, 100):
        scenes = [sample_scene(TRAIN_SEED + start + i) for i in range(100)]
        hints[start:start + 100] = torch.from_numpy(np.stack([outline(masks(scene)) for scene in scenes]) * 255).to(torch.uint8)
        drawn = torch.from_numpy(np.stack([render(scene) for scene in scenes])).movedim(-1, 1)
        with torch.inference_mode(), mixed_precision("cpu"):
            latents.append((autoencoder.encode(drawn * 2 - 1) * SCALE).half())
    latents, abar = torch.cat(latents).clone(), base.schedule().to(device)
    fresh = ("zero_convs.", "middle_block_out.", "input_hint_block.", "input_blocks.0.")
    trainer = Trainer(net, folder, minutes, RATE, seed, muon={name for name, p in net.named_parameters() if p.ndim >= 2 and not name.startswith(fresh)})
    if resume:
        trainer.resume()
    g, going = trainer.generator, True
    options = {"optimized_attention_override": attention_for_training}
    with trainer.saving():
        while going:
            pick = torch.randint(POOL, (BATCH,), generator=g)
            clean = latents[pick].to(device).float()
            seeds = torch.randint(1 << 40, (BATCH,), generator=g).tolist()
            blind = (torch.rand(BATCH, generator=g) < BLIND).tolist()
            ids = torch.stack([tokens.encode("" if empty else caption(sample_scene(TRAIN_SEED + i), s)[0]) for i, s, empty in zip(pick.tolist(), seeds, blind)])
            t = base.batch_steps(g, BATCH).to(device)
            noise = base.draw_noise(clean.shape, g).to(device)
            a = abar[t][:, None, None, None]
            noisy, hint = a.sqrt() * clean + (1 - a).sqrt() * noise, (hints[pick].to(device).float() / 255)[:, None].expand(-1, 3, -1, -1)
            with mixed_precision(device.type):
                with torch.no_grad():
                    context = text_states(text, ids.to(device)) * (torch.rand(BATCH, 1, 1, generator=g) >= SILENT).to(device)
                found = net(x=noisy, hint=hint, timesteps=t.float(), context=context)
                predicted = unet(noisy, t.float(), context=context, control={name: list(parts) for name, parts in found.items()}, transformer_options=options).float()
            loss = (base.weights_at(abar[t]) * (predicted - noise).square().mean((1, 2, 3))).mean()
            going = trainer.update(loss, BATCH)
    trainer.report()
    return trainer.averaged(), {"recipe": "controlnet", **trainer.record(BATCH), "data_seed": TRAIN_SEED, "blind": BLIND, "silent": SILENT}
