"""From a reference picture to the host's CONDITIONING: sizes, masks, batches, strength, and the negative."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention_patches.host import token_width
from ..common.pictures import rgb
from .loader import SeeCoderModel, read_file

NEGATIVES = ("zeros", "text", "anime file", "same as positive")
BATCHES = ("one each", "blend", "concatenate")


def resized(image: Tensor, longer_side: int) -> Tensor:
    """The picture [B, H, W, 3] with its longer side at `longer_side` pixels, aspect kept; 0 leaves it alone."""
    import comfy.utils

    height, width = image.shape[1:3]
    if not longer_side or max(height, width) == longer_side:
        return image
    scale = longer_side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    # lanczos goes through 8 bits, which costs 1e-3; area blurs nothing when shrinking
    method = "area" if scale < 1 else "bicubic"
    return comfy.utils.common_upscale(image.movedim(-1, 1), *size, method, "disabled").movedim(1, -1).clamp(0, 1)


def fitting_mask(mask: Tensor, image: Tensor) -> Tensor:
    """MASK [B or 1, h, w] at the picture's size, [B, H, W]. Raises ValueError when it is empty or its batch does not fit."""
    mask = mask.reshape(-1, *mask.shape[-2:]).float()
    batch, height, width = image.shape[:3]
    if len(mask) not in (1, batch):
        raise ValueError(f"There are {len(mask)} masks for {batch} reference pictures: connect one mask for all, or one per picture.")
    if mask.shape[1:] != (height, width):
        mask = torch.nn.functional.interpolate(mask[:, None], size=(height, width), mode="area")[:, 0]
    empty = [i + 1 for i, one in enumerate(mask) if not bool((one > 0).any())]
    if empty:
        raise ValueError(f"Mask {empty[0]} of the reference is empty, so nothing of the picture could speak: paint a region, or disconnect the mask.")
    return mask.expand(batch, -1, -1)


def encode_pictures(model: SeeCoderModel, image: Tensor, mask: Tensor | None = None, longer_side: int = 0, reading: list | None = None) -> Tensor:
    """Tokens [B, queries, width] of reference pictures [B, H, W, C], one after the other, with progress and cancel.

    mask: see `fitting_mask`. longer_side: see `resized`. reading: a list that receives the maps of each picture, as
    `SeeCoder.forward` gives them. Raises ValueError as the functions above.
    """
    import comfy.model_management
    import comfy.utils

    image = resized(rgb(image), longer_side)
    mask = None if mask is None else fitting_mask(mask, image)
    bar = comfy.utils.ProgressBar(len(image) * model.steps)

    def tick() -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update(1)

    tokens = []
    for i in range(len(image)):
        maps: list | None = None if reading is None else []
        tokens.append(model.encode(image[i:i + 1], None if mask is None else mask[i:i + 1], maps, tick))
        if reading is not None:
            reading.append(maps)
    return torch.cat(tokens)


def parse_weights(text: str, count: int) -> Tensor:
    """One number per picture from "1, 0.5"; an empty text is 1 for all. Raises ValueError, one sentence."""
    if not text.strip():
        return torch.ones(count)
    try:
        numbers = [float(part) for part in text.replace(";", ",").split(",") if part.strip()]
    except ValueError as error:
        raise ValueError(f'The weights "{text}" are not numbers: write one per reference picture, separated by commas, for example 1, 0.5.') from error
    if len(numbers) != count:
        raise ValueError(f"There are {len(numbers)} weights for {count} reference pictures: write one per picture, or none.")
    weights = torch.tensor(numbers)
    if not bool(torch.isfinite(weights).all()):
        raise ValueError(f'The weights "{text}" are not all finite: write ordinary numbers.')
    return weights


def combine(tokens: Tensor, batch: str, weights: Tensor) -> Tensor:
    """Tokens [B, n, C] of several pictures as one conditioning.

    one each: [B, n, C], latent i gets picture i. blend: [1, n, C], the weighted mean. concatenate: [1, B n, C], the
    model attends to all of them. Weights scale the tokens. Raises ValueError for blending weights that sum to zero.
    """
    scaled = tokens * weights.to(tokens)[:, None, None]
    if batch == "blend":
        total = float(weights.sum())
        if abs(total) < 1e-6:
            raise ValueError("The blending weights sum to zero, so there is no mean of the pictures: change one of them.")
        return scaled.sum(0, keepdim=True) / total
    return scaled.flatten(0, 1)[None] if batch == "concatenate" else scaled


