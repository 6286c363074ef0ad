"""When a word copies the source and how strongly it counts, as numbers per step and target column (Prompt-to-Prompt)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .tokens import PromptTokens

Window = tuple[float, float]


def check_window(window: Window, name: str) -> Window:
    """(start, end) as floats; ValueError (one sentence, with `name`) unless 0 <= start <= end <= 1."""
    start, end = float(window[0]), float(window[1])
    if not 0.0 <= start <= end <= 1.0:
        raise ValueError(f"The window of {name} runs from {start:g} to {end:g}; give fractions of the steps between 0 and 1, the start not after the end.")
    return start, end


def rows(window: Window, count: int) -> tuple[int, int]:
    """First row and the row after the last, of `count` rows: int(fraction * count), as published.

    The published products are rounded down as they come, so that 0.29 of 100 rows would end at 28; a billionth is added.
    """
    return int(window[0] * count + 1e-9), int(window[1] * count + 1e-9)


def window_rows(lo: float, hi: float, steps: int) -> tuple[int, int]:
    """Steps first <= s < last in which self-attention is the source's: fractions of `steps` (`self_replace_steps`; not of steps + 1)."""
    return rows((lo, hi), steps)


def word_windows(default: Window, words: Mapping[str, Window], target: PromptTokens, steps: int, published_rows: bool = True) -> Tensor:
    """The weight a of the cross-attention edit per step and target column, 0 or 1: [steps + 1, T] (`get_time_words_attention_alpha`).

    default: (start, end) for all columns, fractions. words: windows of single words or phrases of the target, which
    replace the default one in their columns; words that the target does not have change nothing.
    published_rows: the fractions are of steps + 1 rows (the published sampler, PLMS, calls the model once more than it
    has steps, and the last row goes unused with others); False: of `steps` rows, and so many are returned.
    Raises ValueError for a window outside 0..1.
    """
    table = torch.zeros(steps + 1 if published_rows else steps, target.length)
    columns = [(list(range(target.length)), default, "all words")] + [(list(target.positions(word)), window, word) for word, window in words.items()]
    for positions, window, name in columns:
        first, last = rows(check_window(window, name), len(table))
        table[:, positions] = 0.0
        table[first:last, positions] = 1.0
    return table


def equalizer(weights: Mapping[str, float], target: PromptTokens) -> Tensor:
    """The factor c [T] of every target column: 1, or the value of its word ("attention re-weighting"; `get_equalizer` of the null-text notebook).

    weights: {word or phrase: factor}, any sign; words that the target does not have change nothing.
    """
    factors = torch.ones(target.length)
    for word, value in weights.items():
        factors[list(target.positions(word))] = float(value)
    return factors
