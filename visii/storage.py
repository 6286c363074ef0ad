"""Instructions in files: one safetensors file, nothing pickled.

Tensors: "tokens" and "null" [1, T, C], "pooled" [1, P] if there is one. Metadata (strings, as safetensors wants): format, version, end, text and info as JSON.
"""

from __future__ import annotations

import json
import os

from safetensors import SafetensorError

from ..common.files import write_tensors
from .instruction import Instruction

FORMAT = "palimpsest_instruction"
VERSION = 1
SUFFIX = ".instruction.safetensors"
AGAIN = "choose one written by Save Instruction"


def save_instruction(instruction: Instruction, path: str, extra_metadata: dict[str, str] | None = None) -> None:
    """Write `instruction` to `path` (which ends in .safetensors), whole or not at all.

    extra_metadata: more strings for the header, such as the workflow. Raises ValueError, one sentence, when it cannot be written.
    """
    tensors = {"tokens": instruction.tokens, "null": instruction.null}
    if instruction.pooled is not None:
        tensors["pooled"] = instruction.pooled
    metadata = {
        **(extra_metadata or {}), "format": FORMAT, "version": str(VERSION), "end": json.dumps(instruction.end), "text": instruction.text,
        "info": json.dumps(instruction.info),
    }
    try:
        write_tensors(path, tensors, metadata)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ValueError(f"The instruction could not be written to {os.path.basename(path)} ({reason}): check the folder and the free space.") from error


def load_instruction(path: str) -> Instruction:
    """Read a file written by `save_instruction`. Never unpickles.

    Raises ValueError, one sentence, for a missing, truncated or damaged file, a pickle under another name, or another kind of safetensors file.
    """
    import comfy.utils

    name = os.path.basename(path)
    if not os.path.isfile(path):
        raise ValueError(f"The instruction file {name} does not exist: choose another, or save one with Save Instruction.")
    try:
        tensors, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
    # the host turns some of safetensors' errors into ValueError, and trips over the numbers in an OSError
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise ValueError(f"The file {name} is not a readable safetensors file (truncated, damaged, or a pickle under another name): {AGAIN}.") from error
    metadata = metadata or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(f"The file {name} is a safetensors file, but not an instruction: {AGAIN}.")
    if metadata.get("version") != str(VERSION):
        raise ValueError(f"The file {name} holds an instruction of version {metadata.get('version')}, but this pack reads version {VERSION}: update the pack.")
    try:
        end, info = json.loads(metadata["end"]), json.loads(metadata["info"])
        if not isinstance(info, dict) or not (end is None or type(end) is int):
            raise ValueError("its header holds other things than it should")
        return Instruction(tensors["tokens"], tensors["null"], end, metadata["text"], tensors.get("pooled"), info)
    except KeyError as error:
        raise ValueError(f"The instruction in {name} is damaged (it lacks {error}): save it again.") from error
    except (TypeError, AttributeError, ValueError) as error:
        reason = "a text in its header is broken" if isinstance(error, json.JSONDecodeError) else str(error).rstrip(".").replace(": learn it again", "")
        raise ValueError(f"The instruction in {name} is damaged ({reason}): save it again.") from error
