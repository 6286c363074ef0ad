"""`python dev.py train NAME --minutes N`: train a member of the mini family, or go on where the last call stopped.

Everything is kept in `.train/NAME/` (state, curve, latents); the averaged weights go to `mini/weights/NAME.safetensors`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .autoencoder import Autoencoder
from .checkpoint import TEXT_PREFIX, UNET_PREFIX, WEIGHTS
from .samples import draw_samples
from .storage import read_weights, write_weights
from .tokens import GrammarTokens

ROOT = Path(__file__).resolve().parents[1]


def shipped_autoencoder() -> Autoencoder:
    """The autoencoder of mini/weights, ready to encode. Raises ValueError when its file is missing or damaged."""
    net = Autoencoder()
    net.load_state_dict(read_weights(WEIGHTS / "autoencoder.safetensors")[0])
    return net.eval()


def train_autoencoder(folder: Path, args, device) -> None:
    """Run the recipe with state in `folder` and write the weights; args as `main` parses them."""
    from . import train_autoencoder as recipe

    start = read_weights(WEIGHTS / "autoencoder.safetensors")[0] if args.from_shipped or args.decoder_only else None
    if args.decoder_only:
        folder = folder.with_name("autoencoder-decoder")
    state, metadata = recipe.train(folder, args.minutes, device, args.seed, start, args.decoder_only, resume=not args.from_shipped)
    write_weights(args.output or WEIGHTS / "autoencoder.safetensors", state, metadata)


def train_text_to_image(folder: Path, args, device) -> None:
    """Run the recipe with state in `folder`, write the weights, draw samples.png beside the state; args as `main` parses them."""
    from . import train_text_to_image as recipe

    start = None
    if args.from_shipped:
        shipped = read_weights(WEIGHTS / "text_to_image.safetensors")[0]
        prefixes = {UNET_PREFIX: "unet.", TEXT_PREFIX: "text."}
        start = {new + k[len(old):]: v for old, new in prefixes.items() for k, v in shipped.items() if k.startswith(old)}
    state, metadata = recipe.train(folder, args.minutes, device, shipped_autoencoder(), args.seed, start, resume=not args.from_shipped, compiled=args.compile)
    named = {k.replace("unet.", UNET_PREFIX, 1) if k.startswith("unet.") else k.replace("text.", TEXT_PREFIX, 1): v for k, v in state.items()}
    named["token_ids"] = torch.tensor(GrammarTokens().ids, dtype=torch.int32)
    file = args.output or WEIGHTS / "text_to_image.safetensors"
    # first without the figures: whatever goes wrong while sampling, hours of training are kept
    write_weights(file, named, metadata)
    figures = draw_samples(folder / "samples.png", *(read_weights(path)[0] for path in (file, WEIGHTS / "autoencoder.safetensors")))
    write_weights(file, named, {**metadata, **figures})


def shipped_text_to_image() -> tuple[torch.nn.Module, torch.nn.Module]:
    """(UNet, text encoder) of mini/weights on the CPU. Raises ValueError when the file is missing or damaged."""
    from .nets import new_text_encoder, new_unet

    weights = read_weights(WEIGHTS / "text_to_image.safetensors")[0]
    unet, text = new_unet(), new_text_encoder(len(weights["token_ids"]) + 1)
    for net, prefix in ((unet, UNET_PREFIX), (text, TEXT_PREFIX)):
        net.load_state_dict({key[len(prefix):]: value for key, value in weights.items() if key.startswith(prefix)}, strict=False)
    return unet, text


def train_seecoder_backbone(folder: Path, args, device) -> None:
    """Part 1 of the mini SeeCoder; its result stays in .train, where part 2 takes it from."""
    from . import train_seecoder as recipe

    state, metadata = recipe.train_backbone(folder, args.minutes, device, args.seed)
    write_weights(args.output or folder / "backbone.safetensors", state, metadata)


def train_seecoder(folder: Path, args, device) -> None:
    """Part 2 of the mini SeeCoder, on the shipped text-to-image model."""
    from . import train_seecoder as recipe

    backbone = read_weights(folder.with_name("seecoder_backbone") / "backbone.safetensors")[0]
    state, metadata = recipe.train(folder, args.minutes, device, backbone, shipped_text_to_image()[0], shipped_autoencoder(), args.seed)
    write_weights(args.output or WEIGHTS / "seecoder.safetensors", state, metadata)


def train_controlnet(folder: Path, args, device) -> None:
    """The mini ControlNet, on the shipped text-to-image model."""
    from . import train_controlnet as recipe

    state, metadata = recipe.train(folder, args.minutes, device, *shipped_text_to_image(), shipped_autoencoder(), args.seed)
    write_weights(args.output or WEIGHTS / "controlnet.safetensors", state, metadata)


def train_strips(folder: Path, args, device) -> None:
    """The mini LoRA "strips", on the shipped text-to-image model."""
    from . import train_strips as recipe

    state, metadata = recipe.train(folder, args.minutes, device, *shipped_text_to_image(), shipped_autoencoder(), args.seed)
    write_weights(args.output or WEIGHTS / "strips.safetensors", state, metadata)


def train_instruct_pix2pix(folder: Path, args, device) -> None:
    """The mini edit model, from the shipped text-to-image model or (--from-shipped) from its own weights."""
    from . import train_instruct_pix2pix as recipe

    file = WEIGHTS / f"{'instruct_pix2pix' if args.from_shipped else 'text_to_image'}.safetensors"
    state, metadata = recipe.train(folder, args.minutes, device, read_weights(file)[0], shipped_autoencoder(), args.seed, resume=not args.from_shipped, compiled=args.compile)
    write_weights(args.output or WEIGHTS / "instruct_pix2pix.safetensors", state, metadata)


def train_towers(folder: Path, args, device) -> None:
    """The image and text towers, on the shipped edit model's text encoder."""
    from . import train_towers as recipe
    from .instructions import vocabulary
    from .nets import new_text_encoder
    from .towers import FILE

    weights, tokens = read_weights(WEIGHTS / "instruct_pix2pix.safetensors")[0], GrammarTokens(vocabulary())
    if weights["token_ids"].tolist() != tokens.ids:
        raise ValueError("The mini edit model was trained with other words than the grammar has now: run `python dev.py train instruct_pix2pix` first.")
    text = new_text_encoder(tokens.unknown + 1)
    text.load_state_dict({key[len(TEXT_PREFIX):]: value for key, value in weights.items() if key.startswith(TEXT_PREFIX)}, strict=False)
    start = read_weights(WEIGHTS / FILE)[0] if args.from_shipped else None
    state, metadata = recipe.train(folder, args.minutes, device, text, tokens, args.seed, start, resume=not args.from_shipped)
    write_weights(args.output or WEIGHTS / FILE, state, metadata)


