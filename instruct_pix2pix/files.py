"""Checkpoint files, by the names that the host lists them under."""

from __future__ import annotations

import os

FOLDER = "checkpoints"
NONE_FOUND = "no file in models/checkpoints"
WHERE = "put instruct-pix2pix-00-22000.safetensors (7.7 GB, from timbrooks/instruct-pix2pix on Hugging Face) or another edit checkpoint into models/checkpoints and reload the page"


def choices() -> list[str]:
    """Names of the checkpoints, or a line that says there are none."""
    import folder_paths

    return folder_paths.get_filename_list(FOLDER) or [NONE_FOUND]


def find(name: str) -> str:
    """Full path of a checkpoint. Raises ValueError, one sentence, when it is not there (any more)."""
    import folder_paths

    path = None if name == NONE_FOUND else folder_paths.get_full_path(FOLDER, name)
    if path is None:
        raise ValueError(f"There is no checkpoint {'yet' if name == NONE_FOUND else name + ' in models/' + FOLDER}: {WHERE}.")
    return path


def stamp(name: str | None) -> str:
    """Changes when the file of this name does; empty for a linked or a missing one."""
    try:
        info = os.stat(find(name)) if name else None
    except (ValueError, OSError):
        info = None
    return f"{info.st_mtime_ns} {info.st_size}" if info else ""
