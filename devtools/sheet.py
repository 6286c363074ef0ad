"""The contact sheet: one row per graph and row number, pictures side by side, captions below (see graphs.Role)."""
import io
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

CELL = 256  # px; smaller pictures are enlarged without smoothing, so that a 128 px picture shows its pixels
GAP = 12
CAPTION, INPUT = " caption", "input"
INK, QUIET, PAPER = "#1c1b19", "#6a655d", "#f6f3ec"


@dataclass
class Row:
    """One line of the sheet: a title, pictures with their captions from left to right, text lines below."""
    title: str
    pictures: list[tuple[str, Image.Image]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def order(name: str) -> tuple[int, str]:
    """A pair to learn from stands left, then the input, the edit right of what lies between, then what it should have become."""
    return ({"before": -2, "after": -1, "input": 0, "edit": 2, "target": 3}.get(name, 1), name)


def rows_of(title: str, outputs: list[tuple]) -> list[Row]:
    """Rows of one graph from its outputs: (Role, encoded pictures, text) per node. A text called `X caption` stands below the pictures called X.

    A further row without an input shows the first row's: one input, several edits.
    """
    rows: dict[int, Row] = {}
    captions = {(role.row, role.name.removesuffix(CAPTION)): text for role, _, text in outputs if role.name.endswith(CAPTION)}
    for role, pictures, text in sorted(outputs, key=lambda output: (output[0].row, order(output[0].name))):
        row = rows.setdefault(role.row, Row(title))
        if role.name.endswith(CAPTION):
            continue
        caption = role.caption or captions.get((role.row, role.name))
        label = f"{role.name}: {caption}" if caption else role.name
        row.pictures += [(label, Image.open(io.BytesIO(data)).convert("RGB")) for data in pictures]
        if text:
            row.lines.append(f"{label}: {text}" if role.name not in ("caption", "text") else text)
    found = [row for _, row in sorted(rows.items()) if row.pictures]
    for row in found[1:]:
        if not any(label.startswith(INPUT) for label, _ in row.pictures):
            row.pictures[:0] = [pair for pair in found[0].pictures if pair[0].startswith(INPUT)]
    return found


def fit(picture: Image.Image) -> Image.Image:
    """Scaled to the cell's height; film strips keep their shape and may be wider than a cell."""
    scale = CELL / picture.height
    if picture.width * scale > 4 * CELL:
        scale = 4 * CELL / picture.width
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)


def wrapped(text: str, width: int, font: ImageFont.FreeTypeFont, limit: int) -> list[str]:
    """`text` broken to `width` px, at most `limit` lines."""
    columns = max(8, int(width / font.getlength("n")))
    lines = [line for part in text.splitlines() for line in textwrap.wrap(part, columns)]
    return lines[:limit - 1] + [lines[limit - 1] + " ..."] if len(lines) > limit else lines


def contact_sheet(rows: list[Row]) -> Image.Image:
    """All rows on one picture."""
    font, bold = ImageFont.load_default(13), ImageFont.load_default(16)
    line = 17
    drawn, width, height = [], 2 * CELL + 3 * GAP, GAP
    for row in rows:
        pictures = [(label, fit(picture)) for label, picture in row.pictures]
        row_width = sum(picture.width for _, picture in pictures) + GAP * (len(pictures) + 1)
        width = max(width, row_width)
        drawn.append((row, pictures))
    laid_out = []
    for row, pictures in drawn:
        labels = [wrapped(label, picture.width, font, 6) for label, picture in pictures]
        lines = [part for text in row.lines for part in wrapped(text, width - 2 * GAP, font, 12)]
        tall = max(picture.height for _, picture in pictures)
        below = max(map(len, labels))
        laid_out.append((row, pictures, labels, lines, tall, below))
        height += 26 + tall + 4 + line * (below + len(lines)) + 2 * GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    y = GAP
    for row, pictures, labels, lines, tall, below in laid_out:
        draw.text((GAP, y), row.title, INK, bold)
        y += 26
        x = GAP
        for (_, picture), label in zip(pictures, labels, strict=True):
            sheet.paste(picture, (x, y))
            for index, text in enumerate(label):
                draw.text((x, y + tall + 4 + line * index), text, INK, font)
            x += picture.width + GAP
        y += tall + 4 + line * below
        for text in lines:
            draw.text((GAP, y), text, QUIET, font)
            y += line
        y += 2 * GAP
    return sheet


def write_sheet(rows: list[Row], path: Path) -> None:
    """Save the sheet as PNG."""
    contact_sheet(rows).save(path)
