"""Names and sizes of Optimus' tensors: those of the published file, and ours.

| published (`optimus-vae.pth`; in a whole 2023 file under `vae.text.`) | ours |
| --- | --- |
| encoder. + BERT | encoder.bert. + BERT |
| encoder.linear.weight | the same |
| decoder.transformer. + GPT-2 | the same |
| decoder.transformer.linear.weight, .linear_emb.weight | decoder.linear.weight, .linear_emb.weight |
| decoder.lm_head.weight (a copy of the token embedding), decoder.transformer.h.N.attn.bias (a mask), position_ids | not needed |
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor

PREFIX = "vae.text."
TOKENS = "decoder.transformer.wte.weight"
MARKERS = 3  # <PAD>, <BOS>, <EOS>: the last rows of the decoder's token embedding
BOS, EOS = -2, -1  # their places in it
# the leading dot keeps c_attn.bias
UNUSED = re.compile(r"decoder\.(lm_head\.weight|transformer\.h\.\d+\.attn\.(bias|masked_bias))|encoder\.embeddings\.(position_ids|token_type_ids)")
FILE = "optimus-vae.pth (1 GB, from shi-labs/versatile-diffusion on Hugging Face, folder pretrained_pth)"


@dataclass(frozen=True)
class Tower:
    """Sizes of a transformer: values of a token, layers, tokens of the vocabulary, positions, values inside a feed-forward."""

    width: int
    layers: int
    vocabulary: int
    positions: int
    hidden: int


@dataclass(frozen=True)
class Sizes:
    """Sizes of an Optimus. latent: values of a text's latent; encoder: None where the file has the decoder only."""

    latent: int
    decoder: Tower
    encoder: Tower | None


def rename(key: str) -> str | None:
    """Our name of a published tensor (without `vae.text.`), None for what is not needed or not Optimus'."""
    if UNUSED.fullmatch(key):
        return None
    if key.startswith("decoder.transformer.linear"):
        return key.replace("transformer.", "", 1)
    if key.startswith("encoder.") and not key.startswith("encoder.linear."):
        return f"encoder.bert.{key.removeprefix('encoder.')}"
    return key if key.startswith(("encoder.linear.", "decoder.transformer.")) else None


def take(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Optimus' tensors out of a file's, which is emptied, under our names. name: of the file.

    Raises ValueError, one sentence, when there is no Optimus in it.
    """
    prefix = PREFIX if any(key.startswith(PREFIX) for key in state) else ""
    if prefix + TOKENS not in state:
        found = "an image VAE" if "decoder.conv_in.weight" in state else f"its first tensor is called {next(iter(state))}" if state else "no tensor"
        raise ValueError(f"The file {name} holds no Optimus ({found}): choose {FILE}.")
    out = {}
    for key in list(state):
        tensor = state.pop(key)
        if key.startswith(prefix) and (new := rename(key.removeprefix(prefix))):
            out[new] = tensor
    return out


def _layers(state: dict[str, Tensor], pattern: str) -> int:
    return 1 + max((int(match[1]) for key in state if (match := re.match(pattern, key))), default=-1)


def read_sizes(state: dict[str, Tensor], name: str) -> Sizes:
    """Sizes of tensors under our names. Raises ValueError, one sentence, when those that tell them are missing."""
    try:
        width = state[TOKENS].shape[1]
        decoder = Tower(
            width, _layers(state, r"decoder\.transformer\.h\.(\d+)\."), state[TOKENS].shape[0], state["decoder.transformer.wpe.weight"].shape[0],
            state["decoder.transformer.h.0.mlp.c_fc.weight"].shape[1],
        )
        latent = state["decoder.linear_emb.weight"].shape[1]
        encoder = None
        if any(key.startswith("encoder.") for key in state):
            words = state["encoder.bert.embeddings.word_embeddings.weight"]
            encoder = Tower(
                words.shape[1], _layers(state, r"encoder\.bert\.encoder\.layer\.(\d+)\."), words.shape[0],
                state["encoder.bert.embeddings.position_embeddings.weight"].shape[0], state["encoder.bert.encoder.layer.0.intermediate.dense.weight"].shape[0],
            )
    except (KeyError, IndexError) as error:
        raise ValueError(f"The file {name} lacks tensors of Optimus ({error.args[0]} first): its download may be incomplete, so fetch it again.") from error
    return Sizes(latent, decoder, encoder)
