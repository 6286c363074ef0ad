"""The scene reader: every attribute of a scene, from pixels alone, by analysis through synthesis.

The border gives the background, what differs from it gives the objects, and each object is explained by the drawing of
`scenes` (shape, pattern, style) that leaves the least error once its two colours are solved by linear least squares.
Deterministic, and honest about failures: a blob that no drawing explains comes back with `shape` None, and every name has
evidence of its own: the silhouette for the shape, its own pixels for a colour. The fit of one
object lives in `reader_fit`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from . import reader_fit as fit
from .scenes import BACKGROUNDS, PLACES, SIZE, SIZES, nearest_background

SMALLEST, LARGEST = 64, 1024  # pixels, sides of a picture that can be read
SPECK = 110  # pixels; the smallest object of the grammar covers 400
FAR = 0.3  # a background colour farther than this (RGB distance) from every name has none
DISTINCT = 0.11  # RGB distance from the background at which a pixel counts as drawn
RING = 3  # pixels, width of the border that shows the background


@dataclass(frozen=True, eq=False)
class ReadObject:
    """One object as read. Names are None where no drawing explains the pixels; `color2` is "" for a plain fill. Where only the marks inside
    are unlike any drawing, pattern is None, the silhouette gives the shape, and outline or fill the color(s).

    cx, cy, radius: pixels. tilt: radians. rgb, rgb2: 0..1, None like their names. mask: bool [H, W], the silhouette as the
    pixels show it. residual: RMS error of the best drawing in units of the part's RMS contrast with the background.
    confidence: 0..1, 0 at the limit above which nothing is named.
    """

    shape: str | None
    color: str | None
    pattern: str | None
    color2: str | None
    size: str | None
    place: str
    cx: float
    cy: float
    radius: float
    tilt: float
    rgb: tuple[float, float, float] | None
    rgb2: tuple[float, float, float] | None
    mask: np.ndarray
    residual: float
    confidence: float


@dataclass(frozen=True, eq=False)
class Reading:
    """A picture as read: objects from left to right, background and style (None where there is none to name)."""

    objects: tuple[ReadObject, ...]
    background: str | None
    background_rgb: tuple[float, float, float]
    style: str | None
    residual: float


def place_of(cx: float, cy: float, width: int, height: int) -> str:
    """The place whose middle is nearest to a point, both relative to the picture's sides."""
    x, y = cx * SIZE / width, cy * SIZE / height
    return min(PLACES, key=lambda name: (PLACES[name][0] - x) ** 2 + (PLACES[name][1] - y) ** 2)


def size_of(radius: float) -> str:
    """Small or large: the word whose range of radii is nearest."""
    return min(SIZES, key=lambda name: max(SIZES[name][0] - radius, radius - SIZES[name][1]))


def read_background(image: np.ndarray) -> tuple[tuple[float, float, float], str | None, float]:
    """(colour, name or None, spread) of the border ring; the median shrugs off an object that touches the border."""
    edge = np.zeros(image.shape[:2], bool)
    edge[:RING], edge[-RING:], edge[:, :RING], edge[:, -RING:] = True, True, True, True
    ring = image[edge]
    middle = np.median(ring, 0)
    spread = float(np.median(np.linalg.norm(ring - middle, axis=1)))
    name = nearest_background(middle)
    far = np.linalg.norm(middle - BACKGROUNDS[name]) > FAR or spread > DISTINCT
    return tuple(float(c) for c in middle), None if far else name, spread


def foreground(image: np.ndarray, background, spread: float) -> np.ndarray:
    """bool [H, W]: pixels that are drawn, enclosed ones included."""
    distance = np.linalg.norm(image - np.asarray(background), axis=2)
    # An edge pixel belongs to the object from half the contrast next to it; a fixed limit would swell strong colours.
    drawn = distance > np.maximum(max(DISTINCT, 4 * spread), 0.4 * ndimage.maximum_filter(distance, 5))
    # Closing bridges the weak spots that blur leaves in a line; the frame keeps it from eating the picture's border.
    padded = ndimage.binary_closing(np.pad(drawn, 4), iterations=2)[4:-4, 4:-4]
    return ndimage.binary_fill_holes(padded | drawn)


