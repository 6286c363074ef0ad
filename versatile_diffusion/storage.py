"""Contexts in files: our own safetensors, and arrays that users bring (brain decoding, their own encoders)."""

from __future__ import annotations

import os

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..common.files import write_tensors
from .contexts import PICTURES, flow_of
from .keys import IMAGE, TEXT
from .model import DUAL, FLOW, IMAGE_CONTEXT, RATIO

FORMAT = "palimpsest_versatile_context"
SUFFIX = ".context.safetensors"
EXTENSIONS = (".safetensors", ".npy")
AUTO = "auto"
FLOWS = (AUTO, TEXT, IMAGE)


def save_context(conditioning: list, path: str, extra: dict[str, str] | None = None) -> None:
    """Write the first entry of a CONDITIONING: its tokens and flow, for a dual one the picture's tokens and the ratio too.

    extra: more entries of the file's header. Areas, ranges and ControlNets are not kept. Raises ValueError, one sentence, when it cannot be written.
    """
    flow = flow_of(conditioning, "context")
    tokens, options = conditioning[0]
    tensors = {"context": tokens}
    metadata = {**(extra or {}), "format": FORMAT, "flow": flow}
    if flow == DUAL:
        tensors["image"] = options[IMAGE_CONTEXT]
        metadata["ratio"] = repr(float(options[RATIO]))
    if PICTURES in options:
        metadata["pictures"] = " ".join(map(str, options[PICTURES]))
    try:
        write_tensors(path, {key: value.detach().cpu() for key, value in tensors.items()}, metadata)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ValueError(f"The context could not be written to {os.path.basename(path)} ({reason}): check the folder and the free space.") from error


def load_context(path: str, flow: str = AUTO) -> list:
    """CONDITIONING from a file of `save_context`, or from one tensor [tokens, width] or [B, tokens, width] in .safetensors or .npy.

    flow: "text" or "image", of a dual context that half of it; auto takes what the file says. The number of tokens does not
    tell (154 are two text chunks, 514 two pictures). Raises ValueError, one sentence, for an unreadable file, other contents and an unknown flow.
    """
    name = os.path.basename(path)
    tensors, metadata = _read(path, name)
    ours = metadata.get("format") == FORMAT
    if flow == AUTO and not ours:
        raise ValueError(f"The file {name} does not say whether its context is a text's or a picture's: set flow to text or image.")
    stored = metadata.get("flow", TEXT)
    found = stored if flow == AUTO else flow
    # a dual context keeps its picture apart from the text
    main = "image" if found == IMAGE and stored == DUAL else "context"
    tokens = tensors.get(main) if ours else _only(tensors, name)
    if tokens is None or tokens.ndim not in (2, 3) or not bool(torch.isfinite(tokens).all()):
        raise ValueError(f"The file {name} holds no context of finite numbers [tokens, width]: save it again.")
    tokens = tokens.reshape(-1, *tokens.shape[-2:]).float()
    options: dict = {FLOW: found}
    try:
        if found == DUAL:
            options |= {IMAGE_CONTEXT: tensors["image"].float(), RATIO: float(metadata["ratio"])}
            if options[IMAGE_CONTEXT].ndim != 3 or not bool(torch.isfinite(options[IMAGE_CONTEXT]).all()):
                raise ValueError("its picture is not finite numbers [rows, tokens, width]")
        if found == IMAGE and ours and "pictures" in metadata:
            options[PICTURES] = tuple(int(count) for count in metadata["pictures"].split())
    except (KeyError, ValueError) as error:
        raise ValueError(f"The context in {name} is damaged ({error}): save it again.") from error
    if found == IMAGE:
        options.setdefault(PICTURES, (tokens.shape[1],))
    return [[tokens, options]]


def _only(tensors: dict[str, Tensor], name: str) -> Tensor:
    if len(tensors) != 1:
        raise ValueError(f"The file {name} holds {len(tensors)} tensors, but a context is one: keep only that one in the file.")
    return next(iter(tensors.values()))


def _read(path: str, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    import comfy.utils

    if not path.lower().endswith(EXTENSIONS):
        raise ValueError(f"A context is a .safetensors or .npy file, but {name} is not: save the array in one of these formats.")
    try:
        if path.lower().endswith(".npy"):
            return {"context": torch.from_numpy(np.ascontiguousarray(np.load(path, allow_pickle=False)))}, {}
        tensors, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
        # copies: the host may hand out tensors that stay mapped to the file
        return {key: value.clone() for key, value in tensors.items()}, metadata or {}
    # whatever the system, numpy or safetensors find wrong
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"The file {name} cannot be read ({reason}): save the context again.") from error


def describe(conditioning: list) -> str:
    """One line on a context: flow, rows, tokens, width, length of its tokens."""
    tokens, options = conditioning[0]
    flow = options.get(FLOW, TEXT)
    rows, count, width = tokens.shape
    length = float(tokens.float().norm(dim=-1).mean())
    text = f"{flow} context: {rows} row{'s' if rows > 1 else ''} of {count} tokens, {width} values each, mean norm {length:.3g}"
    if flow == DUAL:
        text += f"; image context of {options[IMAGE_CONTEXT].shape[1]} tokens, ratio {options[RATIO]:g}"
    pictures = options.get(PICTURES, ())
    return text + (f"; {len(pictures)} pictures read together" if len(pictures) > 1 else "")
