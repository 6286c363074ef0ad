"""Where the files lie, and reading them: names and shapes first, tensors one at a time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Iterator

import torch
from safetensors import safe_open
from torch import Tensor

FOLDER = "versatile_diffusion"
NONE_FOUND = "no file in models/versatile_diffusion"
WHERE = (
    "put vd-four-flow-v1-0-fp16.pth (from shi-labs/versatile-diffusion on Hugging Face, pretrained_pth) or the whole diffusers folder of that name into "
    "models/versatile_diffusion (a folder may also lie in models/diffusers) and reload the page"
)
WEIGHTS = ("diffusion_pytorch_model", "model", "pytorch_model")
ENDINGS = (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")
SAFE = (".safetensors", ".sft")
AT_ONCE = 16  # tensors read from one mapping of a safetensors file


def register() -> None:
    """Make models/versatile_diffusion known to the host, beside what extra_model_paths.yaml names."""
    import folder_paths

    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))


def _roots() -> list[str]:
    import folder_paths

    register()
    return [*folder_paths.get_folder_paths(FOLDER), *folder_paths.get_folder_paths("diffusers")]


def _diffusers_folders() -> list[str]:
    """Names of the folders of the diffusers format, relative to the folder of models they lie in."""
    found = set()
    for root in _roots():
        for folder, folders, _ in os.walk(root, followlinks=True):
            if "image_unet" in folders or "text_unet" in folders:
                found.add(Path(os.path.relpath(folder, root)).as_posix())
                folders.clear()
    return sorted(found)


def choices() -> list[str]:
    """What the loader offers: single files, then folders (with a slash at the end), or a line that says there is none."""
    import folder_paths

    folders = [f"{name}/" for name in _diffusers_folders()]
    names = (name for name in folder_paths.get_filename_list(FOLDER) if Path(name).suffix.lower() in folder_paths.supported_pt_extensions)
    single = [name for name in names if not any(name.replace(os.sep, "/").startswith(folder) for folder in folders)]
    return [*sorted(single), *folders] or [NONE_FOUND]


def find(name: str) -> str:
    """Full path of a name from `choices`. Raises ValueError, one sentence, when it is not there (any more) or lies outside the folders."""
    import folder_paths

    register()
    if name.endswith("/"):
        for root in _roots():
            path = os.path.abspath(os.path.join(root, name))
            if os.path.commonpath([path, os.path.abspath(root)]) == os.path.abspath(root) and os.path.isdir(path):
                return path
    elif path := folder_paths.get_full_path(FOLDER, name):
        return path
    if name == NONE_FOUND:
        raise ValueError(f"There is no Versatile Diffusion file yet: {WHERE}.")
    raise ValueError(f"There is no {name} in models/versatile_diffusion or models/diffusers: {WHERE}.")


def weights_in(folder: str) -> str | None:
    """The weights file of a sub-folder of the diffusers format, None where there is none."""
    for name in WEIGHTS:
        for ending in ENDINGS:
            path = os.path.join(folder, name + ending)
            if os.path.isfile(path):
                return path
    return None


def stamp(path: str) -> str:
    """Changes when a file, or a weights file of a folder, does."""
    paths = [path]
    if os.path.isdir(path):
        paths = [found for part in sorted(os.listdir(path)) if os.path.isdir(os.path.join(path, part)) and (found := weights_in(os.path.join(path, part)))]
    return " ".join(f"{info.st_mtime_ns} {info.st_size}" for info in map(os.stat, paths))


class TensorFile:
    """Tensors of a file by name. Their bytes stay on disk until they are read: the official file takes 10 GB.

    shapes: name -> shape. Raises ValueError, one sentence, for a file that is damaged, cut off or holds program objects.
    """

    def __init__(self, path: str):
        self.path, self.name = path, os.path.basename(path)
        self._state: dict[str, Tensor] = {}
        try:
            if path.lower().endswith(SAFE):
                with safe_open(path, "pt") as file:
                    self.shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
            else:
                self._state = _unpickled(path)
                self.shapes = {key: tuple(value.shape) for key, value in self._state.items()}
        # whatever the system, safetensors, pickle or zip find wrong
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"The file {self.name} cannot be read ({reason}): its download may be incomplete, so fetch it again.") from error

    def read(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of these names, one after the other; copy what is to stay, the file may be mapped. Raises ValueError as the constructor."""
        if self._state or not self.shapes:
            yield from ((name, self._state[name]) for name in names)
            return
        for start in range(0, len(names), AT_ONCE):
            try:
                # mapped anew, so that what was read does not count as ours
                with safe_open(self.path, "pt") as file:
                    tensors = [(name, file.get_tensor(name)) for name in names[start:start + AT_ONCE]]
            except Exception as error:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise ValueError(f"The file {self.name} cannot be read ({reason}): its download may be incomplete, so fetch it again.") from error
            yield from tensors

    def dtype(self, name: str) -> torch.dtype:
        """Number format of a tensor."""
        return next(self.read([name]))[1].dtype

    def part(self, prefix: str, starts: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
        """Copies of the tensors whose names start with `prefix` and then one of `starts`, without the prefix."""
        names = [name for name in self.shapes if name.startswith(tuple(prefix + start for start in starts))]
        return {name[len(prefix):]: tensor.clone() for name, tensor in self.read(names)}


def _unpickled(path: str) -> dict[str, Tensor]:
    """State dict of a .pth, weights only, mapped to the file where its format allows."""
    import comfy.utils

    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        state = comfy.utils.load_torch_file(path, safe_load=True)  # the format of torch before 1.6
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}
