"""The pack's own files in the host's input and output folders: listing, resolving, writing."""

from __future__ import annotations

import json
import os
import uuid

from torch import Tensor


def listed(folder: str, suffixes: tuple[str, ...]) -> list[str]:
    """Sorted names of the files of one folder that end so; none of a folder that is not there.

    Only the top of it, as the host's LoadLatent does it: this is asked at every look at a node, and outputs run to
    hundreds of thousands of files.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.name.lower().endswith(suffixes) and entry.is_file())
    except OSError:
        return []


def resolve(name: str, what: str) -> str:
    """Full path of a widget value, such as `mine.safetensors` or `folder/mine.safetensors [output]`. what: kind of file, for the message.

    Raises ValueError, one sentence, for a name that leaves the host's folders.
    """
    import folder_paths

    plain, folder = folder_paths.annotated_filepath(name)
    folder = os.path.abspath(folder or folder_paths.get_input_directory())
    path = os.path.abspath(os.path.join(folder, plain))
    if os.path.splitdrive(path)[0] != os.path.splitdrive(folder)[0] or os.path.commonpath([path, folder]) != folder:
        raise ValueError(f"The {what} file {name} lies outside the host's input and output folders: copy it into one of them.")
    return path


def write_tensors(path: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file to `path`, whole or not at all: to a temporary file beside it, then moved into place.

    Raises OSError and SafetensorError.
    """
    from safetensors.torch import save

    folder = os.path.dirname(os.path.abspath(path))
    temporary = os.path.join(folder, f".{uuid.uuid4().hex}.tmp")
    try:
        os.makedirs(folder, exist_ok=True)
        # clones: safetensors refuses tensors that share memory
        data = save({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, metadata=metadata)
        # not safetensors' save_file or tempfile: theirs are readable by their owner only, and another worker may be another user
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def workflow_of(node) -> dict[str, str]:
    """The graph that runs a node class, for a file's header, as the host's own savers keep it, unless --disable-metadata."""
    from comfy.cli_args import args

    if args.disable_metadata or node.hidden is None:
        return {}
    kept = {"prompt": node.hidden.prompt, **(node.hidden.extra_pnginfo or {})}
    return {key: json.dumps(value) for key, value in kept.items() if value is not None}
