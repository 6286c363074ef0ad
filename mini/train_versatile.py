"""Training recipe of the mini Versatile Diffusion: an attention set that reads pictures, beside the text-to-image model's (Xu et al. 2023, section 3.2).

The lineage of the original: the set starts as a copy of the one for texts (which distill_versatile.py may have taught first), and learns to draw
a scene after the context of its own picture, from the family's image tower (image variation). All else stays as it is, to the bit. Zeros take the
context's place now and then, for guidance.

The original's flows never meet in training. At this size mixtures would be strange to the residual blocks, so a share of the batches runs
both sets at a drawn ratio. There the caption is the picture's own, or that of another scene, and the scene to draw is then the text's as often as the ratio says:
a set that only ever saw the two agree would outshout a text that does not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..versatile_diffusion.contexts import encode_pixels, squashed
from ..versatile_diffusion.dual import SETS, DualUNet, place
from ..versatile_diffusion.keys import CONTEXT, IMAGE, Name, group_of
from . import train_text_to_image as base
from .autoencoder import Autoencoder
from .checkpoint import UNET_PREFIX
from .nets import attention_for_training, mixed_precision, text_states, unet_config
from .optim import Trainer
from .tokens import GrammarTokens
from .train_autoencoder import pictures
from .train_instruct_pix2pix import cell_weights
from .versatile import is_image_set

BATCH, POOL, RATE, WARMUP = 64, 16_000, 1e-3, 40
DROPOUT = 0.1  # of all a row reads
MIXED, APART = 0.25, 0.5  # share of the batches that run both sets; of their rows, that read the caption of another scene
MEASURED = 256  # captions and pictures whose tokens are measured
READERS = ("attn2.to_k.weight", "attn2.to_v.weight")  # of a context; without biases


def encode(clip_vision, images: Tensor) -> Tensor:
    """Contexts [n, 65, 128] of pictures uint8 [n, 3, 128, 128]: what `encode_pictures` gives with its usual crop, in one batch."""
    import comfy.model_management as mm
    from comfy.clip_vision import clip_preprocess

    mm.load_model_gpu(clip_vision.patcher)
    image = squashed(images.movedim(1, -1).to(clip_vision.load_device).float() / 255)
    pixels = clip_preprocess(image, size=clip_vision.image_size, mean=clip_vision.image_mean, std=clip_vision.image_std, crop=False)
    return encode_pixels(clip_vision.model, pixels.float()).cpu()


def precompute(folder: Path, clip_vision, count: int) -> Tensor:
    """Contexts of the first `count` training scenes, fp16 [count, 65, 128]; made once, then read from `folder`."""
    # named after the tower's weights: contexts of another one are useless, silently
    digest = hashlib.sha256(b"".join(v.float().cpu().numpy().tobytes() for _, v in sorted(clip_vision.model.state_dict().items()))).hexdigest()[:12]
    file = Path(folder) / f"contexts-{count}-{digest}.safetensors"
    if file.exists():
        return load_file(file)["contexts"]
    parts = []
    for start in range(0, count, 50):
        with torch.inference_mode():
            parts.append(encode(clip_vision, pictures(base.TRAIN_SEED + start, min(50, count - start))).half())
        if start % 2000 == 0:
            print(f"contexts: {start} of {count}", flush=True)
    contexts = torch.cat(parts).clone()
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    save_file({"contexts": contexts}, partial)
    partial.replace(file)
    return contexts


def start_from(unet: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of `DualUNet` whose set for pictures is a copy of the one for texts. unet: the text-to-image model's."""
    return unet | {place(Name(IMAGE, key)): value.clone() for key, value in unet.items() if group_of(key) == CONTEXT}


