"""Checkpoints that hold two sets of UNet weights, the trained ones and their exponential moving average (EMA).

The official 7.7 GB file holds both, 3.4 GB each. The authors sample with the average (their configuration switches EMA on); the host's own loader takes the others.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from .checks import CHANNELS, check_edit_model, refusal

NODE = "InstructPix2Pix Loader"
SETS = ("ema", "plain")
MODEL, EMA = "model.", "model_ema."
UNET = "model.diffusion_model."
FIRST = UNET + "input_blocks.0.0.weight"
SAFE = (".safetensors", ".sft")


def averaged(name: str) -> str:
    """The name of the average of a UNet tensor: its own within the trained module, without any dots."""
    return EMA + name.removeprefix(MODEL).replace(".", "")


def chosen(names: list[str], weights: str, file: str) -> dict[str, str]:
    """Which tensors of a checkpoint to read: name that the host knows -> name in the file.

    names: all of the file. weights: one of SETS. file: its name, for messages. Raises ValueError, one sentence, when it is no checkpoint of
    the SD family or has no EMA set, or one with gaps.
    """
    if FIRST not in names:
        raise ValueError(f"The file {file} holds no UNet of the SD family ({FIRST} is not in it): choose an instruct-pix2pix checkpoint in one file.")
    if weights not in SETS:
        raise ValueError(f"There is no set of weights called {weights}: choose {' or '.join(SETS)}.")
    found = {name: name for name in names if not name.startswith(EMA)}
    if weights == "plain":
        return found
    there = set(names)
    if not any(name.startswith(EMA) for name in there):
        raise ValueError(f"The file {file} holds one set of weights and no EMA set beside it: set weights to plain (a pruned file may hold either of them).")
    unet = [name for name in found if name.startswith(UNET)]
    missing = [name for name in unet if averaged(name) not in there]
    if missing:
        raise ValueError(f"The EMA set of {file} lacks {len(missing)} of {len(unet)} tensors, {averaged(missing[0])} first: set weights to plain, or download the file again.")
    return {**found, **{name: averaged(name) for name in unet}}


def read_checkpoint(path: str, weights: str) -> tuple[dict[str, Tensor], dict | None]:
    """(state dict under the host's names, metadata) of one set of weights.

    Of a safetensors file only the tensors of that set are read, and only when the host copies them into its model; a pickled file is read whole, by
    the host's loader in its safe mode, and the other set let go at once. Raises ValueError, one sentence: a damaged or unsafe file, what `chosen`
    refuses, and a UNet whose first layer takes another number of channels than 8, which is found before anything large is read.
    """
    import comfy.utils
    from safetensors import safe_open

    file = os.path.basename(path)
    if not path.lower().endswith(SAFE):
        try:
            state = comfy.utils.load_torch_file(path, safe_load=True)
        # whatever torch, pickle, zip or the system find wrong
        except Exception as error:
            raise ValueError(
                f"The file {file} cannot be read without running what is pickled in it, or is damaged ({_reason(error)}): get the .safetensors of it instead."
            ) from error
        if not isinstance(state, dict):
            raise ValueError(f"The file {file} holds no table of tensors: choose an instruct-pix2pix checkpoint.")
        wanted = chosen([name for name, value in state.items() if isinstance(value, Tensor)], weights, file)
        _check_channels(state[wanted[FIRST]].shape, file)
        return {name: state[source] for name, source in wanted.items()}, None
    try:
        opened = safe_open(path, "pt")
    except Exception as error:
        raise ValueError(f"The file {file} cannot be read ({_reason(error)}): its download may be incomplete, so fetch it again.") from error
    with opened as tensors:
        wanted = chosen(list(tensors.keys()), weights, file)
        _check_channels(tensors.get_slice(wanted[FIRST]).get_shape(), file)
        # mapped, not read, unless the user has told the host not to map files
        copied = getattr(comfy.utils, "DISABLE_MMAP", False)
        state = {name: tensors.get_tensor(source).clone() if copied else tensors.get_tensor(source) for name, source in wanted.items()}
        return state, tensors.metadata()


def load(path: str, weights: str):
    """(MODEL, CLIP, VAE) of an edit checkpoint as the host loads them, with one of its two sets of UNet weights; CLIP is None where the file has no text encoder.

    Raises ValueError, one sentence, for what `read_checkpoint` refuses and for a file that the host does not take for an edit model.
    """
    import comfy.sd
    import folder_paths

    file = os.path.basename(path)
    state, metadata = read_checkpoint(path, weights)
    try:
        found = comfy.sd.load_state_dict_guess_config(state, embedding_directory=folder_paths.get_folder_paths("embeddings"), metadata=metadata)
    except RuntimeError as error:
        # torch's list of all shapes that do not fit
        raise ValueError(f"The tensors of {file} do not fit the model they name ({_reason(error)}): it is damaged or was converted wrongly, so download it again.") from error
    if found is None:
        raise ValueError(f"ComfyUI does not know the model in {file}: choose an instruct-pix2pix checkpoint in one file.")
    model, clip, vae = found[:3]
    check_edit_model(model, NODE, f"that of {file}")
    return model, clip, vae


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(" .:")


def _check_channels(shape: torch.Size | list[int], file: str) -> None:
    if len(shape) != 4:
        raise ValueError(f"The first layer of {file} has the shape {list(shape)}, which is no convolution: it is damaged or was converted wrongly, so download it again.")
    if shape[1] != CHANNELS:
        raise ValueError(refusal(NODE, file, shape[1]))
