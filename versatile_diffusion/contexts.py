"""Contexts: what the attention sets read instead of a CLIP's raw hidden states (reference: Xu et al. 2023, section 3.3, and the released code).

Text:   T = H W^T / || e W^T ||     H: normed last hidden state [77, 768], e: its row at the end token, W: text projection
Picture: I = E / || E[0] ||         E = post-norm and projection of all 257 tokens of the vision tower, row 0 the class token
"""

from __future__ import annotations

import logging

import torch
from comfy.sd1_clip import SDClipModel
from torch import Tensor

from ..common.pictures import rgb
from .keys import IMAGE, TEXT
from .model import DUAL, FLOW, IMAGE_CONTEXT, RATIO, WIDTH

log = logging.getLogger("palimpsest")

CROPS = ("squash", "centre")
SQUASHED = 512  # the authors' demo brings every picture to this square first
TOWER = "the vision tower of openai/clip-vit-large-patch14 (ViT-L/14, 224 px)"
PICTURES = "versatile_pictures"  # option of an image context: tokens of each picture in it
EMPTIES = ("zeros", "black", "grey")
GREY = 127 / 255  # of an 8-bit picture


class TextContextEncoder(SDClipModel):
    """The host's CLIP-L with text contexts as its output: CLIP Text Encode then gives contexts, each chunk of 77 tokens divided by its own norm.

    Prompt weights act on contexts, against the one of the empty prompt.
    """

    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(device=device, return_projected_pooled=True, dtype=dtype, model_options=model_options or {})

    def set_clip_options(self, options: dict) -> None:
        """As the host's, but the last layer stays: contexts exist for it alone."""
        if options.get("layer") not in (None, -1):
            log.warning("Palimpsest: Versatile Diffusion reads the last layer of its CLIP, so CLIP Set Last Layer is ignored.")
        super().set_clip_options({**options, "layer": None})

    def forward(self, tokens):
        """Token lists -> (contexts [B, 77, width], pooled [B, width], ...)."""
        states, pooled, *rest = super().forward(tokens)
        project = self.transformer.text_projection
        end = pooled if self.return_projected_pooled else project(pooled)
        return (project(states) / end.norm(dim=-1)[:, None, None], pooled, *rest)


def check_tower(clip_vision) -> None:
    """Raises ValueError, one sentence, for a CLIP_VISION whose tokens the image set cannot read.

    A tower made for a model of another width than the published one says so in its attribute `context_width`.
    """
    model = clip_vision.model
    vision, projection = getattr(model, "vision_model", None), getattr(model, "visual_projection", None)
    found = f"a {type(model).__name__}"
    wanted = getattr(clip_vision, "context_width", WIDTH)
    embeddings = getattr(vision, "embeddings", None)
    if getattr(embeddings, "class_embedding", None) is not None and isinstance(projection, torch.nn.Module):
        tokens, hidden, width = embeddings.position_embedding.weight.shape[0], embeddings.position_embedding.weight.shape[1], projection.weight.shape[0]
        if width == wanted and (tokens == 257 or wanted != WIDTH):
            return
        found = f"one of {tokens} tokens, {hidden} values wide, projected to {width}"
    raise ValueError(f"Versatile Diffusion reads pictures through {TOWER}, but the connected CLIP vision model is {found}: load that one.")


def squashed(image: Tensor) -> Tensor:
    """The picture [B, H, W, 3] as a square of 512 pixels, aspect lost, in 8 bits: the first step of the authors' demo."""
    if image.shape[1:3] == (SQUASHED, SQUASHED):
        return image
    small = torch.nn.functional.interpolate(image.movedim(-1, 1), size=(SQUASHED, SQUASHED), mode="bicubic", antialias=True)
    return (small.movedim(1, -1).clamp(0, 1) * 255).round() / 255


