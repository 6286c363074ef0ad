"""Training recipe of the mini Versatile Diffusion: an attention set that reads pictures, beside the text-to-image model's (Xu et al. 2023, section 3.2).

The lineage of the original: the set starts as a copy of the one for texts, all else stays as it is, to the bit, and contexts of pictures come from
the family's image tower. Another loss than the original's: the copy learns from the set for texts, block by block. In every attention block both are
given the same hidden states; the teacher reads the full caption of a scene, the pupil the picture of that scene, and the pupil's output is to be
the teacher's. The UNet itself runs forward only, so a step costs a third of one that learns to remove noise, and its loss has no noise of its own.
(Ten minutes of the original's loss after it moved no figure beyond chance.) Zeros and the empty text take the contexts' places now and then, for guidance.

The hidden states come from the text flow on noisy latents. It reads another scene's caption half of the time: the set must say what its picture
shows also where that is not what is being drawn, or a blend with a text would be the text's alone.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..versatile_diffusion.contexts import encode_pixels, squashed
from ..versatile_diffusion.dual import SETS, TWIN, DualUNet, PairedTransformer, place
from ..versatile_diffusion.keys import CONTEXT, IMAGE, Name, group_of
from . import train_text_to_image as base
from .autoencoder import Autoencoder
from .captions import caption
from .checkpoint import UNET_PREFIX
from .nets import attention_for_training, mixed_precision, text_states, unet_config
from .optim import Trainer
from .scenes import sample_scene
from .tokens import GrammarTokens
from .train_autoencoder import pictures
from .versatile import is_image_set

BATCH, POOL, RATE, WARMUP = 64, 16_000, 5e-3, 40
DROPOUT = 0.1  # of what a row reads
APART = 0.5  # share of the rows that drive the UNet with the caption of another scene
MEASURED = 256  # captions and pictures whose tokens are measured
READERS = ("attn2.to_k.weight", "attn2.to_v.weight")  # of a context; without biases
TAUGHT = ("norm2", "attn2", "norm3", "ff", "proj_out")  # what comes after the self-attention, up to which both sets are the same
OPTIONS = {"optimized_attention_override": attention_for_training}


def is_taught(name: str) -> bool:
    """Whether a tensor of `DualUNet`, by its name, learns here."""
    return is_image_set(name) and any(part in TAUGHT for part in name.split("."))


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


def new_unet(state: dict[str, Tensor]) -> DualUNet:
    """The UNet with both sets in float32, of which the tensors of `is_taught` are to learn. state: of `start_from`."""
    import comfy.ops

    unet = DualUNet(**unet_config(), sets=SETS, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    unet.load_state_dict(state)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(is_taught(name))
    return unet


@torch.no_grad()
def measure(text: torch.nn.Module, tokens: GrammarTokens, contexts: Tensor) -> float:
    """How many times as long as a picture's tokens a text's are (root mean square, padding included).

    The copied set expects tokens of that length, and weights that read short ones would learn slowly: an optimiser's steps do not grow with what the input lacks.
    """
    count = min(MEASURED, len(contexts))
    ids, _ = base.batch_tokens(tokens, list(range(count)), torch.Generator().manual_seed(0))
    return float((text_states(text, ids).square().mean() / contexts[:count].float().square().mean()).sqrt())


def finish(transformer: torch.nn.Module, hidden: Tensor, context: Tensor) -> Tensor:
    """What a spatial transformer of depth 1 adds to its input, from its hidden states after the self-attention.

    hidden: [B, h * w, C]; context: [B, tokens, width]. Returns [B, C, h * w, 1], or [B, h * w, C] where the projection is linear.
    """
    block = transformer.transformer_blocks[0]
    x = hidden + block.attn2(block.norm2(hidden), context=context, transformer_options=OPTIONS)
    x = x + block.ff(block.norm3(x))
    return transformer.proj_out(x if transformer.use_linear else x.movedim(-1, 1)[..., None])


class Lesson:
    """Keeps the hidden states of every text block of a UNet while the text flow runs."""

    def __init__(self, net: DualUNet):
        self.pairs = [module for module in net.modules() if isinstance(module, PairedTransformer)]
        self.kept: list[Tensor] | None = None  # None: what passes is not the UNet's run
        for pair in self.pairs:
            pair.transformer_blocks[0].norm2.register_forward_pre_hook(self.keep)

    def keep(self, module: torch.nn.Module, args: tuple) -> None:
        """The hook. The host adds to some tensors in place, hence the copy."""
        if self.kept is not None:
            self.kept.append(args[0].clone())

    @torch.no_grad()
    def run(self, net: DualUNet, noisy: Tensor, t: Tensor, words: Tensor) -> list[Tensor]:
        """Hidden states [B, h * w, C] of each block. noisy: [B, 4, h, w]; t: [B]; words: [B, 77, width]."""
        self.kept = []
        net(noisy, t, context=words, vd_ratio=1.0, transformer_options=OPTIONS)
        hidden, self.kept = self.kept, None
        return hidden

    @torch.no_grad()
    def taught(self, hidden: list[Tensor], words: Tensor) -> list[Tensor]:
        """What the teacher makes of these hidden states and texts, per block."""
        return [finish(pair, x, words) for pair, x in zip(self.pairs, hidden, strict=True)]

    def errors(self, hidden: list[Tensor], picture: Tensor, wanted: list[Tensor]) -> Tensor:
        """Mean squared error of the pupil in each block [blocks]."""
        return torch.stack([(finish(getattr(pair, TWIN), x, picture) - y).float().square().mean() for pair, x, y in zip(self.pairs, hidden, wanted, strict=True)])


def full_tokens(tokens: GrammarTokens, picks: list[int], generator: torch.Generator) -> Tensor:
    """Ids [B, 77] of captions that name every attribute of the picked scenes, each in words of its own."""
    seeds = torch.randint(1 << 40, (len(picks),), generator=generator).tolist()
    return torch.stack([tokens.encode(caption(sample_scene(base.TRAIN_SEED + pick), seed, 1.0)[0]) for pick, seed in zip(picks, seeds)])


def draw_rows(g: torch.Generator, size: int, pool: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each row [size] the scenes whose picture is read, whose caption drives the UNet, and which is drawn."""
    seen = torch.randint(pool, (size,), generator=g)
    told = torch.where(torch.rand(size, generator=g) < APART, seen.roll(1), seen)
    return seen, told, torch.where(torch.rand(size, generator=g) < 0.5, told, seen)


