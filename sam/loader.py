"""Loading: one file to one `SamModel`, built by the package segment-anything and moved by the host."""

from __future__ import annotations

import hashlib
import logging
import os
import weakref
from typing import Callable

import numpy as np
import torch
from torch import Tensor

from ..common.shapes import compare_shapes
from .kinds import WANTED, recognise
from .prompts import Prompt

log = logging.getLogger("palimpsest")

PIXEL_MEAN, PIXEL_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet, in 0..255: no part of a SAM file
KEPT = 8  # encoded pictures that a model remembers, 4 MB each
MAPS = 3  # attention maps alive at once in a global block: logits, with positions, softmax


def package():
    """The module segment_anything. Raises ValueError, one sentence with the line to type, where it is not installed or broken."""
    try:
        import segment_anything
    except ImportError as error:
        if error.name == "segment_anything":
            raise ValueError(
                "Concept Mask (SAM) needs the package segment-anything, which is not installed: type `python -m pip install segment-anything` "
                "with the Python that runs ComfyUI, and restart ComfyUI."
            ) from error
        raise ValueError(f"The package segment-anything is installed but cannot be imported ({error}): install what it names, and restart ComfyUI.") from error
    return segment_anything


class SamNetwork(torch.nn.Module):
    """A Sam in a module of ours: the host writes `device` on the modules it moves, and Sam's own cannot be written."""

    def __init__(self, sam: torch.nn.Module):
        super().__init__()
        self.sam = sam


