"""Instructions in the files of the released code: `prompt_embeds_best.pt` and its like, one tensor [3, 77, 768] of rows learned, null, null.

They are pickles, and are read with torch's loader for plain tensors, which refuses everything else. Where the words end is not in them but follows
from the text that learning started from (`learned_prompt.txt`).
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from .instruction import Instruction, check_same_encoder
from .start import encode, null_text, read_text

SUFFIXES = (".pt", ".pth")
ROWS = 3
CLOSE = 0.05  # relative: how far what was not learned may lie from the encoded start text; fp16 alone makes less than 1 %


class _Tokenizer:
    """The host's SD1 tokenizer where no CLIP is connected: all files of the released code are made with it."""

    def __init__(self):
        import comfy.sd1_clip

        self.tokenizer = comfy.sd1_clip.SD1Tokenizer()

    def tokenize(self, text: str, **kwargs):
        return self.tokenizer.tokenize_with_weights(text, **kwargs)


@functools.lru_cache(maxsize=1)
def _tokenizer() -> _Tokenizer:
    return _Tokenizer()


def read_rows(path: str) -> Tensor:
    """The tensor [3, T, C] of a file, float32 on the CPU.

    Raises ValueError, one sentence, for a missing or damaged file, one with anything besides tensors in it (code, say), and other tensors.
    """
    name = os.path.basename(path)
    if not os.path.isfile(path):
        raise ValueError(f"The instruction file {name} does not exist: choose another.")
    try:
        # the host's own loader wants a table of tensors
        found = torch.load(path, map_location="cpu", weights_only=True)
    # whatever pickle, zip or the system find wrong
    except Exception as error:
        if type(error).__name__ == "UnpicklingError":
            raise ValueError(
                f"The file {name} holds code or other things besides tensors, so it was not opened: choose a prompt_embeds_*.pt of the released code."
            ) from error
        raise ValueError(f"The file {name} cannot be read ({type(error).__name__}): it is damaged or no file of torch.") from error
    if not isinstance(found, Tensor):
        raise ValueError(f"The file {name} holds a {type(found).__name__}, but an instruction of the released code is one tensor: choose a prompt_embeds_*.pt.")
    if found.ndim != 3 or len(found) != ROWS or not found.is_floating_point():
        raise ValueError(f"The tensor in {name} has the shape {list(found.shape)}, but an instruction of the released code has [3, 77, 768]: choose a prompt_embeds_*.pt.")
    return found.detach().float()


def load_published(path: str, text: str = "", clip=None) -> Instruction:
    """Read a file of the released code. text: what learning started from, "" if unknown. clip: a CLIP of the host to check both against.

    Raises ValueError, one sentence, as `read_rows` does, for a text that does not belong to the file, and for another text encoder.
    """
    rows, name = read_rows(path), os.path.basename(path)
    instruction = Instruction(rows[:1], rows[1:2], None, text.strip(), None, {"file": name, "format": "released code"})
    if clip is not None:
        check_same_encoder(instruction, null_text(clip)[0], "the connected CLIP")
    if not text.strip():
        return instruction
    _, end = read_text(clip or _tokenizer(), text, "start text")
    if end >= rows.shape[1]:
        raise ValueError(f"The start text ends at position {end}, but {name} has {rows.shape[1]}: give the text of its learned_prompt.txt.")
    if clip is not None:
        expected, kept = encode(clip, text, "start text")[0][:, end:].to(rows), rows[:1, end:]
        distance = float((kept - expected).norm() / expected.norm())
        if distance > CLOSE:
            raise ValueError(f"{name} was not learned from this start text (what follows its words differs by {100 * distance:.0f} %): give the text of its learned_prompt.txt.")
    return instruction.with_tokens(instruction.tokens, end=end)