def components(drawn: np.ndarray) -> list[np.ndarray]:
    """Connected parts of at least SPECK pixels, bool [H, W] each, largest first."""
    labels, count = ndimage.label(drawn)
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    return [labels == i for i in sorted(range(1, count + 1), key=lambda i: -areas[i]) if areas[i] >= SPECK]


def halves(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """A part cut into the surroundings of its two deepest points, for objects that touch; None when it has only one."""
    depth = ndimage.distance_transform_edt(mask)
    first = np.unravel_index(np.argmax(depth), depth.shape)
    y, x = np.indices(mask.shape)
    rest = depth * (np.hypot(y - first[0], x - first[1]) > 1.3 * depth[first])
    second = np.unravel_index(np.argmax(rest), rest.shape)
    if rest[second] < 5:
        return None
    # Nearest by distance less the depth, so that the cut falls between the two borders and not half-way.
    a, b = (np.hypot(y - p[0], x - p[1]) - depth[p] for p in (first, second))
    return mask & (a <= b), mask & (a > b)


def explain(image: np.ndarray, background, parts: list[np.ndarray]) -> tuple[str | None, list[fit.Fit]]:
    """(style, one Fit per part), the style being the one in which all parts together fit best."""
    if not parts:
        return None, []
    everything = np.logical_or.reduce(parts)
    fits = [fit.fit_object(image, background, part, everything & ~part) for part in parts]
    style = min(fits[0], key=lambda s: sum(f[s].cost for f in fits))
    return style, [f[style] for f in fits]


def read(image, count: int | None = None) -> Reading:
    """Read a picture, float [H, W, 3] in 0..1 (array or CPU tensor), at the drawing's own scale (a radius of 17 to 31 pixels).

    `count`: how many objects to look for; None takes what is there. Sides other than 128 work: lengths stay pixels and
    places are relative to the sides. Raises ValueError for another shape, for NaN, and for sides outside 64 to 1024.
    """
    image = np.asarray(image, dtype=np.float32)
    if image.ndim != 3 or image.shape[2] != 3 or not all(SMALLEST <= n <= LARGEST for n in image.shape[:2]):
        raise ValueError(f"The scene reader takes one picture [H, W, 3] with sides of {SMALLEST} to {LARGEST} pixels, not {list(image.shape)}; "
                         "pass a single RGB picture of that size.")
    if not np.isfinite(image).all():
        raise ValueError("The picture holds NaN or infinite values; decode it again from a finite latent.")
    image = image.clip(0, 1)
    background, name, spread = read_background(image)
    parts = components(foreground(image, background, spread))
    if count is not None:
        parts = parts[:count]
    style, fits = explain(image, background, parts)
    # Objects that touch come as one part that no single drawing explains.
    for i, (part, found) in enumerate(zip(parts, fits)):
        if found.shape is not None or (count is not None and len(parts) >= count):
            continue
        cut = halves(part)
        if cut is None:
            continue
        others = [p for j, p in enumerate(parts) if j != i]
        new_style, new_fits = explain(image, background, [*cut, *others])
        if all(f.shape is not None for f in new_fits[:2]):
            parts, style, fits = [*cut, *others], new_style, new_fits
            break
    height, width = image.shape[:2]
    objects = []
    for part, f in zip(parts, fits):
        known = f.shape is not None
        objects.append(ReadObject(f.shape, f.color, f.pattern, f.color2, size_of(f.radius) if known else None,
                                  place_of(f.cx, f.cy, width, height), f.cx, f.cy, f.radius, f.tilt, f.rgb, f.rgb2, part,
                                  f.residual, max(0.0, 1 - f.residual / fit.LIMIT) if known else 0.0))
    order = sorted(range(len(objects)), key=lambda i: (objects[i].cx, objects[i].cy))
    named = any(o.shape is not None for o in objects)
    return Reading(tuple(objects[i] for i in order), name, background, style if named else None,
                   max((o.residual for o in objects), default=0.0))