def scaled(image_set: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    """A set for pictures that reads contexts 1 / `factor` as long as if they were as long as before."""
    return {key: value * factor if key.endswith(READERS) else value for key, value in image_set.items()}


def new_unet(state: dict[str, Tensor], learns: Callable[[str], bool] = is_image_set) -> DualUNet:
    """The UNet with both sets in float32, of which the tensors that `learns` names are to learn. state: of `start_from`."""
    import comfy.ops

    unet = DualUNet(**unet_config(), sets=SETS, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    unet.load_state_dict(state)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(learns(name))
    return unet


@torch.no_grad()
def measure(text: torch.nn.Module, tokens: GrammarTokens, contexts: Tensor) -> float:
    """How many times as long as a picture's tokens a text's are (root mean square, padding included).

    The copied set expects tokens of that length, and weights that read short ones would learn slowly: an optimiser's steps do not grow with what the input lacks.
    """
    count = min(MEASURED, len(contexts))
    ids, _ = base.batch_tokens(tokens, list(range(count)), torch.Generator().manual_seed(0))
    return float((text_states(text, ids).square().mean() / contexts[:count].float().square().mean()).sqrt())


def draw_rows(g: torch.Generator, size: int, pool: int) -> tuple[float, Tensor, Tensor, Tensor]:
    """(share of the text set, and for each row [size] the scenes whose picture is read, whose caption is read, and which is drawn)."""
    mixed, ratio = torch.rand(2, generator=g).tolist()
    ratio = ratio if mixed < MIXED else 0.0
    seen = torch.randint(pool, (size,), generator=g)
    told = torch.where(torch.rand(size, generator=g) < APART, seen.roll(1), seen)
    return ratio, seen, told, torch.where(torch.rand(size, generator=g) < ratio, told, seen)


def train(folder: Path, minutes: float, device: torch.device, unet: torch.nn.Module, text: torch.nn.Module, clip_vision, autoencoder: Autoencoder, seed: int = 0,
          start: dict[str, Tensor] | None = None, resume: bool = True) -> tuple[dict, dict]:
    """Train the set for pictures for `minutes`; returns (its weights as they are kept in the file, metadata).

    unet, text: the text-to-image model. clip_vision: the image tower. start: the set to begin with, as in the file; None for a copy of the one for texts.
    Raises KeyboardInterrupt, with the state saved.
    """
    torch.manual_seed(seed)
    tokens, text = GrammarTokens(), text.requires_grad_(False)
    latents, contexts = base.precompute(folder, autoencoder, POOL), precompute(folder, clip_vision, POOL)
    # The set learns to read contexts of the length of texts; what the factor does is put into its weights in the end.
    factor = measure(text, tokens, contexts)
    state = start_from(unet.state_dict())
    if start:
        state |= scaled({key[len(UNET_PREFIX):]: value for key, value in start.items()}, 1 / factor)
    net, text, abar = new_unet(state).to(device), text.to(device), base.schedule().to(device)
    learn = {name: p for name, p in net.named_parameters() if p.requires_grad}
    print(f"{sum(p.numel() for p in learn.values())} parameters learn; a picture's tokens are made {factor:.2f} times as long", flush=True)
    trainer = Trainer(net, folder, minutes, RATE, seed, muon={name for name, p in learn.items() if p.ndim >= 2}, warmup=WARMUP)
    if resume:
        trainer.resume()
    g, going, empty = trainer.generator, True, tokens.encode("")
    options = {"optimized_attention_override": attention_for_training}
    with trainer.saving():
        while going:
            ratio, seen, told, drawn = draw_rows(g, BATCH, len(latents))
            heard = torch.rand(BATCH, generator=g) >= DROPOUT
            clean = latents[drawn].to(device).float()
            picture = (contexts[seen].float() * factor * heard[:, None, None]).to(device)
            t = base.batch_steps(g, BATCH).to(device)
            noise = base.draw_noise(clean.shape, g).to(device)
            a = abar[t][:, None, None, None]
            noisy = a.sqrt() * clean + (1 - a).sqrt() * noise
            with mixed_precision(device.type):
                if ratio > 0:
                    ids, _ = base.batch_tokens(tokens, told.tolist(), g)
                    with torch.no_grad():
                        words = text_states(text, torch.where(heard[:, None], ids, empty).to(device))
                    predicted = net(noisy, t.float(), context=words, vd_image=picture, vd_ratio=ratio, transformer_options=options)
                else:
                    predicted = net(noisy, t.float(), context=picture, vd_ratio=0.0, transformer_options=options)
            loss = (base.weights_at(abar[t]) * (cell_weights(clean) * (predicted.float() - noise).square()).mean((1, 2, 3))).mean()
            going = trainer.update(loss, BATCH)
    trainer.report()
    averaged = trainer.averaged()
    image_set = scaled({name: averaged[name] for name in learn}, factor)
    return {UNET_PREFIX + name: value for name, value in image_set.items()}, {
        "recipe": "versatile", **trainer.record(BATCH), "data_seed": base.TRAIN_SEED, "scenes": len(latents), "dropout": DROPOUT, "mixed": MIXED, "apart": APART,
        "token_factor": round(factor, 4), "offset_noise": base.OFFSET_NOISE,
    }
