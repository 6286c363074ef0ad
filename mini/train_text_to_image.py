"""Training recipe of the text-to-image model: noise prediction on Stable Diffusion's schedule, captions of the scenes grammar.

Offset noise lets the net learn flat backgrounds from the words: SD's schedule leaves sqrt(abar) = 0.068 of signal at the
last step, and the mean of a plain background over 256 latent cells would otherwise be read from the noise.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from .autoencoder import SCALE, Autoencoder
from .captions import caption
from .nets import CONTEXT, END, attention_for_training, mixed_precision, new_text_encoder, new_unet, text_states
from .optim import Trainer
from .scenes import BACKGROUNDS, COLORS, PATTERNS, PLACES, SHAPES, SIZES, STYLES, sample_scene
from .tokens import GrammarTokens
from .train_autoencoder import pictures

BATCH, SCENES, LEARNING_RATE = 64, 40_000, 1e-3
TRAIN_SEED = 2_000_000
OFFSET_NOISE, PROMPT_DROPOUT, UNKNOWN_WORDS = 0.12, 0.1, 0.02
SNR_LIMIT, V_EXPONENT, STEP_EXPONENT, READING = 5.0, 0.85, 0.5, 0.1
# What a caption may say, with the words of each: of its first object, of its second, and of the scene.
OF_OBJECT = {"shape": SHAPES, "color": tuple(COLORS), "pattern": PATTERNS, "color2": tuple(COLORS), "size": tuple(SIZES), "place": tuple(PLACES)}
OF_SCENE = {"background": tuple(BACKGROUNDS), "style": STYLES}
SAID = [(0, name, words) for name, words in OF_OBJECT.items()] + [(1, name, words) for name, words in OF_OBJECT.items()] + [(None, name, words) for name, words in OF_SCENE.items()]
UNSAID = -100  # cross_entropy's ignore_index


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
        with torch.inference_mode(), mixed_precision("cpu"):
            parts += [(autoencoder.encode(b.float() / 127.5 - 1) * SCALE).half() for b in batch.split(100)]
        print(f"latents: {start + len(batch)} of {count}", flush=True)
    latents = torch.cat(parts).clone()
    file.parent.mkdir(parents=True, exist_ok=True)
    # half a file, from a run that was stopped here, would be taken for a whole one
    partial = file.with_suffix(".partial")
    save_file({"latents": latents}, partial)
    partial.replace(file)
    return latents


def batch_tokens(tokens: GrammarTokens, picks: list[int], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Fresh captions of the picked scenes: compact ids [B, 77] and what they say, class numbers [B, len(SAID)] or UNSAID.

    Some captions are dropped for guidance, a few words made unknown.
    """
    rows, empty = [], tokens.encode("")
    said = torch.full((len(picks), len(SAID)), UNSAID)
    seeds = torch.randint(1 << 40, (len(picks),), generator=generator).tolist()
    dropped = torch.rand(len(picks), generator=generator) < PROMPT_DROPOUT
    for row, (pick, seed, drop) in enumerate(zip(picks, seeds, dropped)):
        if drop:
            rows.append(empty)
            continue
        # One caption in four names everything, so that full prompts are no rarity.
        text, named, whole = caption(sample_scene(TRAIN_SEED + pick), seed, 1.0 if seed % 4 == 0 else 0.7)
        rows.append(tokens.encode(text))
        for column, (index, name, words) in enumerate(SAID):
            of = whole if index is None else named[index] if index < len(named) else {}
            if of.get(name):
                said[row, column] = words.index(of[name])
    ids = torch.stack(rows)
    padding = (ids == empty[1]) | (ids == empty[0])
    unknown = (torch.rand(ids.shape, generator=generator) < UNKNOWN_WORDS) & ~padding
    return ids.masked_fill(unknown, tokens.unknown), said


def reading_loss(states: torch.Tensor, ids: torch.Tensor, said: torch.Tensor, end: int, heads: torch.nn.Module, generator: torch.Generator) -> torch.Tensor:
    """Mean cross-entropy of what the caption says, read linearly from a random one of its end tokens.

    Stable Diffusion's text encoder comes pretrained; ours learns beside the UNet, to which a word is at first one token in 77.
    End tokens, three in four of all, come to carry the whole caption, each object with its own attributes, much earlier when
    asked for it. states [B, 77, C]; end: the end token's id.
    """
    first = (ids == end).int().argmax(1)
    place = first + (torch.rand(len(ids), generator=generator).to(first.device) * (ids.shape[1] - first)).long()
    logits = heads(states[torch.arange(len(ids), device=ids.device), place]).split([len(words) for _, _, words in SAID], 1)
    heard = [cross_entropy(x, said[:, i]) for i, x in enumerate(logits) if bool((said[:, i] != UNSAID).any())]
    return sum(heard) / max(1, len(heard))


