"""Training recipe of the mini LoRA "strips": the decoder's self-attentions of the text-to-image model learn to look at the first panels of a strip.

A panel is a row of its own with a caption of its own; the later panels' queries also see the keys of the first ones, unmasked and unweighted, as a picture's
patches see each other. Everything but the transformer blocks that hold those self-attentions stays as it is.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch

from . import train_text_to_image as base
from .autoencoder import SCALE, Autoencoder
from .nets import attention_for_training, mixed_precision, text_states
from .optim import Trainer
from .scenes import Scene, masks, render
from .strips import ALONE, PANELS, TOGETHER, captions, sample_strip
from .tokens import GrammarTokens

BATCH, POOL, RATE, TRAIN_SEED = 2, 3_000, 2e-3, 7_000_000  # strips
SILENT = 0.8  # of the later captions name no looks
BLOCKS = range(3, 9)  # the host's output blocks with 4 x 4 and 8 x 8 tokens; at 16 x 16 attention would take half of a step
MATCHED, MATCHING = 8, 0.1  # tokens a side where matching is asked for, and its weight: where to look is learned long before it pays off in the picture
NOTHING, MIXED = 0, -1
EXCLUDED = -1e4  # a logit; minus infinity in a place that `where` leaves out still makes its gradient NaN
LORA = "lora_unet_"  # the host's LoRA names of a UNet's layers


def is_trained(name: str) -> bool:
    """Whether a parameter of the UNet learns: all of those transformer blocks. Their cross-attentions tell which of two things a place will show, which is what to look for."""
    parts = name.split(".")
    return parts[0] == "output_blocks" and int(parts[1]) in BLOCKS and "transformer_blocks" in parts


class StripAttention:
    """The host's `optimized_attention_override`: rows are strips of PANELS panels, [strips * PANELS, tokens, C]; later panels see the first ones and themselves.

    labels: what each token shows, [strips, PANELS, MATCHED * MATCHED]: NOTHING, the number of an object, or MIXED; None to match nothing. matches: gathers the
    matching loss of every layer of that size.
    """

    def __init__(self, labels: torch.Tensor | None = None):
        self.labels, self.matches = labels, []

    def __call__(self, original, q, k, v, heads, mask=None, transformer_options=None, **kwargs):
        part, number = transformer_options["block"]
        if part != "output" or number not in BLOCKS or k.shape[1] != q.shape[1]:
            return attention_for_training(original, q, k, v, heads, mask)
        strips, tokens = len(q) // PANELS, q.shape[1]
        first, later = zip(*(x.unflatten(0, (strips, PANELS)).split([ALONE, TOGETHER], 1) for x in (q, k, v)))
        alone = attention_for_training(original, *(x.flatten(0, 1) for x in first), heads)
        # every later panel: its own tokens, then those of the first panels
        keys, values = (torch.cat([own, seen.reshape(strips, 1, ALONE * tokens, -1).expand(-1, TOGETHER, -1, -1)], 2) for own, seen in zip(later[1:], first[1:]))
        together = attention_for_training(original, later[0].flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1), heads)
        if self.labels is not None and tokens == self.labels.shape[-1]:
            self.matches.append(matching_loss(later[0], keys, self.labels, heads))
        return torch.cat([x.unflatten(0, (strips, -1)) for x in (alone, together)], 1).flatten(0, 1)


def matching_loss(q: torch.Tensor, k: torch.Tensor, labels: torch.Tensor, heads: int) -> torch.Tensor:
    """How far the later panels' attention is from looking at what shows the same thing; mean of -log of a share.

    q [strips, TOGETHER, n, C], k [strips, TOGETHER, n + ALONE * n, C]: own tokens, then the first panels'. labels as in StripAttention. For a token of an object: the
    share of its attention to the first panels that goes to that object. For one of the background: the share of all its attention that does not go to their objects.
    How much of it goes to them at all is left to the pictures.
    """
    q, k = (x.float().unflatten(-1, (heads, -1)).transpose(2, 3) for x in (q, k))
    logits = q @ k.mT * q.shape[-1] ** -0.5
    n = q.shape[-2]
    own, shown = labels[:, ALONE:], labels[:, :ALONE].flatten(1)[:, None, None]  # of queries [strips, TOGETHER, n], of keys [strips, 1, 1, ALONE * n]
    same = (own[..., None] == shown) & (shown > NOTHING)
    seen = logits[..., n:]
    objects = seen.masked_fill(~same[:, :, None], EXCLUDED).logsumexp(-1) - seen.masked_fill((shown == MIXED)[:, :, None], EXCLUDED).logsumexp(-1)
    elsewhere = torch.cat([logits[..., :n], seen.masked_fill((shown != NOTHING)[:, :, None], EXCLUDED)], -1).logsumexp(-1) - logits.logsumexp(-1)
    share = torch.where((own > NOTHING)[:, :, None], objects, elsewhere)
    judged = ((own == NOTHING) | same.any(-1))[:, :, None].expand_as(share)
    return -share[judged].mean()


def labels_of(panel: Scene, shapes: list[str]) -> torch.Tensor:
    """What the MATCHED x MATCHED tokens of a panel show: 1 + the place of the object's shape in `shapes` where it covers most of one, NOTHING where nothing does, else MIXED."""
    shares = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(masks(panel)), MATCHED).flatten(1)
    found = torch.where(shares.sum(0) < 0.05, NOTHING, MIXED)
    for obj, share in zip(panel.objects, shares):
        found[share > 0.5] = 1 + shapes.index(obj.shape)
    return found


