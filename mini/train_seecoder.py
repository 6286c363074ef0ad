"""Training recipe of the mini SeeCoder, in the paper's two parts: a backbone that reads pictures, then the rest against a frozen UNet.

Part 1 (`seecoder_backbone`): no pretrained Swin exists at this size, so the backbone learns to name, in every cell of its three
maps, the attributes of the object there, its background and its style. Part 2 (`seecoder`): the backbone and the text-to-image
model stay as they are; decoder and query transformer learn from the plain diffusion loss (Xu et al. 2024, section 3.3), the
scene's own picture as its prompt, zeros in its place now and then for guidance.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d, binary_cross_entropy_with_logits, cross_entropy

from ..seecoder.network import SeeCoder
from ..seecoder.sizes import Sizes
from . import train_text_to_image as base
from .autoencoder import SCALE, Autoencoder
from .nets import CONTEXT, attention_for_training, initialise, mixed_precision
from .optim import Trainer
from .scenes import masks, render, sample_scene

MINI = Sizes(embed=20, depths=(2, 2, 2, 2), heads=(1, 2, 4, 8), window=4, mlp=(40, 80, 160, 320), width=CONTEXT, decoder_hidden=CONTEXT, decoder_layers=2,
             queries=148, query_hidden=CONTEXT, query_layers=6, position=False)
BACKBONE_BATCH, BATCH, POOL = 64, 48, 16_000
BACKBONE_RATE, RATE = 2e-3, 1e-3
TRAIN_SEED = 4_000_000
DROPOUT = 0.1
# a plain object has no second colour to read
OF_OBJECT = {name: words for name, words in base.OF_OBJECT.items() if name != "color2"}
CELLS = 16  # of the finest map


def new_seecoder(sizes: Sizes = MINI) -> SeeCoder:
    """An untrained network with layers of torch's start values, residual branches of the backbone as they come."""
    import comfy.ops

    net = SeeCoder(sizes, comfy.ops.disable_weight_init, dtype=torch.float32)
    initialise(net)
    for name, parameter in net.named_parameters():
        if name.endswith(("bias_table", "level_embed", "level_embed.weight", "init_query.weight", "query_pos_embedding.weight")):
            torch.nn.init.normal_(parameter, std=0.02 if "table" in name else 0.5)
    return net


def official_names(net: SeeCoder) -> dict[str, torch.Tensor]:
    """The network's tensors as a file of the official layout, so that the same loader takes both.

    The decoder's folded value path becomes value rows with an identity as output projection, its dead query and key rows are zero.
    """
    width, out = net.sizes.width, {}
    packed: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in net.state_dict().items():
        parts = key.split(".")
        if parts[:2] == ["imdecoder", "layers"]:
            stem = f"imdecoder.transformer.layers.{parts[2]}"
            if parts[3] == "value_path":
                zeros = torch.zeros(2 * width, *tensor.shape[1:], dtype=tensor.dtype)
                out[f"{stem}.self_attn.in_proj_{parts[4]}"] = torch.cat([zeros, tensor])
                out[f"{stem}.self_attn.out_proj.{parts[4]}"] = torch.eye(width) if parts[4] == "weight" else torch.zeros(width)
                continue
            key = ".".join([stem, *parts[3:]])
        elif parts[1] in ("inproj_layers", "lateral_layers"):
            inner = {"inproj_layers": {"linear": "0.", "norm": "1."}, "lateral_layers": {"linear": "", "norm": "norm."}}[parts[1]][parts[3]]
            key = f"imdecoder.{parts[1]}.{parts[2]}.{inner}{parts[4]}"
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        elif parts[1] in ("cross", "self_attention"):
            stem = f"qtransformer.transformer_{'crossatt' if parts[1] == 'cross' else 'selfatt'}_layers.{parts[2]}"
            inner = f"{stem}.{'multihead_attn' if parts[1] == 'cross' else 'self_attn'}"
            if parts[3] in ("to_q", "to_k", "to_v"):
                packed.setdefault(f"{inner}.in_proj_{parts[4]}", {})[parts[3]] = tensor
                continue
            key = f"{stem}.norm.{parts[4]}" if parts[3] == "norm" else f"{inner}.out_proj.{parts[4]}"
        elif parts[1] == "feed_forward":
            key = ".".join(["qtransformer.transformer_feedforward_layers", *parts[2:]])
        out[key] = tensor
    out.update({key: torch.cat([rows["to_q"], rows["to_k"], rows["to_v"]]) for key, rows in packed.items()})
    # stored in official files, read by nothing
    out.update({"imencoder.norm0.weight": torch.ones(net.sizes.embed), "imencoder.norm0.bias": torch.zeros(net.sizes.embed)})
    return {f"ctx.image.{key}": tensor.contiguous() for key, tensor in out.items()}


