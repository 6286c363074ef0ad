"""Weights files of the mini family: fp16 safetensors with the recipe in their metadata."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(state dict with floats as fp32, metadata) of a safetensors file.

    Raises ValueError when the file is missing, truncated or no safetensors file (a pickle, say).
    """
    import comfy.utils

    path = Path(path)
    remedy = "reinstall the pack or run `python dev.py train` again"
    if not path.is_file():
        raise ValueError(f"The mini weights {path.name} are missing from {path.parent.name}; {remedy}.")
    # the host unpickles files of any other name
    if path.suffix != ".safetensors":
        raise ValueError(f"Weights are kept in .safetensors files, but {path.name} is none; {remedy}.")
    try:
        tensors, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    # the host turns some of safetensors' errors into ValueError, with the whole path in them, and trips over the numbers in an OSError
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise ValueError(f"The mini weights {path.name} are no readable safetensors file (truncated, damaged, or a pickle under another name); {remedy}.") from error
    # copies all: the host may hand out memory-mapped tensors, and Windows cannot replace a mapped file
    return {k: v.to(torch.float32, copy=True) if v.is_floating_point() else v.clone() for k, v in tensors.items()}, metadata or {}


def write_weights(path: Path, tensors: dict[str, torch.Tensor], metadata: dict) -> None:
    """Write `tensors` as fp16 (integers as they are), whole or not at all; metadata values become JSON strings."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    half = {k: (v.half() if v.is_floating_point() else v).contiguous().cpu() for k, v in tensors.items()}
    save_file(half, partial, metadata={k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()})
    partial.replace(path)
