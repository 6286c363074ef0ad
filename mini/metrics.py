"""Scores of a picture that was read: against a scene, against a caption's attributes, and against an edit's target."""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from .reader import ReadObject, Reading
from .scenes import ATTRIBUTES, PLACES, Scene, masks

OBJECT_ATTRIBUTES = tuple(a for a in ATTRIBUTES if a not in ("background", "style"))
STRUCTURE = ("shape", "place", "size")
EVEN = ("striped", "checked", None)  # None: marks that are none of the grammar's, but of two colors


def assign(costs: np.ndarray) -> list[int | None]:
    """Column of each row [rows, columns] so that the costs sum up least; None for rows without one."""
    out: list[int | None] = [None] * len(costs)
    if costs.size:
        for row, column in zip(*linear_sum_assignment(costs)):
            out[row] = int(column)
    return out


def match_objects(reading: Reading, scene: Scene) -> list[ReadObject | None]:
    """The read object of each object of the scene, by least total distance of their centres; None where too few were read."""
    costs = np.array([[math.hypot(r.cx - o.cx, r.cy - o.cy) for r in reading.objects] for o in scene.objects])
    return [None if i is None else reading.objects[i] for i in assign(costs)]


def shows(read: ReadObject | None, attribute: str, value: str, style: str | None) -> bool:
    """Whether a read object shows what a caption names or an edit asked for, `style` being the picture's.

    Filled stripes and checks cover half of an object: red with blue is blue with red, and either color comes first.
    """
    if read is not None and style == "flat" and read.pattern in EVEN and attribute in ("color", "color2"):
        return value in (read.color, read.color2)
    return holds(read, attribute, value)


def match_named(reading: Reading, named: list[dict[str, str]]) -> list[ReadObject | None]:
    """The read object of each of a caption's objects, so that the most named attributes hold.

    Ties fall to the object whose place lies nearer to the named one.
    """
    def cost(wanted: dict[str, str], read: ReadObject) -> float:
        wrong = sum(not shows(read, attribute, value, reading.style) for attribute, value in wanted.items())
        if "place" not in wanted:
            return wrong
        (x, y), (a, b) = PLACES[wanted["place"]], PLACES[read.place]
        return wrong + math.hypot(x - a, y - b) / 1000

    costs = np.array([[cost(wanted, read) for read in reading.objects] for wanted in named])
    return [None if i is None else reading.objects[i] for i in assign(costs)]


def holds(read: ReadObject | None, attribute: str, value: str) -> bool:
    """Whether an object was found at all and its attribute was read as `value`."""
    return read is not None and getattr(read, attribute) == value


def against_scene(reading: Reading, scene: Scene) -> dict[str, list[bool]]:
    """Per attribute, whether it was read right: one value per object of the scene, one for count, background and style."""
    pairs = list(zip(match_objects(reading, scene), scene.objects))
    out = {attribute: [holds(read, attribute, getattr(o, attribute)) for read, o in pairs] for attribute in OBJECT_ATTRIBUTES}
    out["count"] = [len(reading.objects) == len(scene.objects)]
    out["background"] = [reading.background == scene.background]
    out["style"] = [reading.style == scene.style]
    return out


def against_caption(reading: Reading, named: list[dict[str, str]], scene_named: dict[str, str]) -> dict[str, list[bool]]:
    """Per attribute, whether what a caption named is there (`named`, `scene_named` as `captions.caption` returns them)."""
    out: dict[str, list[bool]] = {"count": [len(reading.objects) == len(named)]}
    for read, wanted in zip(match_named(reading, named), named):
        for attribute, value in wanted.items():
            out.setdefault(attribute, []).append(shows(read, attribute, value, reading.style))
    for attribute, value in scene_named.items():
        out[attribute] = [getattr(reading, attribute) == value]
    return out


def edit_success(reading: Reading, target: Scene, attribute: str, index: int = 0) -> bool:
    """Whether the edited attribute has its new value; `target` is the edited twin.

    A new pattern needs a second colour to show: whichever it is, since the words of the edit may not name it.
    """
    if attribute in ("background", "style"):
        return getattr(reading, attribute) == getattr(target, attribute)
    return shows(match_objects(reading, target)[index], attribute, getattr(target.objects[index], attribute), reading.style)


def structure_kept(reading: Reading, source: Scene) -> bool:
    """Whether every object's shape, place and size are as in the source and no object came or went."""
    return len(reading.objects) == len(source.objects) and all(
        holds(read, attribute, getattr(o, attribute)) for read, o in zip(match_objects(reading, source), source.objects) for attribute in STRUCTURE)


def others_kept(reading: Reading, source: Reading, attribute: str, index: int = 0) -> bool:
    """Whether everything but one attribute (of object `index`, or of the scene) is read as in the source, and no object came or went.

    What could not be read in the source is not judged. A second color belongs to its pattern, so an edit of the pattern may change it;
    of filled even marks (see `shows`) either color comes first.
    """
    if len(reading.objects) != len(source.objects) or any(getattr(reading, name) != getattr(source, name) for name in ("background", "style") if name != attribute):
        return False
    free = {attribute, "color2"} if attribute == "pattern" else {attribute}
    for number, (read, before) in enumerate(zip(match_objects(reading, source), source.objects)):
        own = free if number == index and attribute in OBJECT_ATTRIBUTES else set()
        judged = [name for name in OBJECT_ATTRIBUTES if name not in own and getattr(before, name) is not None]
        if any(not shows(read, name, getattr(before, name), reading.style) for name in judged):
            return False
    return True


def background_psnr(picture: np.ndarray, source: np.ndarray, reading: Reading, before: Reading) -> float:
    """PSNR in dB (peak 1) between two pictures [H, W, 3] outside all objects that either shows.

    One latent cell (8 pixels) around them is left out as well, the finest grain of an edit of latents.
    """
    shown = np.zeros(picture.shape[:2], bool)
    for read in (*reading.objects, *before.objects):
        shown |= ndimage.binary_dilation(read.mask, iterations=8)
    error = float(((picture - source)[~shown] ** 2).mean()) if not shown.all() else 0.0
    return -10.0 * math.log10(max(error, 1e-10))


def object_iou(reading: Reading, source: Scene) -> float:
    """Mean over the source's objects of intersection over union of the silhouettes; 0 for an object that is gone."""
    values = []
    for read, mask in zip(match_objects(reading, source), masks(source) > 0.5):
        values.append(0.0 if read is None else float((read.mask & mask).sum() / (read.mask | mask).sum()))
    return sum(values) / len(values)


def wilson(successes: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval (low, high) of a rate of `successes` in `n` trials (Wilson 1927)."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"A rate needs 0 <= successes <= n and n >= 1, not {successes} of {n}; count again.")
    p = successes / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)
