"""The mini Versatile Diffusion with random weights, in files as they are shipped."""

from __future__ import annotations

from pathlib import Path

import torch

from ...mini import autoencoder, checkpoint, nets, storage, tokens
from .models import randomise
from .towers import write_random_towers


def base_networks(seed: int = 0) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(UNet, text encoder) of a text-to-image member, every weight random and none of them zero."""
    torch.manual_seed(seed)
    unet, text = nets.new_unet(), nets.new_text_encoder(tokens.GrammarTokens().unknown + 1)
    randomise(unet, seed)
    return unet, text


def write_random_family(folder: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    """text_to_image, autoencoder and towers in `folder`; returns the weights of the first as they are read."""
    unet, text = base_networks(seed)
    named = {checkpoint.UNET_PREFIX + k: v for k, v in unet.state_dict().items()} | {checkpoint.TEXT_PREFIX + k: v for k, v in text.state_dict().items()}
    path = Path(folder) / "text_to_image.safetensors"
    storage.write_weights(path, {**named, "token_ids": torch.tensor(tokens.GrammarTokens().ids, dtype=torch.int32)}, {})
    storage.write_weights(Path(folder) / "autoencoder.safetensors", autoencoder.Autoencoder().state_dict(), {})
    write_random_towers(folder)
    return storage.read_weights(path)[0]


def image_set(weights: dict[str, torch.Tensor], seed: int = 7) -> dict[str, torch.Tensor]:
    """A random set for pictures under the keys of the file, shaped like the set for texts in `weights`."""
    from ...mini import train_versatile, versatile

    start = train_versatile.start_from({k[len(checkpoint.UNET_PREFIX):]: v for k, v in weights.items() if k.startswith(checkpoint.UNET_PREFIX)})
    net = train_versatile.new_unet(start)
    randomise(net, seed)
    return {checkpoint.UNET_PREFIX + k: v.detach() for k, v in net.state_dict().items() if versatile.is_image_set(k)}


def as_text_set(image_set: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors under the keys of the set for texts: over a base, the plain SD1.x model that is the picture flow."""
    return {key.replace(".image.", "."): value for key, value in image_set.items()}