def train(folder: Path, minutes: float, device: torch.device, unet: torch.nn.Module, text: torch.nn.Module, clip_vision, autoencoder: Autoencoder, seed: int = 0,
          start: dict[str, Tensor] | None = None, resume: bool = True) -> tuple[dict, dict]:
    """Teach the set for pictures for `minutes`; returns (its weights, named as in the member's file, metadata).

    unet, text: the text-to-image model, which stays as it is. clip_vision: the image tower. start: the set to begin with, as in the file; None for a copy of the one for texts.
    Raises KeyboardInterrupt, with the state saved.
    """
    torch.manual_seed(seed)
    tokens, text = GrammarTokens(), text.requires_grad_(False).to(device)
    latents, contexts = base.precompute(folder, autoencoder, POOL), precompute(folder, clip_vision, POOL)
    # The set learns to read contexts of the length of texts; what the factor does is put into its weights in the end.
    factor = measure(text, tokens, contexts)
    state = start_from(unet.state_dict())
    if start:
        state |= scaled({key[len(UNET_PREFIX):]: value for key, value in start.items()}, 1 / factor)
    net, abar = new_unet(state).to(device), base.schedule().to(device)
    learn = {name: p for name, p in net.named_parameters() if p.requires_grad}
    lesson = Lesson(net)
    print(f"{len(lesson.pairs)} blocks, {sum(p.numel() for p in learn.values())} parameters learn; a picture's tokens are made {factor:.2f} times as long", flush=True)
    trainer = Trainer(net, folder, minutes, RATE, seed, muon={name for name, p in learn.items() if p.ndim >= 2}, warmup=WARMUP)
    if resume:
        trainer.resume()
    g, going, empty, scale = trainer.generator, True, tokens.encode(""), None
    with trainer.saving():
        while going:
            seen, told, drawn = draw_rows(g, BATCH, len(latents))
            heard = torch.rand(BATCH, generator=g) >= DROPOUT
            clean = latents[drawn].to(device).float()
            picture = (contexts[seen].float() * factor * heard[:, None, None]).to(device)
            t = base.batch_steps(g, BATCH).to(device)
            a = abar[t][:, None, None, None]
            noisy = a.sqrt() * clean + (1 - a).sqrt() * base.draw_noise(clean.shape, g).to(device)
            driving, full = base.batch_tokens(tokens, told.tolist(), g)[0], full_tokens(tokens, seen.tolist(), g)
            with torch.no_grad():
                words = text_states(text, torch.cat([driving, torch.where(heard[:, None], full, empty)]).to(device))
            with mixed_precision(device.type):
                hidden = lesson.run(net, noisy, t.float(), words[:BATCH])
                wanted = lesson.taught(hidden, words[BATCH:])
                errors = lesson.errors(hidden, picture, wanted)
                if scale is None:
                    # Blocks differ ten-thousandfold in how much they heed the text, and in how far zeros throw them off: the mean of both, so that none drowns the others.
                    others = lesson.taught(hidden, words[BATCH:].roll(1, 0))
                    heeded = torch.stack([(x - y).float().square().mean() for x, y in zip(others, wanted)])
                    scale = (heeded * errors.detach()).sqrt().clamp(min=1e-8)
                loss = (errors / scale).mean()
            going = trainer.update(loss, BATCH)
    trainer.report()
    averaged = trainer.averaged()
    image_set = scaled({name: value for name, value in averaged.items() if is_image_set(name)}, factor)
    return {UNET_PREFIX + name: value for name, value in image_set.items()}, {
        "recipe": "versatile", **trainer.record(BATCH), "data_seed": base.TRAIN_SEED, "scenes": len(latents), "dropout": DROPOUT, "apart": APART,
        "token_factor": round(factor, 4),
    }