class SamModel:
    """A SAM that is ready to be asked. name: of the file; kind: vit_b, vit_l or vit_h."""

    def __init__(self, name: str, kind: str, sam: torch.nn.Module):
        import comfy.model_management as mm
        import comfy.model_patcher
        from comfy.patcher_extension import CallbacksMP

        self.name, self.kind = name, kind
        self.network = SamNetwork(sam)
        self.patcher = comfy.model_patcher.ModelPatcher(self.network, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device())
        self.patcher.add_callback(CallbacksMP.ON_DETACH, _detached)
        self._pictures: dict[tuple, object] = {}

    @property
    def ready(self) -> bool:
        """Whether the weights are still here."""
        return self.network.sam is not None

    def release(self) -> None:
        """Let go of the weights. The object itself stays: the host may be in the middle of unloading it."""
        self.network.sam = None
        self._pictures.clear()

    @property
    def steps(self) -> int:
        """How often `segment` may call its `tick` for a picture."""
        return len(self.network.sam.image_encoder.blocks)

    def segment(self, pixels: np.ndarray, prompt: Prompt, several: bool = True, tick: Callable[[], None] = lambda: None) -> tuple[Tensor, list[float]]:
        """Proposed masks, bool [3 or 1, H, W] on the CPU, and the quality SAM predicts for each (0 to about 1).

        pixels: RGB uint8 [H, W, 3]. several: three masks, which is made for a prompt that may mean a part or the whole;
        otherwise SAM's single answer. A picture that was asked about before is not encoded again. tick: called after
        each block of the encoder; what it raises ends the work. Raises ValueError for scores that are not finite.
        """
        import comfy.model_management as mm

        encoder = self.network.sam.image_encoder
        tokens = (encoder.img_size // 16) ** 2
        needed = MAPS * encoder.blocks[0].attn.num_heads * tokens**2 * 4
        # partly loaded, its bare parameters would stay behind: only the host's own layers fetch what is missing
        mm.load_models_gpu([self.patcher], memory_required=needed, force_full_load=True)
        predictor = self._encoded(pixels, tick)
        masks, scores, _ = predictor.predict(
            point_coords=np.array(prompt.points, dtype=np.float64) if prompt.points else None,
            point_labels=np.array(prompt.wanted, dtype=np.int64) if prompt.points else None,
            box=None if prompt.box is None else np.array(prompt.box, dtype=np.float64),
            multimask_output=several,
        )
        if not np.isfinite(scores).all():
            raise ValueError(f"SAM gave scores that are not finite: the file {self.name} holds damaged values, so download it again.")
        return torch.from_numpy(masks), [float(score) for score in scores]

    def _encoded(self, pixels: np.ndarray, tick: Callable[[], None]):
        """A predictor that holds the picture's features."""
        pixels = np.ascontiguousarray(pixels)
        key = (pixels.shape, hashlib.sha256(pixels).hexdigest())
        predictor = self._pictures.pop(key, None)
        if predictor is None:
            predictor = package().SamPredictor(self.network.sam)

            def passed(module, args, output):
                tick()

            hooks = [block.register_forward_hook(passed) for block in self.network.sam.image_encoder.blocks]
            try:
                predictor.set_image(pixels)
            finally:
                for hook in hooks:
                    hook.remove()
        predictor.features = predictor.features.to(predictor.device)  # the model may have moved since
        self._pictures[key] = predictor
        while len(self._pictures) > KEPT:
            del self._pictures[next(iter(self._pictures))]
        return predictor


_loaded: weakref.WeakValueDictionary = weakref.WeakValueDictionary()
_recent: list[SamModel] = []  # at most one: no wire holds a SAM, and the next box should not read the file again


def _detached(patcher, unpatch_all: bool = True, *args, **kwargs) -> None:
    """The host has unloaded a SAM, for want of memory or because the user asked for it: do not keep it either."""
    for model in _recent:
        if unpatch_all and model.patcher is patcher:
            model.release()


def load(path: str) -> SamModel:
    """The SAM of a file; the same object while it is in use or was the last one used, and the file is unchanged.

    path: .pth, or .safetensors with the same names; any float format, computed in float32. It stays in memory until the
    host unloads it or another file is loaded. Raises ValueError, one sentence, when the package is missing, the file
    cannot be read or holds something else.
    """
    package()
    info = os.stat(path)
    key = (path, info.st_mtime_ns, info.st_size)
    model = _loaded.get(key)
    if model is None or not model.ready:
        _recent.clear()
        model = _loaded[key] = from_state(read_file(path), os.path.basename(path))
    _recent[:] = [model]
    return model


def read_file(path: str):
    """Content of a model file, weights only. Raises ValueError, one sentence, when it is damaged or holds program objects."""
    import comfy.utils

    name = os.path.basename(path)
    try:
        return comfy.utils.load_torch_file(path, safe_load=True)
    # whatever the system, safetensors, torch or zip find wrong
    except Exception as error:
        text = str(error)
        if "weights only" in text.lower():
            maker = ", as a YOLO does" if "ultralytics" in text or "yolo" in text.lower() else ""
            raise ValueError(f"The file {name} holds program objects beside its tensors{maker}, so it was not read: {WANTED}.") from error
        reason = (text or type(error).__name__).splitlines()[0]
        raise ValueError(f"The file {name} cannot be read ({reason}): its download may be incomplete, so fetch it again.") from error


def from_state(state: dict[str, Tensor], name: str) -> SamModel:
    """A SAM from a state dict, which is emptied; see `load`."""
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"The file {name} holds no table of tensors, so it is no SAM: {WANTED}.")
    kind = recognise(state, name)
    # without memory: the file's tensors become the parameters
    with torch.device("meta"):
        sam = package().sam_model_registry[kind]()
    compare_shapes({key: tuple(value.shape) for key, value in state.items()}, {key: tuple(value.shape) for key, value in sam.state_dict().items()}, f"SAM file {name}")
    # copies, one at a time: tensors of a safetensors file stay mapped to it
    own = {key: state.pop(key).to(torch.float32, copy=True) for key in list(state)}
    sam.requires_grad_(False).load_state_dict(own, assign=True)
    sam.pixel_mean, sam.pixel_std = (torch.tensor(values).view(-1, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    log.info("Palimpsest: %s is a SAM %s.", name, kind)
    return SamModel(name, kind, sam.eval())
