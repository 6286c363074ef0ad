"""The alignment of two prompts as a picture: source above, edit below, a line wherever a map is handed over."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from . import report
from .plan import AlignmentPlan

WIDTH, MARGIN, GAP, CELL = 1000, 16, 8, 44  # pixels; CELL is the least width of a token
TEXT, SMALL = 15, 12
SOURCE, LINES, TARGET, FACTOR, BAR, SPAN, BAND = 0, 24, 70, 94, 112, 122, 150  # heights within a band
GROUND, LIGHT, DIM, TRACK = (24, 24, 24), (225, 225, 225), (120, 120, 120), (60, 60, 60)
COPIED, OWN, SCALED = (70, 160, 220), (225, 160, 60), (215, 90, 190)


@dataclass
class Block:
    """Tokens (positions) that belong over one another; no line leaves its block. x, width: in pixels, of the band it is put in."""

    sources: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    x: float = 0.0
    width: float = 0.0


def draw(plan: AlignmentPlan) -> Tensor:
    """The alignment report as a picture [1, H, W, 3], 0..1, in bands of WIDTH pixels.

    Lines: a map that is copied; thick ones: maps that are summed or split. Boxes: copied, own or scaled words. Under
    every word the part of the steps in which its edit is on. BOS, EOS and padding are left out.
    """
    pen = _Pen()
    rows = _bands(plan, pen)
    reason = "all windows have zero length" if plan.neutral and plan.mode != "identity" else plan.why
    heading = textwrap.wrap(f"{'Nothing is edited' if plan.neutral else plan.mode.capitalize()}: {reason}", 120)
    top = MARGIN + 20 * len(heading) + 52
    width = int(max([WIDTH] + [block.x + block.width + MARGIN for row in rows for block in row]))
    pen.start(width, top + BAND * max(1, len(rows)) + MARGIN)
    for k, line in enumerate(heading):
        pen.write(MARGIN, MARGIN + 20 * k, line, LIGHT)
    _legend(plan, pen, MARGIN + 20 * len(heading) + 6)
    if not rows:
        pen.write(MARGIN, top, "Both prompts are empty", DIM)
    for k, row in enumerate(rows):
        _draw_band(plan, pen, row, top + k * BAND)
    return torch.from_numpy(np.asarray(pen.image).copy()).float()[None] / 255.0


def blocks(plan: AlignmentPlan) -> list[Block]:
    """The tokens of both prompts in reading order, cut wherever no line crosses."""
    found, last = [], None  # last: the newest block with a line in it
    reached = -1
    waiting = [token.position for token in plan.source.content]
    for token in plan.target.content:
        heads = [source for source, _ in report.links(plan, token.position)]
        if not heads:
            found.append(Block(targets=[token.position]))
        elif last is not None and heads[0] <= reached:
            # shares a source token with the block before, or goes back to one
            for later in found[found.index(last) + 1:]:
                last.sources, last.targets = last.sources + later.sources, last.targets + later.targets
            del found[found.index(last) + 1:]
            last.sources = sorted({*last.sources, *heads, *(position for position in waiting if position < heads[-1])})
            last.targets.append(token.position)
        else:
            _drop(found, last, [position for position in waiting if position < heads[0]])
            last = Block(sorted({*heads, *(position for position in waiting if heads[0] < position < heads[-1])}), [token.position])
            found.append(last)
        reached = max([reached, *heads])
        waiting = [position for position in waiting if position > reached]
    _drop(found, last, waiting)
    return found


def _drop(found: list[Block], last: Block | None, dropped: list[int]) -> None:
    """Put source tokens that nobody copies over the target tokens which came in their place, and what is left behind these."""
    start = found.index(last) + 1 if last is not None else 0
    for place, position in zip(found[start:], dropped):
        place.sources.append(position)
    found += [Block([position]) for position in dropped[len(found) - start:]]


def _bands(plan: AlignmentPlan, pen: _Pen) -> list[list[Block]]:
    """The blocks in bands, with their places."""
    bands, x = [], MARGIN
    for block in blocks(plan):
        above = sum(pen.cell(report.token_label(plan.source, position)) + GAP for position in block.sources)
        below = sum(pen.cell(report.token_label(plan.target, position)) + GAP for position in block.targets)
        block.width = max(above, below)
        if not bands or x + block.width > WIDTH - MARGIN and bands[-1]:
            bands.append([])
            x = MARGIN
        block.x, x = x, x + block.width
        bands[-1].append(block)
    return bands


def _draw_band(plan: AlignmentPlan, pen: _Pen, row: list[Block], y: int) -> None:
    fates = {fate.word: fate for fate in report.fates(plan)}
    factors = plan.factors
    taken = {source for token in plan.target.content for source, _ in report.links(plan, token.position)}
    places = []  # (word, left, right) of the target tokens of this band
    for block in row:
        above, below = (_spread(pen, prompt, positions, block) for prompt, positions in ((plan.source, block.sources), (plan.target, block.targets)))
        for target, (left, right) in below.items():
            joined = report.links(plan, target)
            scaled = float(factors[target]) != 1.0
            for source, share in joined:
                ends = [(sum(above[source]) / 2, y + LINES), ((left + right) / 2, y + TARGET)]
                pen.line(ends, SCALED if scaled else COPIED, 4 if share != 1.0 or len(joined) > 1 else 2)
        for source, (left, right) in above.items():
            pen.centred((left + right) / 2, y + SOURCE, report.token_label(plan.source, source), LIGHT if source in taken else DIM)
        for target, (left, right) in below.items():
            factor = float(factors[target])
            color = SCALED if factor != 1.0 else COPIED if report.links(plan, target) else OWN if plan.own_part[target] else DIM
            pen.box((left, y + TARGET, right, y + FACTOR - 2), color)
            pen.centred((left + right) / 2, y + TARGET + 2, report.token_label(plan.target, target), LIGHT)
            if factor != 1.0:
                pen.centred((left + right) / 2, y + FACTOR, f"x{factor:g}", SCALED, SMALL)
            word = plan.target.tokens[target].word
            if target in plan.target.spoken(word):
                places.append((word, left, right))
    for word, group in groupby(places, key=lambda place: place[0]):
        group = list(group)
        _bar(pen, fates[word], group[0][1], group[-1][2], y)


def _bar(pen: _Pen, fate: report.Fate, left: float, right: float, y: int) -> None:
    """The window of a word under its tokens; a word that keeps its own map unscaled has none."""
    pen.fill((left, y + BAR, right, y + BAR + 6), TRACK)
    still = fate.action == "keeps" and fate.factor == 1.0
    label = "own" if still else report.window_label(fate.window)
    start, end = (0.0, 0.0) if still else fate.window
    color = SCALED if fate.factor != 1.0 else COPIED if fate.action in ("copies", "mixes") else DIM
    if end > start:
        pen.fill((left + start * (right - left), y + BAR, left + end * (right - left), y + BAR + 6), color)
    pen.centred((left + right) / 2, y + SPAN, label, OWN if still else LIGHT, SMALL)


def _legend(plan: AlignmentPlan, pen: _Pen, y: int) -> None:
    x = pen.write(MARGIN, y, "source above, edit below", LIGHT, SMALL) + 20
    for color, text in ((COPIED, "copied from the source"), (OWN, "own"), (SCALED, "scaled"), (DIM, "not taken over")):
        pen.fill((x, y + 2, x + 12, y + 14), color)
        x = pen.write(x + 18, y, text, LIGHT, SMALL) + 20
    x = pen.write(x, y, f"self-attention of the source: {report.window_label(plan.self_window)}", LIGHT, SMALL) + 10
    pen.fill((x, y + 5, x + 100, y + 11), TRACK)
    start, end = plan.self_window
    if end > start:
        pen.fill((x + 100 * start, y + 5, x + 100 * end, y + 11), COPIED)


def _spread(pen: _Pen, prompt, positions: list[int], block: Block) -> dict[int, tuple[float, float]]:
    """(left, right) of each position's cell, centred in the block."""
    widths = [pen.cell(report.token_label(prompt, position)) for position in positions]
    x = block.x + (block.width - sum(widths) - GAP * len(widths)) / 2 + GAP / 2
    found = {}
    for position, width in zip(positions, widths):
        found[position] = (x, x + width)
        x += width + GAP
    return found


