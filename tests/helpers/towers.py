"""Image and text towers with random weights, in files as they are shipped."""

from __future__ import annotations

from pathlib import Path

import torch

from ...mini import storage, towers


def write_random_towers(folder: Path, seed: int = 0) -> Path:
    """mini/weights/towers.safetensors with start values; returns its path."""
    torch.manual_seed(seed)
    path = Path(folder) / towers.FILE
    storage.write_weights(path, towers.file_state(towers.Towers().state_dict()), {"recipe": "towers"})
    return path
