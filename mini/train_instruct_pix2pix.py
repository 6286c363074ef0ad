"""Training recipe of the mini edit model: InstructPix2Pix (Brooks et al., CVPR 2023, section 3.2) on drawn triples.

The text-to-image model with four more input channels, the latent of the picture before, as the VAE gives it (not scaled by 0.18215). 5 % of the
instructions, 5 % of the pictures and 5 % of both are left out, for guidance with two scales.

Most of a scene is flat background, which is learned at once; cells that hold an object, in either picture, count more in the loss, so that what is not
spoken of learns to stay. A share of the rows asks for two edits at once (`compounds`), in one sentence or by joined text states. Another share has an
instruction's words before the padding of the empty text: Visii learns words alone, and without these rows the model read its edits off the padding,
which sums up the text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from . import train_text_to_image as base
from .autoencoder import SCALE, Autoencoder
from .checkpoint import TEXT_PREFIX, UNET_PREFIX
from .compounds import GAP, compound, join
from .instructions import triple, vocabulary
from .nets import attention_for_training, mixed_precision, new_text_encoder, new_unet, text_states
from .optim import Trainer
from .scenes import render
from .tokens import GrammarTokens

BATCH, POOL, RATE, TRAIN_SEED = 64, 24_000, 1e-3, 9_000_000
COMPOUNDS, COMPOUND_SHARE, COMPOUND_SEED = 8_000, 0.3, 9_500_000  # pool, share of the rows and seeds of two edits at once
WORDS_ALONE = 0.3  # of the rows of one edit
DROPOUT = 0.05  # of text alone, of the picture alone, of both
# the picture's channels start as a share of the noisy latent's: the net then sees the picture through the noise from the first step on (the paper starts at zero)
SEEN = 0.5
OBJECTS = 3.0  # weight of a cell that holds an object, of the background's
DRAWN = 0.35  # difference from the border's latent, in any channel, from which a cell holds an object
FIRST = "input_blocks.0.0.weight"


def start_from(weights: dict[str, torch.Tensor], tokens: GrammarTokens) -> dict[str, torch.Tensor]:
    """State dict of {"unet": 8 channels, "text": words of `tokens`} from a member's weights: its first convolution widened, its words kept, new words drawn."""
    state = {f"unet.{key[len(UNET_PREFIX):]}": value for key, value in weights.items() if key.startswith(UNET_PREFIX)}
    state |= {f"text.{key[len(TEXT_PREFIX):]}": value for key, value in weights.items() if key.startswith(TEXT_PREFIX)}
    first = state[f"unet.{FIRST}"]
    if first.shape[1] == 4:
        state[f"unet.{FIRST}"] = torch.cat([first, SEEN * SCALE * first], 1)
    table = "text.text_model.embeddings.token_embedding.weight"
    old, known = state[table], weights["token_ids"].tolist()
    new = old.std() * torch.randn(len(tokens.ids) + 1, old.shape[1], generator=torch.Generator().manual_seed(0))
    new[-1] = old[-1]
    for row, token in enumerate(tokens.ids):
        if token in known:
            new[row] = old[known.index(token)]
    return {**state, table: new}


def precompute(folder: Path, autoencoder: Autoencoder, count: int, draw: Callable, first: int) -> torch.Tensor:
    """Latents of the pictures before and after at unit spread, fp16 [count, 2, 4, 16, 16], of draw(first), draw(first + 1) ...; made once, then read from `folder`."""
    # of another autoencoder, or another grammar, they would be useless, silently
    made = repr([draw(first + i) for i in range(40)]).encode()
    digest = hashlib.sha256(made + b"".join(v.numpy().tobytes() for _, v in sorted(autoencoder.state_dict().items()))).hexdigest()[:12]
    file = Path(folder) / f"pairs-{count}-{digest}.safetensors"
    if file.exists():
        return load_file(file)["latents"]
    parts = []
    for start in range(0, count, 100):
        found = [draw(first + i) for i in range(start, min(start + 100, count))]
        drawn = np.stack([render(scene) for one in found for scene in (one.before, one.after)])
        with torch.inference_mode(), mixed_precision("cpu"):
            parts.append((autoencoder.encode(torch.from_numpy(drawn).movedim(-1, 1) * 2 - 1) * SCALE).half())
        if start % 2000 == 0:
            print(f"pairs: {start} of {count}", flush=True)
    latents = torch.cat(parts).clone(memory_format=torch.contiguous_format).unflatten(0, (-1, 2))
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    save_file({"latents": latents}, partial)
    partial.replace(file)
    return latents


