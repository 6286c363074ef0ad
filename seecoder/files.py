"""Where SeeCoder's files lie: two folders of the host's registry, and the small one that comes with the pack."""

from __future__ import annotations

import os
from pathlib import Path

FOLDERS = ("seecoder", "seecoders")  # people use either; extra_model_paths.yaml may name either
SHIPPED = {"mini_seecoder (comes with Palimpsest)": Path(__file__).parents[1] / "mini" / "weights" / "seecoder.safetensors"}
EMBEDDING_BYTES = 2**22  # a file below this is a negative embedding, not an encoder
WHERE = (
    "put seecoder-v1-0.safetensors, seecoder-pa-v1-0.safetensors or seecoder-anime-v1-0.safetensors (1.2 GB each, from shi-labs/prompt-free-diffusion on Hugging Face) "
    "into models/seecoder and reload the page (ComfyUI-Manager uses the folder that its entry names)"
)
NONE_FOUND = "no SeeCoder file in models/seecoder"


def register() -> None:
    """Make models/seecoder and models/seecoders known to the host, beside what extra_model_paths.yaml names."""
    import folder_paths

    for name in FOLDERS:
        folder_paths.add_model_folder_path(name, os.path.join(folder_paths.models_dir, name))


def installed() -> list[str]:
    """Names of the files in the folders, sorted, each once."""
    import folder_paths

    register()
    names = (name for folder in FOLDERS for name in folder_paths.get_filename_list(folder))
    return sorted({name for name in names if Path(name).suffix.lower() in folder_paths.supported_pt_extensions})


def _bytes(name: str) -> int:
    try:
        return os.path.getsize(find(name))
    except (ValueError, OSError):  # gone since it was listed
        return 0


def encoders() -> list[str]:
    """Installed files that are large enough to be an encoder."""
    return [name for name in installed() if _bytes(name) >= EMBEDDING_BYTES]


def embeddings() -> list[str]:
    """Installed files that are small enough to be a negative embedding."""
    return [name for name in installed() if _bytes(name) < EMBEDDING_BYTES]


def choices() -> list[str]:
    """What the loader offers: installed encoders, or a line that explains where they belong; then the pack's own."""
    return [*(encoders() or [NONE_FOUND]), *(name for name, path in SHIPPED.items() if path.is_file())]


def find(name: str) -> str:
    """Full path of a name from `choices` or `installed`. Raises ValueError, one sentence, when it is not there (any more)."""
    import folder_paths

    if name in SHIPPED:
        if SHIPPED[name].is_file():
            return str(SHIPPED[name])
        raise ValueError("The pack's own SeeCoder is not part of this version: choose an installed file, or update Palimpsest.")
    register()
    for folder in FOLDERS:
        if path := folder_paths.get_full_path(folder, name):
            return path
    if name == NONE_FOUND:
        raise ValueError(f"There is no SeeCoder file yet: {WHERE}.")
    raise ValueError(f"There is no file {name} in {' or '.join(f'models/{folder}' for folder in FOLDERS)}: {WHERE}.")
