"""Optimus on the wire: texts to latents and back, with memory, progress and cancel as the host has them."""

from __future__ import annotations

import functools
import logging
import os
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.shapes import compare_shapes
from . import optimus_files
from .files import TensorFile
from .optimus_keys import MARKERS, Sizes, read_sizes, take
from .optimus_network import OptimusNetwork, unfilled, write
from .optimus_words import BertWords, GPT2Words, read_vocabulary, tidy

log = logging.getLogger("palimpsest")

PRECISIONS = ("auto", "fp32", "fp16")
AT_ONCE = 32  # texts that are encoded in one call
DTYPES = {torch.float32: "fp32", torch.float16: "fp16"}


@dataclass(eq=False)
class Optimus:
    """An Optimus on the wire. path: of its file, beside which vocabularies may lie; compute: dtype of weights and activations."""

    path: str
    network: OptimusNetwork
    patcher: object
    sizes: Sizes
    compute: torch.dtype

    def describe(self) -> str:
        """One line for people."""
        parts = "encoder and decoder" if self.network.encoder is not None else "decoder only"
        return f"Optimus {os.path.basename(self.path)}: {parts}, latents of {self.sizes.latent} values, computed in {DTYPES[self.compute]}"

    @functools.cached_property
    def bert_words(self) -> BertWords:
        """BERT's vocabulary. Raises ValueError, one sentence, when it is not on this machine or not the one of this model."""
        return BertWords(read_vocabulary(optimus_files.bert_vocabulary(self.path), self.sizes.encoder.vocabulary))

    @functools.cached_property
    def gpt2_words(self) -> GPT2Words:
        """GPT-2's vocabulary, likewise."""
        return GPT2Words(read_vocabulary(optimus_files.gpt2_vocabulary(self.path), self.sizes.decoder.vocabulary - MARKERS))

    def _load(self, texts: int, length: int) -> torch.device:
        """Bring the network to its device. texts: how many it will see at once; length: tokens of each."""
        import comfy.model_management as mm

        # logits of one step and keys and values of all; transformers' layers cannot be left behind in part, as the host's can
        needed = 4 * texts * (3 * self.sizes.decoder.vocabulary + 2 * length * self.sizes.decoder.layers * self.sizes.decoder.width)
        mm.load_models_gpu([self.patcher], memory_required=needed, force_full_load=True)
        # buffers of modules that have no weights of their own are not among what the host moves
        self.network.to(self.patcher.load_device)
        return self.patcher.load_device

    def encode(self, texts: list[str]) -> Tensor:
        """Latents [B, latent, 1, 1] of texts (one or more), float32 on the host's intermediate device: means, without sampling; with progress and cancel.

        Texts are lower-cased and read up to 77 word pieces. Raises ValueError, one sentence, without an encoder or vocabulary.
        """
        import comfy.model_management as mm
        import comfy.utils

        if self.network.encoder is None:
            raise ValueError(f"The file {os.path.basename(self.path)} holds Optimus' decoder only, so it cannot encode text: load the whole optimus-vae.pth.")
        words = self.bert_words
        parts = [[words.encode(text) for text in texts[start:start + AT_ONCE]] for start in range(0, len(texts), AT_ONCE)]
        bar = comfy.utils.ProgressBar(len(parts))
        latents = []
        for rows in parts:
            mm.throw_exception_if_processing_interrupted()
            longest = max(len(row) for row in rows)
            tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
            device = self._load(len(rows), longest)
            latents.append(self.network.encoder(tokens.to(device), mask.to(device)).float().to(mm.intermediate_device()))
            bar.update(1)
        return torch.cat(latents)[:, :, None, None]

    def decode(
        self, latents: Tensor, *, length: int = 30, seed: int = 0, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, repeats: str = "phrases",
    ) -> list[str]:
        """The texts of latents [B, latent, 1, 1] or [B, latent], with progress and cancel.

        length, seed, temperature, top_k, top_p: see `optimus_network.write`; repeats: see `optimus_words.tidy`.
        Raises ValueError, one sentence, for other latents, without a vocabulary, and for values that are not finite.
        """
        import comfy.model_management as mm
        import comfy.utils

        flat = self.flat(latents)
        words = self.gpt2_words
        if not bool(torch.isfinite(flat).all()):
            raise ValueError("The text latent holds values that are not finite: sample it again with a lower cfg or in another number format.")
        device = self._load(len(flat), length)
        bar = comfy.utils.ProgressBar(length)

        def tick() -> None:
            mm.throw_exception_if_processing_interrupted()
            bar.update(1)

        tokens = write(
            self.network.decoder, flat.to(device, self.compute), length=length, seed=seed, temperature=temperature, top_k=top_k, top_p=top_p, tick=tick,
        )
        bar.update_absolute(length)
        return [tidy(words.decode(row), repeats) for row in tokens]

    def edit(self, latents: Tensor, negative: str = "", positive: str = "") -> Tensor:
        """Text latents [B, latent, 1, 1] with a phrase taken out and another put in, see `edited`; an empty phrase changes nothing. Raises ValueError as `encode` and `flat`."""
        start = self.flat(latents)[:, :, None, None]
        phrases = [text.strip() for text in (negative, positive)]
        minus, plus = (self.encode([text]).to(start) if text else None for text in phrases)
        return edited(start, minus, plus)

    def flat(self, latents: Tensor) -> Tensor:
        """Latents as [B, latent]. Raises ValueError, one sentence, when they are not those of texts."""
        if latents.ndim == 4 and latents.shape[2:] == (1, 1):
            latents = latents[:, :, 0, 0]
        if latents.ndim != 2 or latents.shape[1] != self.sizes.latent:
            raise ValueError(
                f"Optimus reads latents of texts, [batch, {self.sizes.latent}, 1, 1], but got {list(latents.shape)}: "
                "connect the sampler of the text diffuser, or Versatile Optimus Encode."
            )
        return latents


