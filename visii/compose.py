"""Instructions made of others: joined with words, weaker or stronger, averaged."""

from __future__ import annotations

import math

import torch

from .instruction import Instruction, check_same_encoder
from .start import encode, null_text, read_text

GAP = 2  # positions between the learned words and the added ones: the end token and one of padding stay


def combine(instruction: Instruction, clip, text: str) -> Instruction:
    """The instruction followed by words: their vectors, encoded alone and with their start token, stand from two positions after its end.

    The rule of the published code. The result ends after the words, so that more can follow.
    Raises ValueError, one sentence, for words that do not fit, another text encoder, and an instruction that does not know its end.
    """
    _, count = read_text(clip, text, "text")
    if count == 1:
        raise ValueError("There are no words to add to the instruction: write some, or connect the instruction directly.")
    if instruction.end is None:
        raise ValueError("This instruction's file does not say where its words end, so nothing can follow them: give Load Instruction the start text (learned_prompt.txt).")
    check_same_encoder(instruction, null_text(clip)[0], "the connected CLIP")
    begin, length = instruction.end + GAP, instruction.tokens.shape[1]
    if begin + count > length:
        room = max(length - begin - 1, 0)
        raise ValueError(
            f"The text has {count - 1} tokens, but behind the instruction's {instruction.end - 1} there is room for {room} "
            f"(of {length} positions): shorten the text."
        )
    tokens = instruction.tokens.clone()
    tokens[:, begin : begin + count] = encode(clip, text, "text")[0][:, :count].to(tokens)
    # the position after the last word holds what the instruction had there: an end token's or padding's vector
    end = min(begin + count, length - 1)
    return instruction.with_tokens(tokens, end=end, text=f"{instruction.text} + {text.strip()}")


def strengthen(instruction: Instruction, strength: float) -> Instruction:
    """null + strength (tokens - null): 0 says nothing, 1 is the instruction as it is. Raises ValueError for a strength that is not finite."""
    if not math.isfinite(strength):
        raise ValueError(f"The strength of an instruction is a finite number, not {strength}: 0 to 1.5 is usual.")
    if strength == 1.0:
        return instruction
    return instruction.with_tokens(torch.lerp(instruction.null, instruction.tokens, strength), text=f"{instruction.text} (x {strength:g})")


def blend(first: Instruction, second: Instruction, share: float) -> Instruction:
    """(1 - share) first + share second, position by position. Raises ValueError, one sentence, for instructions of two text encoders."""
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"The share of the second instruction lies between 0 and 1, but it is {share}.")
    check_same_encoder(first, second.null, "the second one")
    if (first.pooled is None) != (second.pooled is None):
        raise ValueError("One of the two instructions has a pooled vector, as SDXL's have, and the other has none: learn both with one checkpoint.")
    if share in (0.0, 1.0):
        return second if share else first
    ends = (first.end, second.end)
    return Instruction(
        torch.lerp(first.tokens, second.tokens, share),
        first.null,
        None if None in ends else max(ends),
        f"{1 - share:g} ({first.text}) + {share:g} ({second.text})",
        None if first.pooled is None else torch.lerp(first.pooled, second.pooled, share),
        {"blend": [first.info, second.info], "share": share},
    )