def train_versatile(folder: Path, args, device) -> None:
    """The attention set for pictures of the mini Versatile Diffusion, on the shipped text-to-image model and image tower."""
    from . import train_versatile as recipe
    from .towers import load_clip_vision

    start = read_weights(WEIGHTS / "versatile.safetensors")[0] if args.from_shipped else None
    state, metadata = recipe.train(
        folder, args.minutes, device, *shipped_text_to_image(), load_clip_vision(WEIGHTS), shipped_autoencoder(), args.seed, start, resume=not args.from_shipped)
    write_weights(args.output or WEIGHTS / "versatile.safetensors", state, metadata)


MEMBERS = {"autoencoder": train_autoencoder, "text_to_image": train_text_to_image, "seecoder_backbone": train_seecoder_backbone,
           "seecoder": train_seecoder, "controlnet": train_controlnet,
           "strips": train_strips, "instruct_pix2pix": train_instruct_pix2pix, "towers": train_towers, "versatile": train_versatile}


def main(argv: list[str]) -> int:
    """Exit status; SystemExit for arguments that make no sense."""
    parser = argparse.ArgumentParser(prog="dev.py train", description=__doc__)
    parser.add_argument("name", choices=sorted(MEMBERS))
    parser.add_argument("--minutes", type=float, default=60.0, help="wall-clock minutes; the last third cools the learning rate down")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--from-shipped", action="store_true", help="start from mini/weights, with a fresh optimiser; an earlier state in .train is replaced")
    parser.add_argument("--decoder-only", action="store_true", help="autoencoder: keep the shipped encoder and improve its decoder")
    parser.add_argument("--compile", action="store_true",
                        help="text_to_image, instruct_pix2pix: through torch.compile, a fifth faster after three minutes of compiling; needs a C++ compiler")
    parser.add_argument("--fresh", action="store_true", help="forget an earlier state in .train")
    parser.add_argument("--output", type=Path, default=None, help="where to write the weights (default mini/weights/NAME.safetensors)")
    args = parser.parse_args(argv)
    if not 0 < args.minutes:
        parser.error(f"--minutes must be above 0, {args.minutes} was given.")
    if args.output and args.output.suffix != ".safetensors":
        parser.error(f"--output must end in .safetensors, {args.output.name} was given.")
    folder = ROOT / ".train" / args.name
    if args.fresh:
        for file in folder.glob("state.*"):
            file.unlink()
    MEMBERS[args.name](folder, args, torch.device(args.device))
    return 0