def fit_mask(mask: Tensor, size: tuple[int, int], side: int, crop: str) -> Tensor:
    """What to keep of pictures of `size` (H, W), [B, side, side] in 0..1, seen as the tower sees the picture.

    mask: [B or 1, h, w]. crop: see `CROPS`.
    """
    mask = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    if crop == "centre":
        if mask.shape[-2:] != size:
            mask = torch.nn.functional.interpolate(mask, size=size, mode="bilinear", antialias=True)
        scale = side / min(size)
        mask = torch.nn.functional.interpolate(mask, size=(round(scale * size[0]), round(scale * size[1])), mode="bilinear", antialias=True)
        top, left = (mask.shape[-2] - side) // 2, (mask.shape[-1] - side) // 2
        mask = mask[..., top:top + side, left:left + side]
    elif mask.shape[-2:] != (side, side):
        mask = torch.nn.functional.interpolate(mask, size=(side, side), mode="bilinear", antialias=True)
    return mask[:, 0].clamp(0, 1)


def token_weights(mask: Tensor, patch: int) -> Tensor:
    """Weights [B, 1 + patches, 1] of a tower's tokens from masks [B, side, side]: the mean of the mask, then that of each patch."""
    patches = torch.nn.functional.avg_pool2d(mask[:, None], patch).flatten(1)
    return torch.cat([mask.mean((1, 2))[:, None], patches], 1)[..., None]


