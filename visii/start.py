"""The instruction that learning starts from, and other texts, through a CLIP of the host."""

from __future__ import annotations

from ..p2p.tokens import PromptTokens, read_tokens
from .instruction import Instruction


def read_text(clip, text: str, what: str) -> tuple[PromptTokens, int]:
    """(tokens of a text, position of its first end token). what: the input's name.

    Raises ValueError, one sentence, for no CLIP, text encoders other than CLIP's, and a text that needs more than one window.
    """
    tokens = read_tokens(clip, text)
    if len(tokens.chunks) > 1:
        window = len(tokens.chunks[0])
        raise ValueError(
            f"The {what} has {len(tokens.content)} tokens, but an instruction has one window of {window} with room for {window - 2}: shorten it."
        )
    return tokens, 1 + len(tokens.content)


def encode(clip, text: str, what: str):
    """(tokens [1, T, C], options) of a text. Raises ValueError, one sentence, for a CLIP whose prompts change during sampling."""
    found = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    if len(found) != 1 or "hooks" in found[0][1]:
        raise ValueError(f"The CLIP carries hooks that change the {what} during sampling, but an instruction is one for the whole run: connect a CLIP without them.")
    return found[0]


def null_text(clip):
    """The empty text, as `encode` gives it."""
    return encode(clip, "", "empty text")


def from_text(clip, text: str, what: str = "start text") -> Instruction:
    """The instruction that says `text`. Raises ValueError, one sentence, for a text without words or one that is too long."""
    _, end = read_text(clip, text, what)
    if end == 1:
        raise ValueError(f"The {what} is empty, and only the positions of its words are learned: describe the picture after the edit in about ten words.")
    tokens, options = encode(clip, text, what)
    return Instruction(tokens, null_text(clip)[0], end, text.strip(), options.get("pooled_output"))
