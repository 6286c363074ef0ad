"""Training recipe of the mini image and text towers: contrastive, as CLIP (Radford et al. 2021, section 2.3), on scenes and their edits.

The text tower is the edit model's text encoder, frozen, and a text projection. Two losses: a picture belongs to its caption, and the step from the
features of a picture before to those of it after belongs to its instruction. The second is what instruction learning asks of CLIP (a direction
between pictures, held against an instruction), for which 400 million captions are enough there and 8000 scenes are not here.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from .captions import caption
from .instructions import triple
from .nets import mixed_precision, text_states
from .optim import Trainer
from .scenes import render
from .tokens import GrammarTokens
from .towers import Towers, file_state

BATCH, POOL, RATE, TRAIN_SEED = 64, 8_000, 1e-3, 11_000_000
HELD_OUT, TESTED = 53_000_000, 64
SHARPEST = math.log(100.0)  # of the logit scale, as in the paper


def draw(first_seed: int, count: int) -> tuple[Tensor, list]:
    """(pictures before and after, uint8 [n, 2, 3, 128, 128], their triples)."""
    triples = [triple(first_seed + i) for i in range(count)]
    images = np.empty((count, 2, 3, 128, 128), np.uint8)
    for row, found in enumerate(triples):
        for side, scene in enumerate((found.before, found.after)):
            images[row, side] = (render(scene) * 255 + 0.5).transpose(2, 0, 1)
    return torch.from_numpy(images), triples


def contrast(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross-entropy of features [B, P] whose rows belong together, by cosine times `scale`."""
    logits = scale * normalize(a, dim=-1) @ normalize(b, dim=-1).t()
    rows = torch.arange(len(a), device=a.device)
    return (cross_entropy(logits, rows) + cross_entropy(logits.t(), rows)) / 2


def batch_texts(tokens: GrammarTokens, triples: list, sides: list[int], seeds: list[int]) -> Tensor:
    """Compact ids [2 B, 77]: a caption of one side of each triple, then the instructions."""
    captions = [caption((found.before, found.after)[side], seed, 1.0 if seed % 4 == 0 else 0.7)[0] for found, side, seed in zip(triples, sides, seeds)]
    return torch.stack([tokens.encode(text) for text in (*captions, *(found.instruction for found in triples))])


@torch.no_grad()
def figures(net: Towers, text: torch.nn.Module, tokens: GrammarTokens, device: torch.device) -> dict:
    """On held-out triples: how often a picture's caption is the nearest of TESTED, and the mean cosine of an edit's direction with its instruction and with others'."""
    images, triples = draw(HELD_OUT, TESTED)
    ids = batch_texts(tokens, triples, [0] * TESTED, list(range(0, 4 * TESTED, 4)))
    features = normalize(net.text_features(text_states(text, ids.to(device))), dim=-1)
    before, after = (net.image_features(images[:, side].to(device).float() / 255) for side in (0, 1))
    nearest = (normalize(before, dim=-1) @ features[:TESTED].t()).argmax(1)
    alike = normalize(after - before, dim=-1) @ features[TESTED:].t()
    own = alike.diagonal()
    others = (alike.sum() - own.sum()) / (alike.numel() - TESTED)
    rows = torch.arange(TESTED, device=device)
    return {"caption_nearest": round(float((nearest == rows).float().mean()), 4), "of": TESTED, "instruction_nearest": round(float((alike.argmax(1) == rows).float().mean()), 4),
            "direction_similarity": round(float(own.mean()), 4), "direction_similarity_of_others": round(float(others), 4)}


def train(folder: Path, minutes: float, device: torch.device, text: torch.nn.Module, tokens: GrammarTokens, seed: int = 0, resume: bool = True) -> tuple[dict, dict]:
    """Train for `minutes`; returns (state dict as it is kept in the file, metadata). text: the frozen text encoder, with the words of `tokens`.

    Raises KeyboardInterrupt, with the state saved.
    """
    torch.manual_seed(seed)
    net, text = Towers().to(device), text.to(device).requires_grad_(False)
    images, triples = draw(TRAIN_SEED, POOL)
    matrices = {name for name, p in net.named_parameters() if name.startswith("vision.vision_model.encoder.") and p.ndim == 2}
    trainer = Trainer(net, folder, minutes, RATE, seed, muon=matrices)
    if resume:
        trainer.resume()
    g, going = trainer.generator, True
    with trainer.saving():
        while going:
            pick = torch.randint(POOL, (BATCH,), generator=g)
            sides = torch.randint(2, (BATCH,), generator=g)
            seeds = torch.randint(1 << 40, (BATCH,), generator=g).tolist()
            ids = batch_texts(tokens, [triples[i] for i in pick.tolist()], sides.tolist(), seeds).to(device)
            pixels = images[pick].to(device).flatten(0, 1).float() / 255
            with mixed_precision(device.type):
                with torch.no_grad():
                    states = text_states(text, ids)
                seen, told = net.image_features(pixels).float().unflatten(0, (BATCH, 2)), net.text_features(states).float()
            scale = net.logit_scale.clamp(max=SHARPEST).exp()
            shown = seen[torch.arange(BATCH, device=device), sides.to(device)]
            loss = contrast(shown, told[:BATCH], scale) + contrast(seen[:, 1] - seen[:, 0], told[BATCH:], scale)
            going = trainer.update(loss, 2 * BATCH)
    trainer.report()
    net.load_state_dict(trainer.averaged())
    return file_state(net.state_dict()), {"recipe": "towers", **trainer.record(BATCH), "data_seed": TRAIN_SEED, **figures(net, text, tokens, device)}
