"""Procedural scenes with known truth: 128 px drawings of one or two objects.

A scene is a plain value. Everything that a caption may name is a word from the tables below; everything else (exact hue,
position, radius, tilt) is a number that varies around its word. The same value always renders to the same picture, and
`edited` returns a twin that differs in one attribute only, so an edit can be scored against the truth.
"""

from __future__ import annotations

import colorsys
import math
import random
from dataclasses import dataclass, replace

import numpy as np

SIZE = 128  # pixels, both sides

SHAPES = ("circle", "square", "triangle", "star")
PATTERNS = ("plain", "striped", "dotted", "checked")
STYLES = ("flat", "outline")
# Hue in degrees, saturation, value. Neighbouring hues keep 24 degrees or more apart so that the jitter never crosses a name.
COLORS = {
    "red": (0, 0.86, 0.84),
    "orange": (28, 0.92, 0.96),
    "yellow": (53, 0.86, 0.95),
    "green": (128, 0.72, 0.62),
    "teal": (180, 0.78, 0.70),
    "blue": (226, 0.76, 0.86),
    "purple": (276, 0.62, 0.68),
    "pink": (328, 0.48, 0.97),
}
BACKGROUNDS = {
    "white": (0.95, 0.95, 0.95),
    "gray": (0.55, 0.55, 0.55),
    "black": (0.10, 0.10, 0.10),
    "beige": (0.92, 0.83, 0.67),
    "sky": (0.67, 0.82, 0.95),
    "brown": (0.40, 0.28, 0.20),
}
SIZES = {"small": (17.0, 20.0), "large": (26.0, 31.0)}  # radius range in pixels
PLACES = {
    "top left": (34, 34), "top": (64, 34), "top right": (94, 34),
    "left": (34, 64), "center": (64, 64), "right": (94, 64),
    "bottom left": (34, 94), "bottom": (64, 94), "bottom right": (94, 94),
}
ATTRIBUTES = ("shape", "color", "pattern", "color2", "size", "place", "background", "style")

PERIOD = 13.0  # pixels between two marks of a pattern
LINE = 4.0  # pixels, width of an outline
EXTENT = 1.18  # the farthest point of any shape, in radii


@dataclass(frozen=True)
class Object:
    """One drawn object. `color2` is "" and `rgb2` unused for a plain fill; lengths are pixels, `tilt` radians, colours 0..1."""

    shape: str
    color: str
    pattern: str
    color2: str
    size: str
    place: str
    cx: float
    cy: float
    radius: float
    tilt: float
    rgb: tuple[float, float, float]
    rgb2: tuple[float, float, float]


@dataclass(frozen=True)
class Scene:
    """One or two objects on a plain background, all drawn in one style."""

    objects: tuple[Object, ...]
    background: str
    background_rgb: tuple[float, float, float]
    style: str


def sample_color(rng: random.Random, name: str) -> tuple[float, float, float]:
    """A colour (r, g, b) in 0..1 near the middle of its name."""
    hue, saturation, value = COLORS[name]
    hue += rng.uniform(-6, 6)
    saturation = min(1.0, saturation + rng.uniform(-0.07, 0.07))
    value = min(1.0, value + rng.uniform(-0.05, 0.03))
    return colorsys.hsv_to_rgb((hue % 360) / 360, saturation, value)


def sample_background(rng: random.Random, name: str) -> tuple[float, float, float]:
    """A background's (r, g, b) in 0..1 near the middle of its name. Raises KeyError for a name that is not in BACKGROUNDS."""
    shift = rng.uniform(-0.03, 0.03)
    return tuple(min(1.0, max(0.0, c + shift + rng.uniform(-0.01, 0.01))) for c in BACKGROUNDS[name])


def sample_object(rng: random.Random, wanted: dict[str, str] | None = None) -> Object:
    """An object whose attributes are drawn, those in `wanted` (attribute: word) given. What is drawn for the rest does not depend on them."""
    wanted = wanted or {}

    def choose(attribute: str, words: list[str]) -> str:
        drawn = rng.choice(words)
        return wanted.get(attribute, drawn)

    shape, color, pattern = choose("shape", list(SHAPES)), choose("color", list(COLORS)), choose("pattern", list(PATTERNS))
    other = choose("color2", [c for c in COLORS if c != color])
    size, place = choose("size", list(SIZES)), choose("place", list(PLACES))
    radius = rng.uniform(*SIZES[size])
    margin = radius * EXTENT + 2
    cx, cy = (min(SIZE - margin, max(margin, c + rng.uniform(-5, 5))) for c in PLACES[place])
    return Object(shape, color, pattern, "" if pattern == "plain" else other, size, place, cx, cy, radius,
                  rng.uniform(-0.2, 0.2), sample_color(rng, color), sample_color(rng, other))


