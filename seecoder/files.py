"""Where SeeCoder's files lie: two folders of the host's registry, and the small one that comes with the pack."""

from __future__ import annotations

import os
from pathlib import Path

FOLDERS = ("seecoder", "seecoders")  # people use either; extra_model_paths.yaml may name either
SHIPPED = {"mini_seecoder (comes with Palimpsest)": Path(__file__).parents[1] / "mini" / "weights" / "seecoder.safetensors"}
WHERE = (
    "put seecoder-v1-0.safetensors, seecoder-pa-v1-0.safetensors or seecoder-anime-v1-0.safetensors (1.2 GB each, from shi-labs/prompt-free-diffusion on Hugging Face) "
    "into models/seecoder and reload the page"
)
NONE_FOUND = "no SeeCoder file in models/seecoder"


def register() -> None:
    """Make models/seecoder and models/seecoders known to the host, beside what extra_model_paths.yaml names."""
    import folder_paths

    for name in FOLDERS:
        folder_paths.add_model_folder_path(name, os.path.join(folder_paths.models_dir, name))


def installed(suffixes: set[str] | None = None) -> list[str]:
    """Names of the files in the folders, sorted, each once."""
    import folder_paths

    register()
    wanted = folder_paths.supported_pt_extensions if suffixes is None else suffixes
    names = (name for folder in FOLDERS for name in folder_paths.get_filename_list(folder))
    return sorted({name for name in names if Path(name).suffix.lower() in wanted})


def choices() -> list[str]:
    """What the loader offers; one explaining line where there is nothing."""
    return [*installed(), *(name for name, path in SHIPPED.items() if path.is_file())] or [NONE_FOUND]


def find(name: str) -> str:
    """Full path of a name from `choices` or `installed`. Raises ValueError, one sentence, when it is not there (any more)."""
    import folder_paths

    if name in SHIPPED and SHIPPED[name].is_file():
        return str(SHIPPED[name])
    register()
    for folder in FOLDERS:
        if path := folder_paths.get_full_path(folder, name):
            return path
    if name == NONE_FOUND:
        raise ValueError(f"There is no SeeCoder file yet: {WHERE}.")
    raise ValueError(f"There is no file {name} in {' or '.join(f'models/{folder}' for folder in FOLDERS)}: {WHERE}.")