def with_text(tokens: Tensor, text: list | None) -> list:
    """CONDITIONING of the picture's tokens, behind those of a text where there is one; the text's options stay."""
    if text is None:
        return [[tokens, {}]]
    out = []
    if not text:
        raise ValueError("The connected text is empty conditioning: connect a CLIP Text Encode, or disconnect it.")
    for words, options in text:
        if words.shape[-1] != tokens.shape[-1]:
            raise ValueError(f"The text has {words.shape[-1]} values per token, but SeeCoder gives {tokens.shape[-1]}: encode it with the CLIP of an SD1.x checkpoint.")
        count = max(len(words), len(tokens))
        if len(words) not in (1, count) or len(tokens) not in (1, count):
            raise ValueError(f"The text comes {len(words)} times and the picture {len(tokens)} times: use one text for all pictures, or as many as pictures.")
        out.append([torch.cat([words.expand(count, -1, -1), tokens.to(words).expand(count, -1, -1)], 1), dict(options)])
    return out


def padded(conditioning: list, count: int) -> list:
    """The same conditioning with zero tokens after its own until there are `count`: they dilute the softmax as in the authors' code."""
    out = []
    for words, options in conditioning:
        missing = max(0, count - words.shape[1])
        out.append([torch.nn.functional.pad(words, (0, 0, 0, missing)), dict(options)])
    return out


def read_embedding(path: str, width: int) -> Tensor:
    """[1, n, width] from a file that holds one such tensor, like anime_ug.pth. Raises ValueError, one sentence."""
    import os

    name = os.path.basename(path)
    if path.lower().endswith((".safetensors", ".sft")):
        found = read_file(path)
    else:
        # the host's loader asks a file for its keys, and this one is a bare tensor
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # pickle, zip and torch each have their own
            raise ValueError(f"The file {name} cannot be read as tensors ({(str(error) or type(error).__name__).splitlines()[0]}): download anime_ug.pth again.") from error
    tensors = [found] if isinstance(found, Tensor) else [value for value in found.values() if isinstance(value, Tensor)] if isinstance(found, dict) else []
    if len(tensors) != 1 or tensors[0].ndim not in (2, 3) or tensors[0].shape[-1] != width or (tensors[0].ndim == 3 and len(tensors[0]) != 1):
        shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors[:3]) or "no tensor"
        raise ValueError(f"The file {name} holds {shapes}, but a negative embedding is one tensor [tokens, {width}]: choose anime_ug.pth.")
    return tensors[0].float().reshape(1, -1, width)


def negative_for(choice: str, positive: list, text: list | None = None, embedding: Tensor | None = None) -> list:
    """The negative that belongs to `positive`, with at least as many tokens.

    zeros: of the positive's shape, as for the v1-0 and position-aware encoders. text, anime file: a text's or a file's
    tokens, zero tokens after them. same as positive: guidance has nothing to push away from, whatever its scale.
    """
    if choice == "zeros":
        return [[torch.zeros_like(tokens), {}] for tokens, _ in positive[:1]]
    if choice == "same as positive":
        return [[tokens, dict(options)] for tokens, options in positive]
    count = max(tokens.shape[1] for tokens, _ in positive)
    if choice == "text":
        if not text:
            raise ValueError('The negative is set to "text", but no negative text is connected: connect a CLIP Text Encode, or choose zeros.')
        for words, _ in text:
            if words.shape[-1] != positive[0][0].shape[-1]:
                raise ValueError(
                    f"The negative text has {words.shape[-1]} values per token, but SeeCoder gives {positive[0][0].shape[-1]}: encode it with the CLIP of an SD1.x checkpoint."
                )
        return padded(text, count)
    if choice == "anime file":
        if embedding is None:
            raise ValueError('The negative is set to "anime file", but no file is chosen: put anime_ug.pth into models/seecoder, or choose zeros.')
        return padded([[embedding, {}]], count)
    raise ValueError(f'There is no negative "{choice}": choose one of {", ".join(NEGATIVES)}.')


def check_model(model, seecoder: SeeCoderModel) -> None:
    """Raises ValueError, one sentence, when a MODEL wants tokens of another width than the encoder gives, or is a Versatile Diffusion, which reads others of the same width.

    A diffuser of Prompt-Free Diffusion in Versatile Diffusion's naming is what SeeCoder was made for.
    """
    from ..versatile_diffusion.model import VersatileDiffusion

    if isinstance(model.model, VersatileDiffusion) and not model.model.prompt_free:
        raise ValueError(
            "The connected model is a Versatile Diffusion, which reads pictures through its own encoder and not through SeeCoder: "
            "connect an SD1.x checkpoint, or use Versatile Image Context in place of this node."
        )
    width = token_width(model)
    name = type(model.model.model_config).__name__
    if width is None:
        raise ValueError(f"The connected model ({name}) takes no text tokens that SeeCoder could stand in for: use an SD1.x checkpoint.")
    if width != seecoder.width:
        raise ValueError(
            f"The connected model ({name}) wants {width} values per token, but {seecoder.name} gives {seecoder.width}: use an SD1.x checkpoint with the official encoders."
        )