def apart(a: Object, b: Object) -> bool:
    """Whether two objects are far enough from each other that neither silhouette, at any tilt, touches the other."""
    return math.hypot(a.cx - b.cx, a.cy - b.cy) >= 1.1 * (a.radius + b.radius) + 4


def sample_scene(seed: int, objects: int | None = None) -> Scene:
    """Draw a scene from its seed; `objects` fixes the count (1 or 2), None lets the seed choose."""
    if objects not in (None, 1, 2):
        raise ValueError(f"A scene holds 1 or 2 objects, {objects} were asked for; pass 1, 2 or None.")
    rng = random.Random(seed)
    count = rng.choice((1, 2)) if objects is None else objects
    placed = [sample_object(rng) for _ in range(count)]
    # Both are drawn again: a large object in the center leaves no room for any second one.
    while count == 2 and not apart(*placed):
        placed = [sample_object(rng) for _ in range(count)]
    background, style = rng.choice(list(BACKGROUNDS)), rng.choice(STYLES)
    return Scene(tuple(placed), background, sample_background(rng, background), style)


def edited(scene: Scene, attribute: str, value: str, index: int = 0, seed: int = 0) -> Scene:
    """The twin of `scene` with one attribute changed and every number of the rest kept.

    `attribute` is color, color2, pattern, background, style, shape or size; `index` names the object where it belongs to one.
    A pattern given to a plain object takes its dormant second colour. Raises ValueError for an unknown attribute or value.
    """
    rng = random.Random(seed)
    tables = {"color": COLORS, "color2": COLORS, "pattern": PATTERNS, "background": BACKGROUNDS, "style": STYLES,
              "shape": SHAPES, "size": SIZES}
    if attribute not in tables or value not in tables[attribute]:
        raise ValueError(f"'{attribute}' cannot become '{value}'; use one of {', '.join(tables)} and a word of its table.")
    if attribute == "background":
        return replace(scene, background=value, background_rgb=sample_background(rng, value))
    if attribute == "style":
        return replace(scene, style=value)
    old = scene.objects[index]
    if attribute == "color":
        new = replace(old, color=value, rgb=sample_color(rng, value))
    elif attribute == "color2":
        new = replace(old, color2=value, rgb2=sample_color(rng, value))
    elif attribute == "pattern":
        new = replace(old, pattern=value, color2="" if value == "plain" else nearest_color(old.rgb2))
    elif attribute == "shape":
        new = replace(old, shape=value)
    else:
        new = replace(old, size=value, radius=rng.uniform(*SIZES[value]))
    return replace(scene, objects=tuple(new if i == index else o for i, o in enumerate(scene.objects)))


def nearest_color(rgb) -> str:
    """The colour name whose hue is nearest to `rgb` (three numbers in 0..1)."""
    hue = colorsys.rgb_to_hsv(*(min(1.0, max(0.0, float(c))) for c in rgb))[0] * 360
    return min(COLORS, key=lambda name: abs((hue - COLORS[name][0] + 180) % 360 - 180))


def nearest_background(rgb) -> str:
    """The background name whose colour is nearest to `rgb` (three numbers in 0..1)."""
    return min(BACKGROUNDS, key=lambda name: sum((a - float(b)) ** 2 for a, b in zip(BACKGROUNDS[name], rgb)))


# --- drawing -----------------------------------------------------------------------------------------------------------

def polygon(shape: str) -> np.ndarray:
    """Corners [n, 2] of a unit shape, in order."""
    if shape == "square":
        h = 0.88
        return np.array([(-h, -h), (h, -h), (h, h), (-h, h)])
    if shape == "triangle":
        angles = -math.pi / 2 + np.arange(3) * 2 * math.pi / 3
        return EXTENT * np.stack([np.cos(angles), np.sin(angles)], 1) + np.array([0.0, 0.12])
    angles = -math.pi / 2 + np.arange(10) * math.pi / 5
    radii = np.where(np.arange(10) % 2 == 0, EXTENT, 0.6)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)