def edited(latents: Tensor, negative: Tensor | None = None, positive: Tensor | None = None) -> Tensor:
    """Text latents with a phrase taken out and another put in: z - (z . n) n + p, n the unit vector of the negative phrase (the 2022 code's editing).

    latents: [B, latent, 1, 1]; negative, positive: latents [1, latent, 1, 1] of the phrases, None to leave one out.
    """
    if negative is not None:
        unit = negative.flatten(1) / negative.flatten(1).norm(dim=1, keepdim=True).clamp(min=1e-12)
        share = (latents.flatten(1) * unit).sum(1, keepdim=True) * unit
        latents = latents - share.reshape(latents.shape)
    return latents if positive is None else latents + positive


@dataclass(frozen=True)
class Stored:
    """A tensor that is still in its file. key: its name there."""

    key: str
    shape: tuple[int, ...]


_loaded: weakref.WeakValueDictionary = weakref.WeakValueDictionary()


def load(path: str, precision: str = "auto") -> Optimus:
    """The Optimus of a file; the same object while anyone still holds it and the file is unchanged.

    path: a pickled state dict (read with weights only) or .safetensors. precision: auto takes float16 where the host runs
    text encoders so on a graphics card, else float32. Raises ValueError, one sentence, when it cannot be read or is no Optimus.
    """
    info = os.stat(path)
    key = (path, info.st_mtime_ns, info.st_size, precision)
    model = _loaded.get(key)
    if model is None:
        model = _loaded[key] = from_file(TensorFile(path), precision)
    return model


def from_file(file: TensorFile, precision: str = "auto") -> Optimus:
    """An Optimus from a file, of which only its own tensors are read (a four-flow file has 9 GB of others), with progress and cancel; see `load`."""
    import comfy.model_management as mm
    import comfy.model_patcher
    import comfy.utils

    tensors = take({key: Stored(key, shape) for key, shape in file.shapes.items()}, file.name)
    sizes = read_sizes(tensors, file.name)
    network = unfilled(sizes)
    expected = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    compare_shapes({key: value.shape for key, value in tensors.items()}, expected, f"file {file.name}")
    load_device, offload_device = mm.text_encoder_device(), mm.text_encoder_offload_device()
    half = precision == "fp16" or (precision == "auto" and mm.text_encoder_dtype(load_device) == torch.float16 and mm.should_use_fp16(load_device))
    dtype = torch.float16 if half else torch.float32
    names = {value.key: key for key, value in tensors.items()}
    bar = comfy.utils.ProgressBar(len(names))
    own = {}
    for name, tensor in file.read(list(names)):
        mm.throw_exception_if_processing_interrupted()
        # copied, because what stays mapped to a file changes when the file is replaced
        value = own[names[name]] = tensor.to(offload_device, dtype, copy=True)
        if half and not bool(torch.isfinite(value).all()):
            raise ValueError(f"The file {file.name} holds weights beyond the range of fp16: set precision to fp32.")
        bar.update(1)
    network.requires_grad_(False).load_state_dict(own, strict=True, assign=True)
    patcher = comfy.model_patcher.ModelPatcher(network, load_device=load_device, offload_device=offload_device)
    return Optimus(file.path, network, patcher, sizes, dtype)