def precompute(autoencoder: Autoencoder, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of the training strips at unit spread, fp16 [count, PANELS, 4, 16, 16], and what their tokens show, int64 [count, PANELS, MATCHED * MATCHED]."""
    parts, labels = [], []
    for start in range(0, count, 50):
        strips = [sample_strip(TRAIN_SEED + i) for i in range(start, min(start + 50, count))]
        labels += [torch.stack([labels_of(panel, [obj.shape for obj in strip.panels[-1].objects]) for panel in strip.panels]) for strip in strips]
        drawn = np.stack([render(panel) for strip in strips for panel in strip.panels])
        with torch.inference_mode(), mixed_precision("cpu"):
            parts.append((autoencoder.encode(torch.from_numpy(drawn).movedim(-1, 1) * 2 - 1) * SCALE).half())
    return torch.cat(parts).clone().unflatten(0, (-1, PANELS)), torch.stack(labels)


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
    (latents, labels), abar = precompute(autoencoder, POOL), base.schedule().to(device)
    print(f"{POOL} strips drawn; {sum(p.numel() for p in start.values())} parameters learn", flush=True)
    trainer = Trainer(unet, folder, minutes, RATE, seed, muon={name for name, p in start.items() if p.ndim >= 2})
    if resume:
        trainer.resume()
    g, going = trainer.generator, True
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
            attention = StripAttention(labels[pick].to(device))
            with mixed_precision(device.type):
                with torch.no_grad():
                    context = text_states(text, ids)
                predicted = unet(a.sqrt() * clean + (1 - a).sqrt() * noise, t.float(), context=context, transformer_options={"optimized_attention_override": attention}).float()
            loss = (base.weights_at(abar[t]) * (predicted - noise).square().mean((1, 2, 3))).mean()
            loss = loss + MATCHING * sum(attention.matches) / len(attention.matches)
            going = trainer.update(loss, BATCH * PANELS)
    trainer.report()
    averaged = trainer.averaged()
    return as_lora({name: averaged[name] for name in start}, start), {
        "recipe": "strips", **trainer.record(BATCH * PANELS), "data_seed": TRAIN_SEED, "strips": POOL, "silent": SILENT, "matching": MATCHING}