def batch_steps(generator: torch.Generator, count: int) -> torch.Tensor:
    """Training steps t [count] with density proportional to t^STEP_EXPONENT, one from each of `count` equal shares.

    Layout and colours, which the words decide, are made above t = 500; the shares keep the loss from jumping with the draw.
    """
    share = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return (1000 * share ** (1 / (1 + STEP_EXPONENT))).long().clamp(max=999)


def draw_noise(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Unit noise [B, 4, h, w] with the offset that teaches backgrounds (see above)."""
    return torch.randn(shape, generator=generator) + OFFSET_NOISE * torch.randn(*shape[:2], 1, 1, generator=generator)


def weights_at(abar: torch.Tensor) -> torch.Tensor:
    """Weight of the squared error in eps at noise levels abar [B].

    Min-SNR weighting (Hang et al. 2023, eq. 5) for eps prediction: the last, nearly clean steps would crowd out layout. The
    second factor leans towards the loss in v (exponent 1; Salimans and Ho 2022): layout and colours are decided at the noisiest
    levels, where an error in the picture is a tiny error in eps and words are learned last.
    """
    noise_to_signal = (1 - abar) / abar
    return (SNR_LIMIT * noise_to_signal).clamp(max=1) * (1 + noise_to_signal) ** V_EXPONENT


def muon_weights(model: torch.nn.Module) -> set[str]:
    """Names of the hidden layers' matrices; tables, first and last layer, biases and norms stay with AdamW."""
    outer = ("unet.input_blocks.0.", "unet.out.", "reading.")
    return {k for k, p in model.named_parameters() if p.ndim >= 2 and "embedding" not in k and not k.startswith(outer)}


def train(folder: Path, minutes: float, device: torch.device, autoencoder: Autoencoder, seed: int = 0,
          weights: dict | None = None, resume: bool = True, compiled: bool = False) -> tuple[dict, dict]:
    """Train UNet and text encoder together for `minutes`; returns (state dict of the averaged weights, metadata).

    weights: state dict to start from, keys "unet." and "text.". folder: where state and latents are kept; resume: go on
    from the state that is there, whose weights then replace `weights`. Loss: see `weights_at`.
    compiled: through torch.compile. Raises KeyboardInterrupt, with the state saved.
    """
    torch.manual_seed(seed)
    tokens = GrammarTokens()
    model = torch.nn.ModuleDict({"unet": new_unet(), "text": new_text_encoder(tokens.unknown + 1)})
    if weights:
        model.load_state_dict(weights)
    model["reading"] = torch.nn.Linear(CONTEXT, sum(len(words) for _, _, words in SAID))
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
        with mixed_precision(device.type):
            context = text_states(model["text"], ids)
            predicted = model["unet"](noisy, t, context=context, transformer_options={"optimized_attention_override": attention_for_training})
        return predicted.float(), context.float()

    if compiled:
        print("compiling, some minutes without a line", flush=True)
        predict = torch.compile(predict, dynamic=False)
    going = True
    with trainer.saving():
        while going:
            pick = torch.randint(len(latents), (BATCH,), generator=g)
            ids, said = (x.to(device) for x in batch_tokens(tokens, pick.tolist(), g))
            clean = latents[pick].to(device).float()
            t = batch_steps(g, BATCH).to(device)
            noise = draw_noise(clean.shape, g).to(device)
            a = abar[t][:, None, None, None]
            predicted, states = predict(a.sqrt() * clean + (1 - a).sqrt() * noise, t.float(), ids)
            loss = (weights_at(abar[t]) * (predicted - noise).square().mean((1, 2, 3))).mean()
            loss = loss + READING * reading_loss(states, ids, said, tokens.compact[END], model["reading"], g)
            going = trainer.update(loss, BATCH)
    trainer.report()
    weighting = f"min-SNR {SNR_LIMIT:g}, (1 + noise / signal)^{V_EXPONENT:g}, steps t^{STEP_EXPONENT:g}"
    state = {key: value for key, value in trainer.averaged().items() if not key.startswith("reading.")}
    return state, {"recipe": "text_to_image", **trainer.record(BATCH), "data_seed": TRAIN_SEED, "scenes": len(latents),
                                "weighting": weighting, "reading": READING, "offset_noise": OFFSET_NOISE, "prompt_dropout": PROMPT_DROPOUT}