class _Pen:
    """Text and shapes on one picture; measures text before the picture's size is known."""

    def __init__(self):
        self.fonts = {size: _font(size) for size in (TEXT, SMALL)}
        self.start(1, 1)

    def start(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width, height), GROUND)
        self.tool = ImageDraw.Draw(self.image)

    def length(self, text: str, size: int = TEXT) -> float:
        return self.tool.textlength(_drawable(text, self.fonts[size]), font=self.fonts[size])

    def cell(self, text: str) -> float:
        return max(CELL, self.length(text) + 10)

    def write(self, x: float, y: float, text: str, color, size: int = TEXT) -> float:
        """Returns where the text ends."""
        self.tool.text((x, y), _drawable(text, self.fonts[size]), fill=color, font=self.fonts[size])
        return x + self.length(text, size)

    def centred(self, x: float, y: float, text: str, color, size: int = TEXT) -> None:
        self.write(x - self.length(text, size) / 2, y, text, color, size)

    def line(self, ends, color, thickness: int) -> None:
        self.tool.line(ends, fill=color, width=thickness)

    def fill(self, corners, color) -> None:
        self.tool.rectangle(corners, fill=color)

    def box(self, corners, color) -> None:
        self.tool.rounded_rectangle(corners, radius=4, fill=tuple(channel // 3 for channel in color), outline=color)


def _font(size: int):
    try:
        return ImageFont.load_default(size)
    except TypeError:  # Pillow before 10.1 has one size only
        return ImageFont.load_default()


def _drawable(text: str, font) -> str:
    """The built-in bitmap font, used where Pillow has no FreeType, stops at Latin-1."""
    text = text.replace("\n", " ")
    return text if isinstance(font, ImageFont.FreeTypeFont) else text.encode("latin-1", "replace").decode("latin-1")
