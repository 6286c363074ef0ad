"""Where SAM files lie: the folder models/sams of the host's registry, which other packs use too."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = "sams"
WHERE = (
    "put sam_vit_b_01ec64.pth (375 MB), sam_vit_l_0b3195.pth (1.2 GB) or sam_vit_h_4b8939.pth (2.6 GB) from the README of facebookresearch/segment-anything on GitHub "
    "into models/sams and reload the page"
)
NONE_FOUND = "no SAM file in models/sams"


def register() -> None:
    """Make models/sams known to the host, beside what extra_model_paths.yaml and other packs name."""
    import folder_paths

    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))


def choices() -> list[str]:
    """What the node offers: names of the files in the folder, sorted, or a line that says there is none."""
    import folder_paths

    register()
    names = (name for name in folder_paths.get_filename_list(FOLDER) if Path(name).suffix.lower() in folder_paths.supported_pt_extensions)
    return sorted(names) or [NONE_FOUND]


def find(name: str) -> str:
    """Full path of a name from `choices`. Raises ValueError, one sentence, when it is not there (any more)."""
    import folder_paths

    register()
    if path := folder_paths.get_full_path(FOLDER, name):
        return path
    raise ValueError(f"There is no SAM file yet: {WHERE}." if name == NONE_FOUND else f"There is no file {name} in models/sams: {WHERE}.")


def stamp(name: str | None) -> str:
    """Changes when the file of this name does; empty for a linked or a missing one."""
    try:
        info = os.stat(find(name)) if name else None
    except (ValueError, OSError):
        info = None
    return f"{info.st_mtime_ns} {info.st_size}" if info else ""
