"""Loading: one file to one `SeeCoderModel`, which the host loads, offloads and casts like its own vision encoders."""

from __future__ import annotations

import logging
import os
import weakref
from dataclasses import dataclass
from typing import Callable

import torch
from safetensors import safe_open
from torch import Tensor

from .network import SeeCoder, build
from .sizes import LEVELS, PREFIX, Sizes, describe_other, read_sizes, without_prefix

log = logging.getLogger("palimpsest")

PRECISIONS = ("auto", "fp32", "fp16")
TENSORS_AT_ONCE = 4  # of a file that is copied: up to 120 MB in the official ones
# live values per pixel of the picture and channel of the first stage, with room to spare: what the host is asked to keep free
VALUES_PER_PIXEL = 1.6


@dataclass(eq=False)
class SeeCoderModel:
    """A SeeCoder on the wire. name: of the file; compute: dtype of the activations."""

    name: str
    network: SeeCoder
    patcher: object
    compute: torch.dtype

    @property
    def sizes(self) -> Sizes:
        """Sizes of the network."""
        return self.network.sizes

    @property
    def width(self) -> int:
        """Channels of a token: 768 in the official files."""
        return self.sizes.width

    def describe(self) -> str:
        """One line for people."""
        kind = "position-aware" if self.sizes.position else "plain"
        dtypes = {torch.float32: "fp32", torch.float16: "fp16"}
        return f"SeeCoder {self.name}: {kind}, {self.sizes.queries} tokens of {self.width} values, computed in {dtypes[self.compute]}"

    @property
    def steps(self) -> int:
        """How often `encode` calls its `tick`."""
        return sum(self.sizes.depths) + len(LEVELS) + self.sizes.query_layers

    def encode(self, pixels: Tensor, coverage: Tensor | None = None, reading: list | None = None, tick: Callable[[], None] | None = None) -> Tensor:
        """RGB [B, H, W, 3] in 0..1 -> tokens [B, queries, width], float32 on the host's intermediate device.

        coverage, reading, tick: as in `SeeCoder.forward`; the maps are moved too. Half precision that overflows is computed
        again in float32, for this picture. Raises ValueError when even that is not finite.
        """
        import comfy.model_management as mm

        needed = int(pixels.shape[0] * pixels.shape[1] * pixels.shape[2] * self.sizes.embed * VALUES_PER_PIXEL * 4)
        mm.load_models_gpu([self.patcher], memory_required=needed)
        device = self.patcher.load_device
        for dtype in dict.fromkeys((self.compute, torch.float32)):
            seen: list | None = None if reading is None else []
            x = pixels.movedim(-1, 1).to(device, dtype)
            tokens = self.network(x, None if coverage is None else coverage.to(device), seen, tick or (lambda: None))
            if bool(torch.isfinite(tokens).all()):
                if reading is not None and seen is not None:
                    reading += [(level, maps.to(mm.intermediate_device())) for level, maps in seen]
                return tokens.float().to(mm.intermediate_device())
            log.info("Palimpsest: SeeCoder's values left the range of %s, so the picture is encoded in float32.", dtype)
        raise ValueError("SeeCoder gave values that are not finite: the picture or the model file holds such values, so load another of them.")


_loaded: weakref.WeakValueDictionary = weakref.WeakValueDictionary()


def load(path: str, precision: str = "auto") -> SeeCoderModel:
    """The SeeCoder of a file; the same object while anyone still holds it and the file is unchanged.

    path: .safetensors or a pickled state dict (read with weights only), float32, float16 or bfloat16. precision: of the
    activations; auto takes float16 where the host runs text encoders so on a graphics card, else float32.
    Raises ValueError, one sentence, when the file cannot be read or is no SeeCoder.
    """
    info = os.stat(path)
    key = (path, info.st_mtime_ns, info.st_size, precision)
    model = _loaded.get(key)
    if model is None:
        model = _loaded[key] = from_state(read_file(path), os.path.basename(path), precision)
    return model


def read_file(path: str):
    """Content of a model file. Raises ValueError, one sentence, when it is damaged or, if it has names to tell by, no SeeCoder.

    Tensors of a safetensors file are copied a few at a time: the host's loader maps the whole file, and weights that stay mapped
    change, or kill the process, when the file is replaced; copying them from one mapping would hold everything twice.
    """
    import comfy.utils

    try:
        if not path.lower().endswith((".safetensors", ".sft")):
            return comfy.utils.load_torch_file(path, safe_load=True)
        with safe_open(path, "pt") as file:
            names = list(file.keys())
        own = [name for name in names if name.startswith(PREFIX)] or names
        if not any("imencoder." in name for name in own) and len(own) > 1:
            own = []
        state: dict[str, Tensor] = {}
        for start in range(0, len(own), TENSORS_AT_ONCE):
            with safe_open(path, "pt") as file:
                state.update({name: file.get_tensor(name).clone() for name in own[start:start + TENSORS_AT_ONCE]})
    # whatever the system, safetensors, pickle or zip find wrong
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"The file {os.path.basename(path)} cannot be read ({reason}): its download may be incomplete, so fetch it again.") from error
    if not own:
        raise ValueError(f"The file {os.path.basename(path)} is no SeeCoder: {describe_other(names)}; choose seecoder-v1-0, seecoder-pa-v1-0 or seecoder-anime-v1-0.")
    return state


def from_state(state: dict[str, Tensor], name: str, precision: str = "auto") -> SeeCoderModel:
    """A SeeCoder from a state dict, which is emptied; see `load`."""
    import comfy.model_management as mm
    import comfy.model_patcher
    import comfy.ops

    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"The file {name} holds no table of tensors, so it is no SeeCoder: choose seecoder-v1-0, seecoder-pa-v1-0 or seecoder-anime-v1-0.")
    named = without_prefix(state)
    state.clear()
    sizes = read_sizes(named)
    load_device, offload_device = mm.text_encoder_device(), mm.text_encoder_offload_device()
    # bfloat16 activations are off by 2 %, so such files are computed in float32
    plain = not any(tensor.dtype == torch.bfloat16 for tensor in named.values())
    half = precision == "fp16" or (precision == "auto" and plain and mm.text_encoder_dtype(load_device) == torch.float16 and mm.should_use_fp16(load_device))
    network = build(named, sizes, comfy.ops.manual_cast)
    if half:
        # in place of float32 weights, which half-precision activations would only cast anew for every picture
        network.to(torch.float16)
        if not all(bool(torch.isfinite(parameter).all()) for parameter in network.parameters()):
            raise ValueError(f"The file {name} holds weights beyond the range of fp16: set precision to fp32.")
    patcher = comfy.model_patcher.ModelPatcher(network, load_device=load_device, offload_device=offload_device)
    return SeeCoderModel(name, network, patcher, torch.float16 if half else torch.float32)