class Rows:
    """Pools of triples and of compounds, and batches of both."""

    def __init__(self, folder: Path, autoencoder: Autoencoder, tokens: GrammarTokens):
        self.latents = torch.cat([precompute(folder, autoencoder, POOL, triple, TRAIN_SEED), precompute(folder, autoencoder, COMPOUNDS, compound, COMPOUND_SEED)])
        singles = [triple(TRAIN_SEED + i).instruction for i in range(POOL)]
        pairs = [compound(COMPOUND_SEED + i) for i in range(COMPOUNDS)]
        self.empty = tokens.encode("")
        # of single instructions, of sentences that ask for two edits, and of the two instructions alone
        self.words = torch.stack([tokens.encode(text) for text in singles + [one.instruction for one in pairs]])
        self.first, self.second = (torch.stack([tokens.encode(getattr(one, which).instruction) for one in pairs]) for which in ("first", "second"))

    def batch(self, size: int, g: torch.Generator) -> tuple[torch.Tensor, ...]:
        """(latents [size, 2, 4, 16, 16], ids [size, 77], ids of what `join` puts among their states, where and how many of those: 0 for none)."""
        two, other = torch.rand(size, generator=g) < COMPOUND_SHARE, torch.rand(size, generator=g)
        single, double = torch.randint(POOL, (size,), generator=g), torch.randint(COMPOUNDS, (size,), generator=g)
        pick = torch.where(two, POOL + double, single)
        joined, alone = two & (other < 0.5), ~two & (other < WORDS_ALONE)
        ids = torch.where(joined[:, None], self.first[double], self.words[pick])
        more = torch.where(joined[:, None], self.second[double], ids)
        ids = torch.where(alone[:, None], self.empty, ids)
        return self.latents[pick], ids, more, torch.where(alone, -GAP, lengths(ids)), lengths(more) * (joined | alone)


def lengths(ids: torch.Tensor) -> torch.Tensor:
    """Number of tokens before the first end token [B], the start token counted, of compact ids [B, 77]."""
    return (ids[:, 1:] == ids[:, -1:]).int().argmax(1) + 1


def cell_weights(*pictures: torch.Tensor) -> torch.Tensor:
    """Weight of each cell's error [B, 1, h, w], of mean 1: OBJECTS where any of the latents [B, 4, h, w] differs from the middle of its border, else 1."""
    drawn = torch.zeros_like(pictures[0][:, :1], dtype=torch.bool)
    for latent in pictures:
        border = torch.cat([latent[:, :, 0], latent[:, :, -1], latent[:, :, :, 0], latent[:, :, :, -1]], 2)
        drawn |= ((latent - border.median(2).values[:, :, None, None]).abs() > DRAWN).any(1, keepdim=True)
    weights = torch.where(drawn, OBJECTS, 1.0)
    return weights / weights.mean()


def train(folder: Path, minutes: float, device: torch.device, weights: dict[str, torch.Tensor], autoencoder: Autoencoder, seed: int = 0, resume: bool = True,
          compiled: bool = False) -> tuple[dict, dict]:
    """Train UNet and text encoder for `minutes`; returns (weights under a member's keys, metadata).

    weights: a member to start from. compiled: through torch.compile. Raises KeyboardInterrupt, with the state saved.
    """
    torch.manual_seed(seed)
    tokens = GrammarTokens(vocabulary())
    model = torch.nn.ModuleDict({"unet": new_unet(in_channels=8), "text": new_text_encoder(tokens.unknown + 1)})
    model.load_state_dict(start_from(weights, tokens), strict=False)
    model.to(device)
    rows, abar = Rows(folder, autoencoder, tokens), base.schedule().to(device)
    trainer = Trainer(model, folder, minutes, RATE, seed, muon=base.muon_weights(model))
    if resume:
        trainer.resume()
    g, going = trainer.generator, True

    def encode(ids, more, end, count):
        # not compiled: how many rows are joined changes with every batch
        with mixed_precision(device.type):
            states = text_states(model["text"], ids)
            if (used := count > 0).any():
                states = states.index_put((used,), join(states[used], text_states(model["text"], more[used]), end[used], count[used]))
        return states

    def predict(noisy, t, context):
        with mixed_precision(device.type):
            return model["unet"](noisy, t, context=context, transformer_options={"optimized_attention_override": attention_for_training}).float()

    if compiled:
        print("compiling, some minutes without a line", flush=True)
        predict = torch.compile(predict, dynamic=False)
    with trainer.saving():
        while going:
            latents, ids, more, end, count = rows.batch(BATCH, g)
            before, clean = latents.to(device).float().unbind(1)
            chance = torch.rand(BATCH, generator=g)
            blind, mute = (chance < 2 * DROPOUT), (chance >= DROPOUT) & (chance < 3 * DROPOUT)
            ids, count = torch.where(mute[:, None], rows.empty, ids), count * ~mute
            t = base.batch_steps(g, BATCH).to(device)
            noise = base.draw_noise(clean.shape, g).to(device)
            a = abar[t][:, None, None, None]
            picture = before / SCALE * (~blind).to(device)[:, None, None, None]
            context = encode(*(x.to(device) for x in (ids, more, end, count)))
            predicted = predict(torch.cat([a.sqrt() * clean + (1 - a).sqrt() * noise, picture], 1), t.float(), context)
            loss = (base.weights_at(abar[t]) * (cell_weights(before, clean) * (predicted - noise).square()).mean((1, 2, 3))).mean()
            going = trainer.update(loss, BATCH)
    trainer.report()
    prefixes = {"unet.": UNET_PREFIX, "text.": TEXT_PREFIX}
    # the projection of the pooled output, which SD1.x UNets do not take, is untrained
    state = {prefixes[key[:5]] + key[5:]: value for key, value in trainer.averaged().items() if "text_projection" not in key}
    state["token_ids"] = torch.tensor(tokens.ids, dtype=torch.int32)
    return state, {
        "recipe": "instruct_pix2pix", **trainer.record(BATCH), "data_seed": TRAIN_SEED, "triples": POOL, "compounds": COMPOUNDS, "words_alone": WORDS_ALONE,
        "conditioning_dropout": DROPOUT, "object_weight": OBJECTS, "offset_noise": base.OFFSET_NOISE,
    }
