"""What SAM is asked for: a box and points on the picture, read and checked before anything is loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass

_NUMBER = r"\s*([+-]?\d+(?:\.\d+)?)\s*"
_POINT = re.compile(rf"{_NUMBER},{_NUMBER}(?:,\s*([+-])\s*)?", re.ASCII)


@dataclass(frozen=True)
class Prompt:
    """A box (x1, y1, x2, y2) or None, and points (x, y), all in pixels of the picture from its top left corner.

    wanted: per point, True where the concept is, False where it is not.
    """

    box: tuple[float, float, float, float] | None = None
    points: tuple[tuple[float, float], ...] = ()
    wanted: tuple[bool, ...] = ()

    def describe(self) -> str:
        """In words, for the report."""
        parts = [] if self.box is None else ["box " + ", ".join(f"{value:g}" for value in self.box)]
        for sign, kind in ((True, "+"), (False, "-")):
            count = sum(wanted is sign for wanted in self.wanted)
            if count:
                parts.append(f"{count} {kind} point{'s' if count > 1 else ''}")
        return " and ".join(parts)


def parse_points(text: str) -> list[tuple[float, float, bool]]:
    """(x, y, wanted) of every point in "120, 80, +; 40, 200, -". A point without a sign is wanted.

    Points are separated by semicolons or line breaks. Raises ValueError, one sentence, naming what cannot be read.
    """
    points = []
    for piece in re.split(r"[;\n]", text):
        if not piece.strip():
            continue
        found = _POINT.fullmatch(piece)
        if not found:
            raise ValueError(
                f'Cannot read the point "{piece.strip()}": write x, y in pixels and + for the concept or - for what is not part of it, '
                "points separated by semicolons, for example 120, 80, +; 40, 200, -."
            )
        points.append((float(found[1]), float(found[2]), found[3] != "-"))
    return points


def make_prompt(box: tuple[int, int, int, int], points: str, width: int, height: int) -> Prompt:
    """The prompt for a picture of this size in pixels.

    box: (x1, y1, x2, y2), four zeros for none. points: see `parse_points`. Raises ValueError, one sentence, for a box
    without area or beyond the picture, points beside it or unreadable, and when nothing points at the concept.
    """
    x1, y1, x2, y2 = box
    boxed = any(box)
    if boxed and (x2 <= x1 or y2 <= y1):
        raise ValueError(f"The box from {x1}, {y1} to {x2}, {y2} has no area: x1, y1 is its top left and x2, y2 its bottom right corner, in pixels.")
    if boxed and (x1 < 0 or y1 < 0 or x2 > width or y2 > height):
        raise ValueError(f"The box from {x1}, {y1} to {x2}, {y2} reaches beyond the picture of {width} x {height} px: give its corners in pixels of this picture.")
    found = parse_points(points)
    for x, y, _ in found:
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(f"The point {x:g}, {y:g} lies outside the picture of {width} x {height} px: give points in pixels of this picture.")
    if not boxed and not found:
        raise ValueError("Nothing says where the concept is: set a box (x1, y1, x2, y2 in pixels), or write points like 120, 80, +.")
    if not boxed and not any(wanted for *_, wanted in found):
        raise ValueError("All points are marked -, so nothing says where the concept is: add a point marked +, or a box around the concept.")
    return Prompt((x1, y1, x2, y2) if boxed else None, tuple((x, y) for x, y, _ in found), tuple(wanted for *_, wanted in found))
