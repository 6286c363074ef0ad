"""How the attention maps of one prompt are handed to the tokens of another (Prompt-to-Prompt, Hertz et al., ICLR 2023, section 3.2).

Positions are those of the conditionings: S of the source, T of the target, each k x 77.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from .tokens import PromptTokens

TAILS = ("aligned", "published")


def align(source: Sequence[Hashable], target: Sequence[Hashable]) -> list[int]:
    """Global alignment (Needleman-Wunsch; gap 0, match 1, mismatch -1): per target item the index of its source item, -1 for none.

    A mismatch never pays, so this is a longest common subsequence. As published, ties go left (target item inserted),
    then up (source item dropped), then diagonal.
    """
    score = [[0] * (len(target) + 1) for _ in range(len(source) + 1)]
    for i, ours in enumerate(source, 1):
        for j, theirs in enumerate(target, 1):
            score[i][j] = max(score[i][j - 1], score[i - 1][j], score[i - 1][j - 1] + (1 if ours == theirs else -1))
    found = [-1] * len(target)
    i, j = len(source), len(target)
    while i and j:
        if score[i][j] == score[i][j - 1]:
            j -= 1
        elif score[i][j] == score[i - 1][j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            found[j] = i
    return found


def refinement(source: PromptTokens, target: PromptTokens) -> tuple[Tensor, Tensor]:
    """For prompts that gain or lose words ("adding a new phrase"; equation 4 of the paper): map [T] (long) and alphas [T] (float, 0 or 1).

    Target column j copies source column map[j] where alphas[j] is 1 and keeps its own where it is 0 (map[j] is -1 then).
    Prompts of one chunk: exactly as published. The ids with BOS and EOS are aligned, and after the target's EOS
    map[j] = j, so that a shortened prompt copies the last words of the source into its first padding.
    Longer prompts: the words of all chunks are aligned as one sequence; BOS and EOS copy those of the same chunk, and
    padding copies padding at the same position. What has no such partner keeps its own.
    """
    mapper, alphas = torch.full((target.length,), -1), torch.zeros(target.length)
    if len(source.chunks) == len(target.chunks) == 1:
        ours, theirs = (prompt.tokens[:len(prompt.content) + 2] for prompt in (source, target))
        pairs = [(j, j) for j in range(len(theirs), target.length) if j < source.length]
    else:
        ours, theirs = source.content, target.content
        pairs = [pair for before, after in zip(source.marks, target.marks) for pair in zip(before[:2], after[:2])]
        pairs += [(j, j) for before, after in zip(source.marks, target.marks) for j in sorted(set(before[2:]) & set(after[2:]))]
    numbers = {}
    first, second = ([numbers.setdefault(token.key, len(numbers)) for token in tokens] for tokens in (ours, theirs))
    pairs += [(ours[i].position, theirs[j].position) for j, i in enumerate(align(first, second)) if i >= 0]
    for i, j in pairs:
        mapper[j], alphas[j] = i, 1.0
    return mapper, alphas


def replacement(source: PromptTokens, target: PromptTokens, tail: str = "aligned") -> Tensor:
    """For prompts of as many words ("word swap"; equation 3 of the paper): M [S, T]; target column n gets sum over w of A_source[w] M[w, n].

    A word of as many tokens as its counterpart takes over their maps one by one; otherwise each of its n tokens takes
    1/n of the sum of the counterpart's maps, so that the attention paid to the word stays the same.

    tail: "aligned" hands every word to its counterpart, BOS to BOS, EOS to EOS and the k-th padding to the k-th
    padding, chunk by chunk (see `spare_marks` for chunks that only one prompt has). "published" does as the published
    code: after the last word that differs, column n takes source column n whatever stands there, so that these words
    are shifted when the token counts differ; only for prompts of one chunk.

    Raises ValueError for different numbers of words, an unknown tail and the published tail on several chunks.
    """
    counts = len(source.words), len(target.words)
    if counts[0] != counts[1]:
        raise ValueError(f"Replacing words needs prompts with the same number of words, but the source has {counts[0]} and the target {counts[1]}; "
                         "rewrite one of them, or use refine.")
    if tail not in TAILS:
        raise ValueError(f"The tail of a replacement is {' or '.join(TAILS)}, not {tail!r}.")
    mapper = torch.zeros(source.length, target.length)
    if tail == "published":
        _published(mapper, source, target)
        return mapper
    for before, after in zip(source.by_word, target.by_word):
        _hand_over(mapper, before, after)
    for before, after in zip(source.marks, target.marks):
        for i, j in zip(before, after):
            mapper[i, j] = 1.0
    for i, j in spare_marks(source, target)[0]:
        mapper[i, j] = 1.0
    return mapper


def spare_marks(source: PromptTokens, target: PromptTokens) -> tuple[list[tuple[int, int]], list[int]]:
    """What to do with BOS, EOS and padding of the chunks that only one of two prompts has.

    BOS takes most of the attention in every chunk, and so the sum of an edited map would go far from 1 if it were lost
    or counted twice. Returns (pairs, empty): the maps of the source's surplus marks are added to the same marks of
    the target's last chunk, as pairs (source position, target position); and the target's surplus marks, positions in
    `empty`, get nothing while the source is copied. Both are empty for prompts of as many chunks.
    """
    pairs = [pair for marks in source.marks[len(target.marks):] for pair in zip(marks, target.marks[-1])]
    empty = [position for marks in target.marks[len(source.marks):] for position in marks]
    return pairs, empty


def matrix(mapper: Tensor, alphas: Tensor, size: int) -> Tensor:
    """A refinement as a matrix [S, T]: column j has alphas[j] in row mapper[j]. size: S."""
    found = torch.zeros(size, len(mapper), dtype=alphas.dtype)
    columns = alphas.nonzero()[:, 0]
    found[mapper[columns], columns] = alphas[columns]
    return found


def identical(source: PromptTokens, target: PromptTokens) -> bool:
    """Whether two prompts are the same to the text encoder (tokens and the host's weights), so that there is nothing to align."""
    return source.length == target.length and all(a.key == b.key and a.weight == b.weight for a, b in zip(source.tokens, target.tokens))


def _hand_over(mapper: Tensor, before: Sequence[int], after: Sequence[int]) -> None:
    """One word: source positions `before` to target positions `after`."""
    if len(before) == len(after):
        for i, j in zip(before, after):
            mapper[i, j] = 1.0
        return
    for i in before:
        for j in after:
            mapper[i, j] = 1.0 / len(after)


def _published(mapper: Tensor, source: PromptTokens, target: PromptTokens) -> None:
    """The published walk: along the diagonal with a jump at every word that differs, and from the last one on down the main diagonal."""
    if len(source.chunks) > 1 or len(target.chunks) > 1:
        raise ValueError(f"The published tail knows prompts of one chunk only, but these have {len(source.chunks)} and {len(target.chunks)}; use the aligned tail.")
    changed = [(before, after) for old, new, before, after in zip(source.words, target.words, source.by_word, target.by_word) if old != new and before]
    i = j = 0
    while i < source.length and j < target.length:
        if changed and changed[0][0][0] == i:
            before, after = changed.pop(0)
            _hand_over(mapper, before, after)
            i, j = i + len(before), j + len(after)
            continue
        mapper[i if changed else j, j] = 1.0
        i, j = i + 1, j + 1
