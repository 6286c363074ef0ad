"""What a plan does, said in words: what every target word copies, keeps or scales, and until when."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from . import schedule
from .tokens import PromptTokens, bare

if TYPE_CHECKING:
    from .plan import AlignmentPlan

WIDTH = 110  # letters per line
NEVER = "never"


@dataclass(frozen=True)
class Fate:
    """What happens to one target word, the punctuation around it left aside.

    word: its index. action: "copies" (source maps only), "keeps" (its own map), "mixes" (some of its tokens copy) or
    "nothing" (no attention while its window is open). sources: what it copies, in order. shared: whether these maps
    are summed or split. factor, window: of its first token where they are not the usual ones.
    """

    word: int
    text: str
    action: str
    sources: tuple[str, ...]
    shared: bool
    factor: float
    window: tuple[float, float]


def token_label(prompt: PromptTokens, position: int) -> str:
    """A token as people should read it."""
    token = prompt.tokens[position]
    if token.word is not None:
        return token.text
    marks = next(marks for marks in prompt.marks if position in marks)
    return ("(start)", "(end)")[marks.index(position)] if marks.index(position) < 2 else "(padding)"


def links(plan: AlignmentPlan, position: int) -> list[tuple[int, float]]:
    """(source position, share of its map) that a target position copies, factors left aside."""
    column = plan.source_part[:, position]
    return [(int(i), float(column[i])) for i in column.nonzero()[:, 0]]


def fates(plan: AlignmentPlan) -> list[Fate]:
    """One per target word that has tokens, in order."""
    found, factors = [], plan.factors
    for index, word in enumerate(plan.target.words):
        positions = plan.target.spoken(index)
        if not positions:
            continue
        copied = [links(plan, position) for position in positions]
        sources = []
        for source in sorted({source for token in copied for source, _ in token}):
            owner = plan.source.tokens[source].word
            name = token_label(plan.source, source) if owner is None else _name(plan.source.words[owner])
            sources += [name] if name not in sources[-1:] else []
        own = [float(plan.own_part[position]) for position in positions]
        if any(copied):
            action = "mixes" if any(own) else "copies"
        else:
            action = "keeps" if any(own) else "nothing"
        unusual = [float(factors[p]) for p in positions if factors[p] != 1.0]
        windows = [plan.window(p) for p in positions]
        found.append(Fate(index, _name(word), action, tuple(sources), any(len(token) > 1 or share != 1.0 for token in copied for _, share in token),
                          unusual[0] if unusual else 1.0, next((w for w in windows if w != plan.cross), plan.cross)))
    return found


def describe(plan: AlignmentPlan, steps: int | None) -> str:
    """See `AlignmentPlan.describe`."""
    title = "nothing is edited" if plan.mode == "identity" else plan.mode
    lines = [f"Prompt-to-Prompt: {title}, because {plan.why}.", f"Source: {_one_line(plan.source.text)}", f"Edit:   {_one_line(plan.target.text)}"]
    if plan.mode == "identity":
        return "\n".join(lines)
    lines += ["", *_token_over_token(plan)]
    words = fates(plan)
    plain = [fate for fate in words if _plain(plan, fate)]
    for kept, group in groupby((fate for fate in words if fate not in plain), key=lambda fate: fate.action == "keeps" and fate.factor == 1.0):
        if kept:  # one line for a new phrase
            for _, phrase in groupby(enumerate(group), key=lambda pair: pair[1].word - pair[0]):
                names = [fate.text for _, fate in phrase]
                lines.append(f"{' '.join(names)}: {'keeps its' if len(names) == 1 else 'keep their'} own attention.")
        else:
            lines += [sentence(fate, _span(fate.window, steps, extra=1)) for fate in group]
    if plain:
        who = "All words" if len(plain) == len(words) else "All other words"
        span = _span(plan.cross, steps, extra=1)
        lines.append(f"{who} keep their own attention." if span == NEVER else f"{who} copy themselves from the source {span}.")
    used = {source for token in plan.target.content for source, _ in links(plan, token.position)}
    unused = [_name(word) for k, word in enumerate(plan.source.words) if plan.source.by_word[k] and not used & set(plan.source.spoken(k))]
    if unused:
        lines.append(f"Not taken over from the source: {', '.join(unused)}.")
    idle = [word for word in plan.windows if not any(links(plan, p) or plan.own_part[p] != 1.0 or plan.factors[p] != 1.0 for p in plan.target.positions(word))]
    if idle:
        lines.append(f"Windows without effect, as these words copy nothing: {', '.join(idle)}.")
    span = _span(plan.self_window, steps)
    lines.append("Self-attention is never the source's." if span == NEVER else f"Self-attention is the source's {span}.")
    if plan.neutral:
        lines.append("Nothing is edited, because all windows have zero length.")
    return "\n".join(lines)


def sentence(fate: Fate, span: str) -> str:
    """One line about a word; span: when, as words."""
    sources = " + ".join(fate.sources)
    times = f", times {fate.factor:g}" if fate.factor != 1.0 else ""
    if span == NEVER:
        return f"{fate.text}: keeps its own attention, as its window has zero length."
    if fate.action == "nothing":
        return f"{fate.text}: gets no attention {span}."
    if fate.action == "keeps":
        return f"{fate.text}: keeps its own attention{times} {span}."
    if fate.action == "mixes":
        return f"{fate.text}: partly copies {sources}, partly keeps its own attention{times} {span}."
    return f"{fate.text}: copies {sources}{' (summed or split)' if fate.shared else ''}{times} {span}."


def window_label(window: tuple[float, float]) -> str:
    """A window in few letters: "0-0.8"."""
    return NEVER if window[0] == window[1] else f"{window[0]:g}-{window[1]:g}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _name(word: str) -> str:
    return bare(word) or word


def _plain(plan: AlignmentPlan, fate: Fate) -> bool:
    same = len(fate.sources) == 1 and fate.sources[0].casefold() == fate.text.casefold()
    return same and (fate.action, fate.factor, fate.window, fate.shared) == ("copies", 1.0, plan.cross, False)


def _span(window: tuple[float, float], steps: int | None, extra: int = 0) -> str:
    """A window as words; its fractions are of steps + extra rows."""
    start, end = window
    if start == end:
        return NEVER
    text = "in all steps" if (start, end) == (0.0, 1.0) else f"until {end:g} of the steps" if start == 0.0 else f"from {start:g} to {end:g} of the steps"
    if steps is None:
        return text
    first, last = schedule.rows(window, steps + extra)
    last = min(last, steps)
    return f"{text} (steps {first + 1} to {last} of {steps})" if first < last else f"{text} (no step of {steps})"


def _token_over_token(plan: AlignmentPlan) -> list[str]:
    """The edit's tokens, and over each the source tokens whose maps it copies, in lines of at most WIDTH letters."""
    columns = []
    for token in plan.target.content:
        copied = links(plan, token.position)
        over = " + ".join((f"1/{round(1.0 / share)} " if share != 1.0 else "") + token_label(plan.source, source) for source, share in copied)
        columns.append((over or ("(own)" if plan.own_part[token.position] else "(none)"), token.text))
    lines, over, under = [], "copies", "edit  "
    for pair in columns:
        width = max(map(len, pair))
        if len(over) + 3 + width > WIDTH and len(over) > 6:
            lines += [over.rstrip(), under.rstrip(), ""]
            over, under = "copies", "edit  "
        over, under = (f"{line} | {text:<{width}}" for line, text in zip((over, under), pair))
    return [*lines, over.rstrip(), under.rstrip(), ""] if columns else []
