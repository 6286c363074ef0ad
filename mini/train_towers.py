"""Training recipe of the mini image and text towers: contrastive, as CLIP (Radford et al. 2021, section 2.3), on scenes and their edits.

The text tower is the edit model's text encoder, frozen, and a text projection. Two losses: a picture belongs to its caption, and the step from the
features of a picture before to those of it after belongs to its instruction. The second is what instruction learning asks of CLIP (a direction
between pictures, held against an instruction), for which 400 million captions are enough there and 8000 scenes are not here. A third loss asks each
local token what stands there: CLIP's tell by themselves, which is what Versatile Diffusion's pictures as prompts live on. With the first two alone,
a linear reading of them knew the shape of one object in 47 of 100 scenes (by chance 25).
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
from .scenes import COLORS, PATTERNS, SHAPES, SIZES, Scene, masks, render
from .tokens import GrammarTokens
from .towers import Towers, file_state, from_file

BATCH, POOL, RATE, TRAIN_SEED = 64, 24_000, 4e-3, 11_000_000
HELD_OUT, TESTED = 53_000_000, 64
SHARPEST = math.log(100.0)  # of the logit scale, as in the paper
GRID, COVERED = 8, 0.15  # tokens to a side; the part of a token's patch from which an object stands there
ASKED = {"shape": SHAPES, "color": tuple(COLORS), "pattern": PATTERNS, "size": tuple(SIZES)}  # of the object at a token
NOTHING = -1


def stands_at(scene: Scene) -> Tensor:
    """Class numbers int8 [4, 64] of `ASKED` for the object that covers most of each patch, rows first; NOTHING where none does."""
    if not scene.objects:
        return torch.full((len(ASKED), GRID * GRID), NOTHING, dtype=torch.int8)
    cover = torch.from_numpy(masks(scene)).unflatten(2, (GRID, -1)).unflatten(1, (GRID, -1)).mean((2, 4)).flatten(1)
    most, which = cover.max(0)
    numbers = torch.tensor([[names.index(getattr(obj, attribute)) for obj in scene.objects] for attribute, names in ASKED.items()])
    return torch.where(most >= COVERED, numbers[:, which], NOTHING).to(torch.int8)


class Answers(torch.nn.Module):
    """Reads local tokens: whether something stands there, and what. Kept out of the towers' file."""

    def __init__(self, width: int):
        super().__init__()
        self.sizes = [2, *map(len, ASKED.values())]
        self.read = torch.nn.Linear(width, sum(self.sizes))

    def loss(self, tokens: Tensor, there: Tensor) -> Tensor:
        """Cross-entropy, the questions' added up. tokens: [B, 64, P]; there: of `stands_at` [B, 4, 64]."""
        something, *answers = self.read(tokens).split(self.sizes, -1)
        there = there.long()
        seen = there[:, 0] != NOTHING
        losses = [cross_entropy(something.flatten(0, 1), seen.flatten().long())]
        losses += [cross_entropy(answer[seen], wanted[seen]) for answer, wanted in zip(answers, there.unbind(1), strict=True)]
        return torch.stack(losses).sum()


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


def train(folder: Path, minutes: float, device: torch.device, text: torch.nn.Module, tokens: GrammarTokens, seed: int = 0, start: dict[str, Tensor] | None = None,
          resume: bool = True) -> tuple[dict, dict]:
    """Train for `minutes`; returns (state dict as it is kept in the file, metadata). text: the frozen text encoder, with the words of `tokens`.

    start: the towers to begin with, as in the file; None for new ones.

    Raises KeyboardInterrupt, with the state saved.
    """
    torch.manual_seed(seed)
    net, text = Towers(), text.to(device).requires_grad_(False)
    if start:
        net.load_state_dict(from_file(start), strict=False)
    net = net.to(device)
    net.answers = Answers(net.text_projection.out_features).to(device)
    images, triples = draw(TRAIN_SEED, POOL)
    there = torch.stack([stands_at(scene) for found in triples for scene in (found.before, found.after)]).unflatten(0, (-1, 2))
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
                read, told = net.image_tokens(pixels).float(), net.text_features(states).float()
            seen = read[:, 0].unflatten(0, (BATCH, 2))
            scale = net.logit_scale.clamp(max=SHARPEST).exp()
            shown = seen[torch.arange(BATCH, device=device), sides.to(device)]
            loss = contrast(shown, told[:BATCH], scale) + contrast(seen[:, 1] - seen[:, 0], told[BATCH:], scale)
            loss = loss + net.answers.loss(read[:, 1:], there[pick].to(device).flatten(0, 1))
            going = trainer.update(loss, 2 * BATCH)
    trainer.report()
    net.load_state_dict(trainer.averaged())
    return file_state(net.state_dict()), {"recipe": "towers", **trainer.record(BATCH), "data_seed": TRAIN_SEED, **figures(net, text, tokens, device)}
