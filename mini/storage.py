"""Weights files of the mini family: fp16 safetensors with the recipe in their metadata."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(state dict with floats as fp32, metadata) of a safetensors file.

    Raises ValueError when the file is missing, truncated or no safetensors file (a pickle, say).
    """
    path = Path(path)
    remedy = "reinstall the pack or run `python dev.py train` again"
    if not path.is_file():
        raise ValueError(f"The mini weights {path.name} are missing from {path.parent.name}; {remedy}.")
    try:
        with safe_open(path, "pt") as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"The mini weights {path.name} are no readable safetensors file ({error}); {remedy}.") from error
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}, metadata


def write_weights(path: Path, tensors: dict[str, torch.Tensor], metadata: dict) -> None:
    """Write `tensors` as fp16 (integers as they are), whole or not at all; metadata values become JSON strings."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    half = {k: (v.half() if v.is_floating_point() else v).contiguous().cpu() for k, v in tensors.items()}
    save_file(half, partial, metadata={k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()})
    partial.replace(path)
