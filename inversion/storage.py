"""Trajectories in files: one safetensors file, nothing pickled.

Tensors: "sigmas", "latents" (sampler scaling), "noise_mask" if there is one, and "conditioning.N" for every
tensor inside the conditioning. Metadata (all strings, as safetensors wants): format, version, scaling,
architecture, prediction, fingerprint, guidance, schedule, info and the conditioning's structure as JSON.
"""

from __future__ import annotations

import json
import math
import os
from numbers import Real

import torch
from safetensors import SafetensorError

from ..common.files import write_tensors
from .fingerprint import decode
from .trajectory import Trajectory

FORMAT = "palimpsest_trajectory"
VERSION = 1
SCALING = "sampler"
SUFFIX = ".trajectory.safetensors"

_SKIPPED = object()


def _pack(value, tensors: dict[str, torch.Tensor]):
    """A conditioning value as JSON with tensors moved into `tensors`, or _SKIPPED for what no file can hold."""
    if isinstance(value, torch.Tensor):
        name = f"conditioning.{len(tensors)}"
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Real):
        number = float(value)
        if not math.isfinite(number):
            return _SKIPPED
        return int(value) if isinstance(value, int) else number
    if isinstance(value, (list, tuple)):
        items = [_pack(item, tensors) for item in value]
        if any(item is _SKIPPED for item in items):
            return _SKIPPED
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        packed = {key: _pack(item, tensors) for key, item in value.items()}
        if any(item is _SKIPPED for item in packed.values()):
            return _SKIPPED
        return {"dict": packed}
    return _SKIPPED


def _unpack(value, tensors: dict[str, torch.Tensor]):
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        if "tuple" in value:
            return tuple(_unpack(item, tensors) for item in value["tuple"])
        return {key: _unpack(item, tensors) for key, item in value["dict"].items()}
    return value


def _pack_conditioning(conditioning: list) -> tuple[list, dict[str, torch.Tensor], list[str]]:
    tensors: dict[str, torch.Tensor] = {}
    entries, skipped = [], []
    for context, options in conditioning:
        kept = {}
        for key, value in options.items():
            before = dict(tensors)
            packed = _pack(value, tensors)
            if packed is _SKIPPED:
                tensors = before
                skipped.append(key)
            else:
                kept[key] = packed
        entries.append({"context": _pack(context, tensors), "options": kept})
    return entries, tensors, sorted(set(skipped))


def save_trajectory(trajectory: Trajectory, path: str, extra_metadata: dict[str, str] | None = None) -> list[str]:
    """Write `trajectory` to `path` (which ends in .safetensors).

    Written to a temporary file beside it and moved into place, so a full disk or a cancelled run leaves no half
    file. Returns the names of conditioning entries that no file can hold and were left out (a ControlNet, hooks).
    extra_metadata: more strings for the header, such as the workflow. Raises ValueError when it cannot be written.
    """
    entries, tensors, skipped = _pack_conditioning(trajectory.conditioning)
    tensors = {"sigmas": trajectory.sigmas, "latents": trajectory.latents, **tensors}
    if trajectory.noise_mask is not None:
        tensors["noise_mask"] = trajectory.noise_mask
    metadata = {
        **(extra_metadata or {}),
        "format": FORMAT,
        "version": str(VERSION),
        "scaling": SCALING,
        "architecture": trajectory.architecture,
        "prediction": trajectory.prediction,
        "fingerprint": trajectory.fingerprint,
        "guidance": repr(float(trajectory.guidance)),
        "schedule": json.dumps({"scheduler": trajectory.info.get("scheduler"), "steps": trajectory.steps}),
        "info": json.dumps(trajectory.info),
        "conditioning": json.dumps(entries),
        "left_out": json.dumps(skipped),
    }
    try:
        write_tensors(path, tensors, metadata)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"The trajectory could not be written to {os.path.basename(path)} ({reason(error)}): check the folder and the free space.") from error
    return skipped


def reason(error: Exception) -> str:
    """What an exception says is wrong, without the full path or the remedy that some messages carry."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    if isinstance(error, json.JSONDecodeError):
        return "a text in its header is broken"
    text = str(error).strip().splitlines()
    return text[0].removesuffix(": invert again.").rstrip(".") if text else type(error).__name__


def load_trajectory(path: str) -> Trajectory:
    """Read a file written by `save_trajectory`. Never unpickles.

    Raises ValueError, one sentence, for a missing, truncated or damaged file, a pickle, or another kind of
    safetensors file.
    """
    import comfy.utils

    name = os.path.basename(path)
    if not os.path.isfile(path):
        raise ValueError(f"The trajectory file {name} does not exist: choose another, or save one with Save Trajectory.")
    # the host unpickles files of any other name
    if not path.lower().endswith(".safetensors"):
        raise ValueError(f"A trajectory is a .safetensors file, but {name} is not: choose one written by Save Trajectory.")
    try:
        tensors, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
    # the host turns some of safetensors' errors into ValueError, and trips over the numbers in an OSError
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise ValueError(
            f"The file {name} is not a readable safetensors file (truncated, damaged, or a pickle under another name): save the trajectory again."
        ) from error
    metadata = metadata or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(f"The file {name} is a safetensors file, but not a trajectory: choose one written by Save Trajectory.")
    if metadata.get("version") != str(VERSION) or metadata.get("scaling") != SCALING:
        raise ValueError(
            f"The file {name} holds a trajectory of version {metadata.get('version')} in {metadata.get('scaling')} scaling, but this "
            f"pack reads version {VERSION} in {SCALING} scaling: update the pack, or invert again."
        )
    # copies: the host may hand out memory-mapped tensors, and Windows cannot replace a mapped file
    tensors = {key: value.clone() for key, value in tensors.items()}
    try:
        conditioning = [
            [_unpack(entry["context"], tensors), {key: _unpack(value, tensors) for key, value in entry["options"].items()}]
            for entry in json.loads(metadata["conditioning"])
        ]
        info = json.loads(metadata["info"])
        if not isinstance(info, dict):
            raise ValueError("its report figures are none")
        decode(metadata["fingerprint"])
        if left_out := json.loads(metadata["left_out"]):
            info["left_out"] = left_out
        return Trajectory(
            sigmas=tensors["sigmas"],
            latents=tensors["latents"],
            conditioning=conditioning,
            architecture=metadata["architecture"],
            prediction=metadata["prediction"],
            fingerprint=metadata["fingerprint"],
            guidance=float(metadata["guidance"]),
            info=info,
            noise_mask=tensors.get("noise_mask"),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"The trajectory in {name} is damaged ({reason(error)}): save it again.") from error