def encode_pixels(model, pixels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Contexts [B, tokens, width] of pixels that are ready for the tower ([B, 3, side, side], normalised).

    model: the host's CLIPVisionModelProjection, on the pixels' device. weights: [B, tokens, 1]; the tower then reads
    its tokens scaled by them, and the context is scaled once more (the released masked encoder).
    """
    vision = model.vision_model
    x = vision.embeddings(pixels)
    if weights is not None:
        x = x * weights.to(x)
    x, _ = vision.encoder(vision.pre_layrnorm(x), mask=None, intermediate_output=None)
    tokens = model.visual_projection(vision.post_layernorm(x)).float()
    context = tokens / tokens[:, :1].norm(dim=-1, keepdim=True)
    return context if weights is None else context * weights.to(context)


def encode_pictures(clip_vision, image: Tensor, mask: Tensor | None = None, crop: str = "squash") -> Tensor:
    """Contexts [B, 257, 768] of pictures IMAGE [B, H, W, C], float32 on the host's intermediate device, with progress and cancel.

    mask: MASK [B or 1, h, w], 1 where the picture is to be read; a mask that is 1 everywhere is none. crop: "squash" (the
    authors' demo: the whole picture, its aspect lost) or "centre" (the middle square). Raises ValueError for another
    tower, an empty mask and masks that do not fit the batch.
    """
    import comfy.model_management as mm
    import comfy.utils
    from comfy.clip_vision import clip_preprocess

    check_tower(clip_vision)
    image = rgb(image).float()
    patch = clip_vision.model.vision_model.embeddings.patch_embedding.weight.shape[-1]
    weights = None
    # asked before it is resized, which would leave 0.9999999
    if mask is not None and not bool((mask >= 1).all()):
        keep = fit_mask(mask, tuple(image.shape[1:3]), clip_vision.image_size, crop)
        if len(keep) not in (1, len(image)):
            raise ValueError(f"There are {len(keep)} masks for {len(image)} pictures: connect one mask for all, or one per picture.")
        if not bool((keep.flatten(1) > 0).any(1).all()):
            raise ValueError("The mask is empty, so nothing of the picture would be read: paint a region in white, or disconnect the mask.")
        weights = token_weights(keep, patch).expand(len(image), -1, -1)
    mm.load_model_gpu(clip_vision.patcher)
    device, bar, out = clip_vision.load_device, comfy.utils.ProgressBar(len(image)), []
    for i in range(len(image)):
        mm.throw_exception_if_processing_interrupted()
        one = image[i:i + 1].to(device)
        one = squashed(one) if crop == "squash" else one
        pixels = clip_preprocess(one, size=clip_vision.image_size, mean=clip_vision.image_mean, std=clip_vision.image_std, crop=crop == "centre").float()
        out.append(encode_pixels(clip_vision.model, pixels, None if weights is None else weights[i:i + 1].to(device)))
        bar.update(1)
    return torch.cat(out).to(mm.intermediate_device())


def image_conditioning(contexts: list[Tensor]) -> list:
    """CONDITIONING of one or several pictures that are read together: contexts [B, n, width] behind each other (released code: one context, more tokens)."""
    rows = max(len(context) for context in contexts)
    if any(len(context) not in (1, rows) for context in contexts) or len({context.shape[-1] for context in contexts}) > 1:
        shapes = ", ".join(str(list(context.shape)) for context in contexts)
        raise ValueError(f"These image contexts do not fit each other ({shapes}): use contexts of one model, one row each or all of the same number of rows.")
    tokens = torch.cat([context.expand(rows, -1, -1) for context in contexts], 1)
    return [[tokens, {FLOW: IMAGE, PICTURES: tuple(context.shape[1] for context in contexts)}]]


def flow_of(conditioning: list, what: str) -> str:
    """The flow of a CONDITIONING ("text", "image", "dual"). what: how messages call it. Raises ValueError when it is empty or mixed."""
    flows = {options.get(FLOW, TEXT) for _, options in conditioning or []}
    if len(flows) != 1:
        raise ValueError(f"The {what} is {'empty conditioning' if not flows else 'a mix of text and image contexts'}: connect one context.")
    return flows.pop()


def picture_contexts(conditioning: list, what: str) -> list[Tensor]:
    """The contexts [B, n, width] of the pictures in an image CONDITIONING, one after the other. Raises ValueError for a text or several entries."""
    flow = flow_of(conditioning, what)
    if flow != IMAGE or len(conditioning) != 1:
        found = f"a {flow} context" if flow != IMAGE else f"{len(conditioning)} pieces of conditioning"
        raise ValueError(f"The {what} is {found}: connect a Versatile Image Context, or what Versatile Focus or Versatile Combine Images made of one.")
    tokens, options = conditioning[0]
    counts = options.get(PICTURES, (tokens.shape[1],))
    if sum(counts) != tokens.shape[1]:  # a stock node has added tokens
        counts = (tokens.shape[1],)
    return list(tokens.split(list(counts), 1))


def with_options(new: list, old: list) -> list:
    """Image CONDITIONING `new` with the areas, ranges and ControlNets of the entry it was made from."""
    (tokens, options), (_, kept) = new[0], old[0]
    return [[tokens, {**kept, **options}]]


def dual_conditioning(text: list, image: list, ratio: float) -> list:
    """CONDITIONING with both contexts. ratio: share of the text, 0 (picture alone) to 1 (text alone).

    The main tensor is the text's, so that stock nodes act on the words. Areas, ranges and ControlNets of the text stay, those of the image are dropped.
    Raises ValueError, one sentence, for contexts in the wrong input.
    """
    flow = flow_of(text, "text input")
    if flow != TEXT:
        raise ValueError(f"The text input got a context of the {flow} flow: connect CLIP Text Encode with the CLIP of Versatile Diffusion Loader.")
    tokens = torch.cat(picture_contexts(image, "image input"), 1)
    out = []
    for words, options in text:
        if words.shape[-1] != tokens.shape[-1]:
            raise ValueError(
                f"The text has {words.shape[-1]} values per token and the picture {tokens.shape[-1]}: encode both with the models that Versatile Diffusion Loader gives."
            )
        out.append([words, {**options, FLOW: DUAL, IMAGE_CONTEXT: tokens, RATIO: float(ratio)}])
    return out


def zeros_like(conditioning: list) -> list:
    """The same conditioning with zero tokens: the authors' negative of a picture."""
    return [[torch.zeros_like(tokens), {key: value for key, value in options.items() if key != "pooled_output"}] for tokens, options in conditioning]


def empty_picture(kind: str) -> Tensor:
    """IMAGE [1, 224, 224, 3] of "black" or "grey" (127 of 255: an 8-bit picture, as a float one would be scaled twice by others' preprocessing)."""
    return torch.full((1, 224, 224, 3), {"black": 0.0, "grey": GREY}[kind])