def draw(first_seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """(pictures uint8 [n, 3, 128, 128], share of each cell that each of two objects covers [n, 2, 16, 16], class numbers [n, 2] or [n])."""
    images = np.empty((count, 3, 128, 128), np.uint8)
    shares = torch.zeros(count, 2, CELLS, CELLS)
    labels = {name: torch.zeros(count, 2, dtype=torch.long) for name in OF_OBJECT} | {name: torch.zeros(count, dtype=torch.long) for name in base.OF_SCENE}
    for i in range(count):
        scene = sample_scene(first_seed + i)
        images[i] = (render(scene) * 255 + 0.5).transpose(2, 0, 1)
        shares[i, :len(scene.objects)] = adaptive_avg_pool2d(torch.from_numpy(masks(scene)), CELLS)
        for name, words in OF_OBJECT.items():
            for j, obj in enumerate(scene.objects):
                labels[name][i, j] = words.index(getattr(obj, name))
        for name, words in base.OF_SCENE.items():
            labels[name][i] = words.index(getattr(scene, name))
    return torch.from_numpy(images), shares, labels


def reading_loss(logits: torch.Tensor, shares: torch.Tensor, labels: dict[str, torch.Tensor]) -> torch.Tensor:
    """Loss of one map: is an object there, which attributes has it; background and style from every cell.

    logits [B, h, w, classes]: one for "object", then those of OF_OBJECT and base.OF_SCENE in order. shares [B, 2, h, w].
    """
    best, which = shares.max(1)
    there = best > 0.4
    loss = binary_cross_entropy_with_logits(logits[..., 0], (best > 0.4).float())
    rows = torch.arange(len(logits))[:, None, None].expand_as(which)
    start = 1
    for name, words in (OF_OBJECT | base.OF_SCENE).items():
        mine = logits[..., start:start + len(words)]
        start += len(words)
        if name in OF_OBJECT:
            if bool(there.any()):
                loss = loss + cross_entropy(mine[there], labels[name][rows, which][there])
        else:
            loss = loss + cross_entropy(mine.flatten(0, 2), labels[name][:, None, None].expand_as(which).flatten())
    return loss


def train_backbone(folder: Path, minutes: float, device: torch.device, seed: int = 0, resume: bool = True) -> tuple[dict, dict]:
    """(state dict of the backbone alone, metadata). folder: where the state is kept. Raises KeyboardInterrupt, with the state saved."""
    torch.manual_seed(seed)
    images, shares, labels = draw(TRAIN_SEED, POOL)
    classes = 1 + sum(len(words) for words in (OF_OBJECT | base.OF_SCENE).values())
    swin = new_seecoder().imencoder
    model = torch.nn.ModuleDict({"swin": swin, "heads": torch.nn.ModuleList(torch.nn.Linear(channels, classes) for channels in MINI.channels[1:])}).to(device)
    matrices = {name for name, p in model.named_parameters() if name.startswith("swin.layers.") and p.ndim == 2 and "table" not in name}
    trainer = Trainer(model, folder, minutes, BACKBONE_RATE, seed, muon=matrices)
    if resume:
        trainer.resume()
    going = True
    with trainer.saving():
        while going:
            pick = torch.randint(POOL, (BACKBONE_BATCH,), generator=trainer.generator)
            wanted = {name: values[pick].to(device) for name, values in labels.items()}
            with mixed_precision(device.type):
                maps = model["swin"](images[pick].to(device).float() / 255)
                logits = [head(x) for head, x in zip(model["heads"], maps)]
            loss = sum(reading_loss(x.float(), adaptive_avg_pool2d(shares[pick].to(device), x.shape[1:3]), wanted) for x in logits)
            going = trainer.update(loss, BACKBONE_BATCH)
    trainer.report()
    state = {key.removeprefix("swin."): value for key, value in trainer.averaged().items() if key.startswith("swin.")}
    return state, {"recipe": "seecoder_backbone", **trainer.record(BACKBONE_BATCH), "data_seed": TRAIN_SEED}


def train(folder: Path, minutes: float, device: torch.device, backbone: dict, unet: torch.nn.Module, autoencoder: Autoencoder, seed: int = 0,
          resume: bool = True) -> tuple[dict, dict]:
    """Train decoder and query transformer for `minutes`; returns (official state dict, metadata).

    backbone: state dict of the Swin; unet: the frozen text-to-image UNet. Raises KeyboardInterrupt, with the state saved.
    """
    torch.manual_seed(seed)
    net = new_seecoder()
    net.imencoder.load_state_dict(backbone)
    net.imencoder.requires_grad_(False)
    net, unet = net.to(device), unet.to(device).requires_grad_(False)
    images, _, _ = draw(TRAIN_SEED + POOL, POOL)
    latents = []
    with torch.inference_mode(), mixed_precision("cpu"):
        for batch in images.split(100):
            latents.append((autoencoder.encode(batch.float() / 127.5 - 1) * SCALE).half())
    latents, abar = torch.cat(latents).clone(), base.schedule().to(device)
    matrices = {name for name, p in net.named_parameters() if p.requires_grad and p.ndim == 2 and not name.endswith(("embed", "embed.weight", "query.weight", "embedding.weight"))}
    trainer = Trainer(net, folder, minutes, RATE, seed, muon=matrices)
    if resume:
        trainer.resume()
    g, going = trainer.generator, True
    with trainer.saving():
        while going:
            pick = torch.randint(POOL, (BATCH,), generator=g)
            clean = latents[pick].to(device).float()
            t = base.batch_steps(g, BATCH).to(device)
            noise = base.draw_noise(clean.shape, g).to(device)
            a = abar[t][:, None, None, None]
            heard = (torch.rand(BATCH, generator=g) >= DROPOUT).to(device)
            with mixed_precision(device.type):
                context = net(images[pick].to(device).float() / 255) * heard[:, None, None]
                predicted = unet(a.sqrt() * clean + (1 - a).sqrt() * noise, t.float(), context=context,
                                 transformer_options={"optimized_attention_override": attention_for_training}).float()
            loss = (base.weights_at(abar[t]) * (predicted - noise).square().mean((1, 2, 3))).mean()
            going = trainer.update(loss, BATCH)
    trainer.report()
    net.cpu().load_state_dict(trainer.averaged())
    return official_names(net), {"recipe": "seecoder", **trainer.record(BATCH), "data_seed": TRAIN_SEED + POOL, "dropout": DROPOUT}
