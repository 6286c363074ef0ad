"""The trade-off curve of an editing score: what was asked for against what stayed, one point per setting, as an RGB picture."""
import math
from pathlib import Path

SIZE = (640, 440)
MARGIN = (64, 44, 24, 52)  # left, top, right, bottom
PAPER, INK, GRID = (24, 24, 24), (225, 225, 225), (60, 60, 60)
COLORS = ((90, 190, 250), (235, 140, 70), (150, 210, 110))
ROOM = 0.05  # least distance of a point from the frame, in units of a rate


def limits(values: list[float]) -> tuple[float, float]:
    """Ends of an axis in 0..1, whole tenths, that leave ROOM around the values."""
    low = max(0.0, math.floor(10 * (min(values) - ROOM) + 1e-9) / 10)
    high = min(1.0, math.ceil(10 * (max(values) + ROOM) - 1e-9) / 10)
    return low, max(high, low + 0.1)


def draw(curves: dict[str, list[tuple[str, float, float]]], across: str, up: str):
    """A PIL picture of `curves`: name -> points (label, x, y), rates in 0..1, joined in their order. across, up: what the axes are.

    Raises ValueError, one sentence, where there is no point.
    """
    from PIL import Image, ImageDraw, ImageFont

    points = [point for curve in curves.values() for point in curve]
    if not points:
        raise ValueError("There is no trade-off to draw, the score has no sweep: run the full score first, without --quick.")
    (x0, x1), (y0, y1) = limits([x for _, x, _ in points]), limits([y for _, _, y in points])
    left, top, right, bottom = MARGIN
    width, height = SIZE[0] - left - right, SIZE[1] - top - bottom

    def place(x: float, y: float) -> tuple[float, float]:
        return left + width * (x - x0) / (x1 - x0), top + height * (y1 - y) / (y1 - y0)

    sheet = Image.new("RGB", SIZE, PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for tenth in range(round(10 * x0), round(10 * x1) + 1):
        x = place(tenth / 10, y0)[0]
        pen.line([(x, top), (x, top + height)], fill=GRID)
        pen.text((x - 8, top + height + 6), f"{tenth / 10:.1f}", fill=INK, font=font)
    for tenth in range(round(10 * y0), round(10 * y1) + 1):
        y = place(x0, tenth / 10)[1]
        pen.line([(left, y), (left + width, y)], fill=GRID)
        pen.text((left - 28, y - 6), f"{tenth / 10:.1f}", fill=INK, font=font)
    pen.text((left, top + height + 26), across, fill=INK, font=font)
    pen.text((8, 8), up, fill=INK, font=font)
    start = left
    for (name, curve), color in zip(curves.items(), COLORS):
        spots = [place(x, y) for _, x, y in curve]
        if len(spots) > 1:
            pen.line(spots, fill=color, width=2)
        for (label, _, _), (x, y) in zip(curve, spots):
            pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=color)
            pen.text((x + 6, y - 14), label, fill=color, font=font)
        pen.rectangle([start, 31, start + 10, 35], fill=color)
        pen.text((start + 16, 26), name, fill=INK, font=font)
        start += 16 + int(pen.textlength(name, font=font)) + 24
    return sheet


def write(path: Path, curves: dict[str, list[tuple[str, float, float]]], across: str, up: str) -> None:
    """`draw` into a PNG file, whole or not at all. Raises ValueError as `draw` does, OSError where the file cannot be written."""
    picture = draw(curves, across, up)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    picture.save(partial, format="PNG", optimize=True)
    partial.replace(path)