def inside_distance(shape: str, u: np.ndarray, v: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance to the border in pixels, positive inside. `u`, `v`: pixel coordinates in the object's own frame."""
    if shape == "circle":
        return radius - np.hypot(u, v)
    corners = polygon(shape) * radius
    distance = np.full(u.shape, np.inf)
    inside = np.zeros(u.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, 0)):
        ex, ey, wx, wy = bx - ax, by - ay, u - ax, v - ay
        along = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
        distance = np.minimum(distance, (wx - ex * along) ** 2 + (wy - ey * along) ** 2)
        crosses = (ay > v) != (by > v)
        inside ^= crosses & (u < ex * (v - ay) / (ey if ey else 1e-9) + ax)
    return np.where(inside, 1.0, -1.0) * np.sqrt(distance)


def coverage(distance: np.ndarray) -> np.ndarray:
    """Anti-aliased coverage 0..1 of the half plane `distance` > 0."""
    return np.clip(distance + 0.5, 0, 1)


def from_mark(t: np.ndarray) -> np.ndarray:
    """Distance in pixels to the nearest mark of a pattern; marks lie one PERIOD apart, the first half a period off the middle,
    so that even the smallest object shows more than one."""
    return np.abs(t % PERIOD - PERIOD / 2)


def marks(pattern: str, style: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Coverage 0..1 of the second colour inside an object."""
    if pattern == "plain":
        return np.zeros_like(u)
    if pattern == "striped":
        return coverage((PERIOD / 4 if style == "flat" else 1.6) - from_mark(v))
    if pattern == "dotted":
        return coverage((4.3 if style == "flat" else 3.4) - np.hypot(from_mark(u), from_mark(v)))
    if style == "outline":
        across, down = (coverage(1.4 - from_mark(t + PERIOD / 2)) for t in (u, v))
        return across + down - across * down
    across, down = (coverage(PERIOD / 4 - from_mark(t + PERIOD / 4)) for t in (u, v))
    return across * (1 - down) + down * (1 - across)


def object_layers(obj: Object, style: str, box: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(silhouette, first colour, second colour) coverages [h, w] of `obj` in the pixel box (left, top, right, bottom)."""
    left, top, right, bottom = box
    y, x = np.mgrid[top:bottom, left:right] + 0.5
    dx, dy = x - obj.cx, y - obj.cy
    cos, sin = math.cos(obj.tilt), math.sin(obj.tilt)
    u, v = cos * dx + sin * dy, -sin * dx + cos * dy
    distance = inside_distance(obj.shape, u, v, obj.radius)
    silhouette = coverage(distance)
    second = marks(obj.pattern, style, u, v)
    if style == "flat":
        return silhouette, silhouette * (1 - second), silhouette * second
    inner = coverage(distance - LINE)
    return silhouette, silhouette - inner, inner * second


def bounds(obj: Object) -> tuple[int, int, int, int]:
    """Pixel box (left, top, right, bottom), right and bottom excluded, that holds all of an object at any tilt; clipped to the picture."""
    reach = obj.radius * (EXTENT + 0.12) + 2
    return (max(0, int(obj.cx - reach)), max(0, int(obj.cy - reach)),
            min(SIZE, int(obj.cx + reach) + 1), min(SIZE, int(obj.cy + reach) + 1))


def render(scene: Scene) -> np.ndarray:
    """The picture, float32 [128, 128, 3] in 0..1."""
    image = np.empty((SIZE, SIZE, 3), np.float32)
    image[:] = scene.background_rgb
    for obj in scene.objects:
        left, top, right, bottom = box = bounds(obj)
        _, first, second = (layer[..., None] for layer in object_layers(obj, scene.style, box))
        patch = image[top:bottom, left:right]
        image[top:bottom, left:right] = patch * (1 - first - second) + first * np.array(obj.rgb) + second * np.array(obj.rgb2)
    return image


def masks(scene: Scene) -> np.ndarray:
    """Silhouette of each object, float32 [objects, 128, 128] in 0..1, in the scene's order."""
    return np.stack([object_layers(obj, scene.style, (0, 0, SIZE, SIZE))[0] for obj in scene.objects]).astype(np.float32)


def outline(silhouettes: np.ndarray) -> np.ndarray:
    """White lines two pixels wide inside the border of every silhouette [n, H, W], on black; float32 [H, W] in 0..1."""
    out = np.zeros(silhouettes.shape[1:], np.float32)
    for silhouette in silhouettes:
        inside = np.pad(silhouette > 0.5, 2)
        inner = inside.copy()
        for axis in (0, 1):
            for step in (-2, -1, 1, 2):
                inner &= np.roll(inside, step, axis)
        out[(inside & ~inner)[2:-2, 2:-2]] = 1
    return out
