"""What the scene reader sees in the pictures of a mini graph, as lines of the contact sheet."""
import io

import numpy as np
from PIL import Image

from ..mini.metrics import STRUCTURE, against_caption, assign
from ..mini.parse import parse
from ..mini.reader import ReadObject, Reading, read
from .graphs import Role
from .sheet import CAPTION

SIDE = 128  # pixels of a mini picture
SOURCE, EDIT = "input", "edit"


def words(reading: Reading) -> str:
    """A reading as the grammar would say it; what could not be read is a question mark."""
    def word(value) -> str:
        return value or "?"

    parts = []
    for one in reading.objects:
        fill = {"plain": "plain ", None: "? "}.get(one.pattern, "")
        marks = "" if one.pattern in ("plain", None) else f" {one.pattern} with {word(one.color2)}"
        parts.append(f"{word(one.size)} {fill}{word(one.color)} {word(one.shape)}{marks}, {one.place}")
    return f"{'; '.join(parts) or 'no object'}; {word(reading.background)} background, {word(reading.style)}"


def pairs(before: Reading, after: Reading) -> list[tuple[ReadObject, ReadObject | None]]:
    """Every object of `before` with the one of `after` that lies nearest."""
    costs = np.array([[np.hypot(a.cx - b.cx, a.cy - b.cy) for b in after.objects] for a in before.objects])
    return [(one, None if index is None else after.objects[index]) for one, index in zip(before.objects, assign(costs))]


def structure(before: Reading, after: Reading) -> str:
    """What an edit left of the shapes, places and sizes, and how well the silhouettes cover each other."""
    if not before.objects:
        return "no object to keep"
    found = pairs(before, after)
    lost = [name for name in STRUCTURE if any(b is None or getattr(a, name) != getattr(b, name) for a, b in found)]
    if len(before.objects) != len(after.objects):
        lost.insert(0, "number of objects")
    overlap = np.mean([0.0 if b is None else (a.mask & b.mask).sum() / (a.mask | b.mask).sum() for a, b in found])
    return f"structure {'kept' if not lost else 'not kept (' + ', '.join(lost) + ')'}, object IoU {overlap:.2f}"


def against(reading: Reading, prompt: str) -> str:
    """How much of what a prompt names is there; nothing if the prompt is not of the grammar."""
    try:
        named, whole = parse(prompt)
    except ValueError:
        return ""
    found = {name: all(values) for name, values in against_caption(reading, named, whole).items()}
    wrong = [name for name, right in found.items() if not right]
    return "all that the prompt names is there" if not wrong else f"not as the prompt says: {', '.join(wrong)}"


def decoded(data: bytes) -> np.ndarray:
    """[H, W, 3] in 0..1."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.float32) / 255


def readable(picture: np.ndarray) -> bool:
    return picture.shape[:2] == (SIDE, SIDE)


def scores(outputs: list[tuple[Role, list[bytes], str]]) -> list[tuple[Role, list[bytes], str]]:
    """Further text outputs: what was read in every mini picture, and whether an edit is what was asked for. A row without an input is compared with the first row's."""
    prompts = {(role.row, role.name.removesuffix(CAPTION)): text for role, _, text in outputs if role.name.endswith(CAPTION)}
    prompts |= {(role.row, role.name): role.caption for role, pictures, _ in outputs if pictures and role.caption}
    pictures = [(role, decoded(data)) for role, found, _ in outputs for data in found if role.name in (SOURCE, EDIT, "picture")]
    readings = [(role, read(picture)) for role, picture in pictures if readable(picture)]
    sources = {role.row: reading for role, reading in readings if role.name == SOURCE}
    lines = []
    for role, reading in readings:
        text = f"{role.name}, read from its pixels: {words(reading)}"
        if role.name != SOURCE:
            judged = [against(reading, prompts.get((role.row, role.name), ""))]
            source = sources.get(role.row) or sources.get(1)
            if role.name == EDIT and source:
                judged.append(structure(source, reading))
            judged = [part for part in judged if part]
            text += f"\n{role.name}: {'; '.join(judged)}" if judged else ""
        lines.append((Role("text", role.row, ""), [], text))
    return lines
