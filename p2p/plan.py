"""What a Prompt-to-Prompt edit does to the cross-attention of every step, for one source and one edit prompt.

Hertz et al., ICLR 2023, section 3.2, and the controllers of the published code. All of them are

    A' = a (c * Edit(A_source, A_own)) + (1 - a) A_own,

with a (0 or 1 per step and target column) from the schedule, factors c from the weights, and Edit = A_source M (word swap),
A_source[map] alpha + A_own (1 - alpha) (refinement) or A_source (re-weighting of one and the same prompt). As the
maps are only ever multiplied by the values V, that is A_source (P V) + A_own (diag(o) V) with

    P = B diag(a c),    o = a c k + (1 - a),

B [S, T]: M, the matrix of the map where alpha is 1, or the identity; k [T]: 0, 1 - alpha, or 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import alignment, report, schedule, syntax
from .schedule import Window
from .tokens import PromptTokens

MODES = ("auto", "replace", "refine", "reweight")


@dataclass(frozen=True, eq=False)
class AlignmentPlan:
    """The edit of one prompt by one other; made by `make_plan`, never changed.

    mode: "replace", "refine", "reweight" or "identity" (nothing to edit); why: the reason, a clause. source_part: B [S, T] and
    own_part: k [T] of the module's docstring, float64. cross, windows: default window and those of words, fractions of
    the steps + 1. self_window: fractions of the steps. weights: factors of words.
    """

    source: PromptTokens
    target: PromptTokens
    mode: str
    why: str
    source_part: Tensor
    own_part: Tensor
    cross: Window
    windows: Mapping[str, Window]
    weights: Mapping[str, float]
    self_window: Window
    tables: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def step(self, s: int, steps: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor | None, Tensor | None]:
        """The edit of cross-attention at step s (0 is the noisiest) of `steps`: (P [S, T], o [T]) of out = A_source (P V) + A_own (diag(o) V).

        P None: P is all zero, no source is needed. o None: o is all zero, the own map is not needed.
        (None, None): a mark, not zeros: NOTHING IS EDITED at this step, the attention stays what it is (P zero, o all ones).
        It is unambiguous, because while anything is copied BOS is: P and o are never both zero.
        s may be `steps` too, for samplers that call the model once more (PLMS). Raises ValueError for other steps.
        """
        if not 0 <= s <= steps:
            raise ValueError(f"Step {s} does not exist in a run of {steps} steps.")
        if self.mode == "identity":
            return None, None
        if steps not in self.tables:
            self.tables[steps] = schedule.word_windows(self.cross, self.windows, self.target, steps).double()
        copied = self.tables[steps][s]
        scaled = copied * self.factors.double()
        source = self.source_part * scaled
        own = scaled * self.own_part + (1.0 - copied)
        if bool(source.any()):
            return source.to(dtype), own.to(dtype) if bool(own.any()) else None
        return None, None if bool((own == 1.0).all()) else own.to(dtype)

    def self_active(self, s: int, steps: int) -> bool:
        """Whether self-attention is the source's at step s of `steps` (which layers: section 7 of the code, its reader decides)."""
        first, last = schedule.window_rows(*self.self_window, steps)
        return self.mode != "identity" and first <= s < last

    @property
    def neutral(self) -> bool:
        """Whether no step of any run would be edited: the same prompt without weights, or windows of zero length."""
        return self.mode == "identity" or all(start == end for start, end in (self.cross, self.self_window, *self.windows.values()))

    @property
    def factors(self) -> Tensor:
        """c [T]."""
        return schedule.equalizer(self.weights, self.target)

    def window(self, position: int) -> Window:
        """The window, fractions, in which a target position is edited."""
        found = self.cross
        for word, window in self.windows.items():
            if position in self.target.positions(word):
                found = window
        return found

    def describe(self, steps: int | None = None) -> str:
        """The alignment report, plain text: both prompts token over token, what every word copies, keeps or scales and until when, and the mode.

        steps: also says which steps of such a run these are.
        """
        return report.describe(self, steps)


def make_plan(
    source: PromptTokens,
    target: PromptTokens,
    mode: str = "auto",
    tail: str = "aligned",
    cross: Window = (0.0, 0.8),
    word_windows: Mapping[str, Window] | None = None,
    weights: Mapping[str, float] | None = None,
    self_window: Window = (0.0, 0.4),
) -> AlignmentPlan:
    """The plan of an edit.

    mode: "auto" takes reweight for two equal prompts with weights (nothing at all without weights), replace for as many
    words, else refine. Weights go on top of replace and refine, as in the published combined controllers.
    "reweight" is meant for equal prompts (it scales the source's maps); for different ones it is auto with weights.
    Equal prompts without weights leave nothing to edit in any mode.
    tail: of a replacement, see `alignment.replacement`. cross, self_window: (start, end), fractions of the steps.
    word_windows, weights: by word or phrase of the target.
    Raises ValueError (one sentence) for an unknown mode or tail, windows outside 0..1, words that are not in the target,
    "replace" with different numbers of words, "reweight" without weights, and the published tail on long prompts.
    """
    if mode not in MODES:
        raise ValueError(f"The mode is {mode!r}; choose one of {', '.join(MODES)}.")
    if tail not in alignment.TAILS:
        raise ValueError(f"The tail is {tail!r}; choose one of {', '.join(alignment.TAILS)}.")
    weights = {word: float(value) for word, value in (weights or {}).items()}
    windows = {word: schedule.check_window(window, word) for word, window in (word_windows or {}).items()}
    syntax.missing_words({**windows, **weights}, target)
    if mode == "reweight" and not weights:
        raise ValueError("Reweight multiplies words by factors, but no word weights are given; write some, such as jungle: x3, or choose another mode.")

    chosen, why = _choose(mode, source, target, bool(weights))
    source_part, own_part = torch.zeros(source.length, target.length), torch.zeros(target.length)
    if chosen == "identity":
        own_part = torch.ones(target.length)
    elif chosen == "replace":
        source_part = alignment.replacement(source, target, tail)
    elif chosen == "refine":
        source_part, own_part = _refined(source, target)
    else:
        source_part = torch.eye(target.length)
    return AlignmentPlan(source, target, chosen, why, source_part.double(), own_part.double(), schedule.check_window(cross, "cross-attention"),
                         windows, weights, schedule.check_window(self_window, "self-attention"))


def _choose(mode: str, source: PromptTokens, target: PromptTokens, weighted: bool) -> tuple[str, str]:
    """The mode that is taken, and why."""
    counts = len(source.words), len(target.words)
    if alignment.identical(source, target):
        if not weighted:
            return "identity", "the prompts are the same and no word weights are given"
        if mode in ("auto", "reweight"):
            return "reweight", "the prompts are the same and word weights are given"
    if mode in ("replace", "refine"):
        return mode, "it was asked for"
    top = "; the weights go on top" if weighted else ""
    if counts[0] == counts[1]:
        return "replace", f"both prompts have {counts[0]} words{top}"
    return "refine", f"the source has {counts[0]} words and the edit {counts[1]}{top}"


def _refined(source: PromptTokens, target: PromptTokens) -> tuple[Tensor, Tensor]:
    mapper, alphas = alignment.refinement(source, target)
    source_part, own_part = alignment.matrix(mapper, alphas, source.length), 1.0 - alphas
    pairs, empty = alignment.spare_marks(source, target)
    for i, j in pairs:
        source_part[i, j] = 1.0
        own_part[j] = 0.0
    own_part[empty] = 0.0
    return source_part, own_part
