"""The reader's fit of one object: which drawing explains these pixels best.

Coarse: the silhouette, brought to unit area and centre, against a bank of the grammar's silhouettes. Fine: position,
radius and tilt by damped Gauss-Newton steps on the pixels, the two colours solved by linear least squares inside
(variable projection, Golub and Pereyra 1973), for the patterns and styles that are still in the race.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage

from .scenes import COLORS, LINE, PATTERNS, SHAPES, STYLES, coverage, inside_distance, marks, polygon

OVERLAP = 0.8  # IoU of the part and the drawing's silhouette, below which the same holds
LIMIT = 0.5  # RMS error, in units of the part's RMS contrast, above which no drawing explains a part as a whole
OUTER = 0.9  # IoU above which the silhouette alone says the shape of such a part
MOTTLED = 0.25  # RMS error of a plain fill above which two colours are looked for in it
SHARE = 0.2  # of a part's pixels that each of them takes at least
SCATTER = 0.35  # RMS distance of its pixels from either, in units of the distance between the two, at most
GRAY = 0.12  # below this saturation a colour has no name
APART = 0.15  # RGB distance that two colours of one pattern keep at least
FAINT = 0.15  # marks show at least this fraction of the first colour's contrast
SAME = 0.96  # cosine above which faint marks are the outline's own colour that blur let bleed inside
BLURS = (0.0, 1.0)  # pixels; a decoded picture's edges are softer than a drawing's
PATTERN_COST = 3e-4  # mean squared error that a pattern must save against a plain fill
MIXTURES, MIXTURE_COST = np.linspace(0.5, 1.0, 6), 0.15  # how pure a decoded colour may be, and what impurity costs
RADII = (12.0, 36.0)  # pixels; beyond the grammar's 17 to 31 by what a sampler may stretch
MAX_TILT = 0.3
CIRCLE_TILTS = (-0.14, 0.0, 0.14)
STEPS = np.array([0.3, 0.3, 0.3, 0.02])  # differences for the Jacobian: pixels, pixels, pixels, radians
BANK_SIDE, BANK_REACH, BANK_TILTS = 40, 1.15, np.linspace(-0.24, 0.24, 9)


@dataclass(frozen=True)
class Fit:
    """The best drawing of one style for one part. `cost` is a mean squared error with its penalties, to compare styles by.

    Where the marks inside are none of the grammar's, `pattern` is None, and what the rest shows is named.
    """

    shape: str | None
    color: str | None
    pattern: str | None
    color2: str | None
    cx: float
    cy: float
    radius: float
    tilt: float
    rgb: tuple | None
    rgb2: tuple | None
    residual: float
    cost: float


@lru_cache(maxsize=1)
def unit_shapes() -> dict[str, tuple[float, float]]:
    """Per shape of radius 1: (area, height of the centroid below the centre)."""
    out = {"circle": (np.pi, 0.0)}
    for shape in SHAPES[1:]:
        p = polygon(shape)
        q = np.roll(p, -1, 0)
        cross = p[:, 0] * q[:, 1] - q[:, 0] * p[:, 1]
        area = cross.sum() / 2
        out[shape] = (abs(area), float(((p + q)[:, 1] * cross).sum() / (6 * area)))
    return out


@lru_cache(maxsize=1)
def bank() -> tuple[list[tuple[str, float]], np.ndarray]:
    """Names (shape, tilt) and silhouettes [n, pixels] at unit area about their centroid."""
    axis = (np.arange(BANK_SIDE) + 0.5) / BANK_SIDE * 2 * BANK_REACH - BANK_REACH
    x, y = np.meshgrid(axis, axis)
    names, rows = [], []
    for shape, (area, drop) in unit_shapes().items():
        radius = 100 / np.sqrt(area)
        for tilt in BANK_TILTS if shape != "circle" else [0.0]:
            cos, sin = np.cos(tilt), np.sin(tilt)
            u, v = cos * x + sin * y, -sin * x + cos * y
            names.append((shape, float(tilt)))
            rows.append((inside_distance(shape, 100 * u, 100 * v + drop * radius, radius) > 0).ravel())
    return names, np.array(rows, np.float32)


def silhouettes(mask: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Start values (shape, [cx, cy, radius, tilt]) of the shapes that overlap the part best (IoU), best first."""
    area = float(mask.sum())
    cy, cx = (c + 0.5 for c in ndimage.center_of_mass(mask))
    axis = ((np.arange(BANK_SIDE) + 0.5) / BANK_SIDE * 2 - 1) * BANK_REACH * np.sqrt(area)
    rows, columns = (np.floor(c + axis).astype(int) for c in (cy, cx))
    inside = ((rows >= 0) & (rows < mask.shape[0]))[:, None] & ((columns >= 0) & (columns < mask.shape[1]))[None]
    sample = (mask[rows.clip(0, mask.shape[0] - 1)][:, columns.clip(0, mask.shape[1] - 1)] & inside).ravel().astype(np.float32)
    names, templates = bank()
    both = templates @ sample
    iou = both / (templates.sum(1) + sample.sum() - both)
    starts = {}
    for i in np.argsort(-iou, kind="stable"):
        shape, tilt = names[i]
        if shape not in starts:
            unit, drop = unit_shapes()[shape]
            radius = np.sqrt(area / unit)
            # The centroid lies `drop` radii along the object's own v axis from the centre.
            starts[shape] = (float(iou[i]), np.array([cx + np.sin(tilt) * drop * radius, cy - np.cos(tilt) * drop * radius, radius, tilt]))
    best = max(score for score, _ in starts.values())
    return [(shape, start) for shape, (score, start) in starts.items() if score > best - 0.12]


class Patch:
    """The pixels around one part, and the cost of explaining them by a drawing."""

    def __init__(self, image: np.ndarray, background, mask: np.ndarray, others: np.ndarray):
        ys, xs = np.nonzero(mask)
        self.left, self.top = max(0, xs.min() - 4), max(0, ys.min() - 4)
        right, bottom = min(mask.shape[1], xs.max() + 5), min(mask.shape[0], ys.max() + 5)
        box = np.s_[self.top:bottom, self.left:right]
        self.background = np.asarray(background, np.float64)
        self.keep = ~ndimage.binary_dilation(others[box], iterations=2) if others.any() else np.ones(mask[box].shape, bool)
        self.target = (image[box].astype(np.float64) - self.background)[self.keep]
        self.y, self.x = np.mgrid[self.top:bottom, self.left:right] + 0.5
        self.mask, self.area = mask[box], float(mask.sum())
        self.total = float((self.target**2).sum())
        self.blur = 0.0

    def frame(self, shape: str, p) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(signed distance, u, v) of the pixels [h, w] for a shape at p = [cx, cy, radius, tilt]."""
        cos, sin = np.cos(p[3]), np.sin(p[3])
        dx, dy = self.x - p[0], self.y - p[1]
        u, v = cos * dx + sin * dy, -sin * dx + cos * dy
        return inside_distance(shape, u, v, p[2]), u, v

    def layers(self, frame, pattern: str, style: str) -> np.ndarray:
        """Coverages [1 or 2, h, w] of the colours, as `scenes.object_layers` draws them, blurred as the picture is."""
        distance, u, v = frame
        silhouette = coverage(distance)
        second = None if pattern == "plain" else marks(pattern, style, u, v)
        if style == "flat":
            parts = [silhouette] if second is None else [silhouette * (1 - second), silhouette * second]
        else:
            inner = coverage(distance - LINE)
            parts = [silhouette - inner] if second is None else [silhouette - inner, inner * second]
        return np.stack([ndimage.gaussian_filter(part, self.blur, truncate=2.5) for part in parts] if self.blur else parts)

    def solve(self, layers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(colours less background [n, 3], residual [pixels, 3]); colours are held within 0..1."""
        layers = layers[:, self.keep]
        gram = layers @ layers.T + 1e-6 * np.eye(len(layers))
        colors = np.linalg.solve(gram, layers @ self.target)
        colors = (colors + self.background).clip(0, 1) - self.background
        return colors, self.target - layers.T @ colors

    def refine(self, shape: str, pattern: str, style: str, p: np.ndarray, steps: int) -> np.ndarray:
        """`p` after damped Gauss-Newton steps on the pixels; a step that does not help is not taken."""
        def residual(q):
            return self.solve(self.layers(self.frame(shape, q), pattern, style))[1].ravel()

        now = residual(p)
        for _ in range(steps):
            which = 3 if shape == "circle" and pattern == "plain" else 4
            jacobian = np.stack([(residual(p + STEPS * (np.arange(4) == i)) - now) / STEPS[i] for i in range(which)])
            gram = jacobian @ jacobian.T
            step = np.zeros(4)
            step[:which] = -np.linalg.solve(gram + 0.02 * np.diag(np.diag(gram)) + 1e-9 * np.eye(which), jacobian @ now)
            trial = p + step.clip(-np.array([3, 3, 3, 0.1]), np.array([3, 3, 3, 0.1]))
            trial[2], trial[3] = np.clip(trial[2], *RADII), np.clip(trial[3], -MAX_TILT, MAX_TILT)
            after = residual(trial)
            if after @ after >= now @ now:
                break
            settled = (now @ now) - (after @ after) < 0.01 * (now @ now)
            p, now = trial, after
            if settled:
                break
        return p

    def settle(self, shape: str, pattern: str, style: str, p: np.ndarray, cost: float) -> tuple[np.ndarray, float]:
        """(`p`, cost) with the blur that fits best now; the start values may have been too rough to tell."""
        used = self.blur
        for self.blur in BLURS:
            if self.blur == used:
                continue
            q = self.refine(shape, pattern, style, p, 1)
            other = self.cost(self.layers(self.frame(shape, q), pattern, style), pattern)
            if other < cost:
                return q, other
        self.blur = used
        return p, cost

    def candidates(self, shape: str, p: np.ndarray) -> list[tuple[float, str, str, str]]:
        """(cost, style, shape, pattern) of all patterns and styles at one geometry."""
        frame = self.frame(shape, p)
        return [(self.cost(self.layers(frame, pattern, style), pattern), style, shape, pattern) for style in STYLES for pattern in PATTERNS]

    def cost(self, layers: np.ndarray, pattern: str) -> float:
        """Mean squared error per object pixel, with what a pattern has to save, and what impossible colours cost."""
        colors, residual = self.solve(layers)
        cost = float((residual**2).sum()) / (3 * self.area)
        if pattern != "plain":
            cost = cost * 1.05 + PATTERN_COST
            apart, contrast, marked = (np.linalg.norm(c) + 1e-9 for c in (colors[0] - colors[1], *colors))
            bled = colors[0] @ colors[1] > SAME * contrast * marked and marked < 0.6 * contrast
            if bled or apart < APART or marked < max(APART, FAINT * contrast):
                cost += 1.0
        return cost

    def overlap(self, shape: str, p) -> float:
        """IoU of the part and the drawing's silhouette."""
        drawn = self.frame(shape, p)[0] > 0
        return float((drawn & self.mask).sum() / (drawn | self.mask).sum())

    def first_color(self, layers: np.ndarray, colors: np.ndarray, residual: np.ndarray) -> tuple:
        """The first colour 0..1, alone in a tuple, if it explains its own pixels, whatever is drawn between them; else nothing."""
        core = (layers[0] > 0.8)[self.keep]
        if core.sum() < 12:
            return ()
        rms = float(np.sqrt((residual[core] ** 2).sum(1).mean()))
        return (self.core_colors(layers, colors)[0],) if rms <= LIMIT * np.linalg.norm(colors[0]) else ()

    def two_colors(self, shape: str, p) -> tuple:
        """The two colours 0..1 that a mottled fill consists of, the more frequent first (two means of its pixels); nothing where it is not two."""
        pixels = self.target[(self.frame(shape, p)[0] > 1.5)[self.keep]]
        if len(pixels) < 50:
            return ()
        centred = pixels - pixels.mean(0)
        first = centred @ np.linalg.eigh(centred.T @ centred)[1][:, -1] > 0
        for _ in range(8):
            if not SHARE <= first.mean() <= 1 - SHARE:
                return ()
            means = np.stack([pixels[~first].mean(0), pixels[first].mean(0)])
            first = ((pixels - means[1]) ** 2).sum(1) < ((pixels - means[0]) ** 2).sum(1)
        if not SHARE <= first.mean() <= 1 - SHARE:
            return ()
        # medians, because what lies between two marks is a mixture
        means = np.stack([np.median(pixels[~first], 0), np.median(pixels[first], 0)])
        apart = float(np.linalg.norm(means[0] - means[1]))
        scatter = float(np.sqrt(((pixels - means[first.astype(int)]) ** 2).sum(1).mean()))
        if apart < 2 * APART or scatter > SCATTER * apart:
            return ()
        order = (1, 0) if first.mean() > 0.5 else (0, 1)
        return tuple((means[i] + self.background).clip(0, 1) for i in order)

    def core_colors(self, layers: np.ndarray, colors: np.ndarray) -> list[np.ndarray]:
        """Colours 0..1 of the layers, from the core of each where it has one: what an edge mixes would shift the hue."""
        out = []
        for layer, solved in zip(layers, colors):
            core = (layer > 0.8)[self.keep]
            found = np.median(self.target[core], 0) if core.sum() >= 12 else solved
            out.append((found + self.background).clip(0, 1))
        return out


def color_name(rgb: np.ndarray, other: np.ndarray) -> str | None:
    """The name of a colour that an autoencoder may have mixed with the one beside it, `other`; None for a gray.

    A mixture keeps the direction from `other`, not the hue: a pink mark on beige decodes to a pale red.
    """
    if colorsys.rgb_to_hsv(*rgb)[1] < GRAY:
        return None
    pure = MIXTURES[:, None, None]
    mixed = other + pure * (prototypes() - other)
    distance = ((rgb - mixed) ** 2).sum(2) + MIXTURE_COST * (1 - pure[..., 0]) ** 2
    return list(COLORS)[int(distance.min(0).argmin())]


@lru_cache(maxsize=1)
def prototypes() -> np.ndarray:
    """RGB [names, 3] of the middle of each colour name."""
    return np.array([colorsys.hsv_to_rgb(hue / 360, saturation, value) for hue, saturation, value in COLORS.values()])


def start_values(patch: Patch, mask: np.ndarray) -> list[tuple[float, str, str, str, np.ndarray]]:
    """(cost, style, shape, pattern, geometry) of all drawings whose silhouette comes near the part's, and the patch's blur set."""
    starts = silhouettes(mask)[:3]
    found = {}
    for blur in BLURS:
        patch.blur = blur
        found[blur] = []
        for shape, p in starts:
            p[2] = np.clip(p[2], *RADII)
            # A circle's outline says nothing about the tilt of its pattern.
            for tilt in CIRCLE_TILTS if shape == "circle" else (p[3],):
                q = np.array([*p[:3], tilt])
                found[blur] += [(*c, q) for c in patch.candidates(shape, q)]
    patch.blur = min(BLURS, key=lambda b: min(c[0] for c in found[b]))
    return found[patch.blur]


def fit_object(image: np.ndarray, background, mask: np.ndarray, others: np.ndarray) -> dict[str, Fit]:
    """The best Fit per style of the part `mask` (bool [H, W]); `others` are pixels of other parts, left out of the account."""
    patch = Patch(image, background, mask, others)
    costs = start_values(patch, mask)
    fits = {}
    for style in STYLES:
        ranked = sorted((c for c in costs if c[1] == style), key=lambda c: c[0])
        results = []
        # The runners-up are refined as well where the start values could have decided it.
        for cost, _, shape, pattern, start in ranked[:3]:
            if cost > 2.0 * ranked[0][0] + 0.002:
                continue
            p = patch.refine(shape, pattern, style, start, 3)
            results += [(c, pattern, shape, p) for c, s, shape, pattern in patch.candidates(shape, p) if s == style]
        cost, pattern, shape, p = min(results, key=lambda r: r[0])
        p, cost = patch.settle(shape, pattern, style, p, cost)
        layers = patch.layers(patch.frame(shape, p), pattern, style)
        colors, residual = patch.solve(layers)
        rms = float(np.sqrt((residual**2).sum() / patch.total))
        cx, cy, radius, tilt = (float(x) for x in p)
        overlap = patch.overlap(shape, p)
        if rms > LIMIT or overlap < OVERLAP or (pattern == "plain" and style == "flat" and rms > MOTTLED):
            known = overlap >= (OUTER if rms > LIMIT else OVERLAP)
            found = () if not known else patch.two_colors(shape, p) if style == "flat" else patch.first_color(layers, colors, residual)
            if found or rms > LIMIT or not known:
                names = [color_name(rgb, patch.background if len(found) == 1 else found[1 - i]) for i, rgb in enumerate(found)]
                color, color2 = [*names, None, None][:2]
                rgb, rgb2 = [*(tuple(float(x) for x in c) for c in found), None, None][:2]
                fits[style] = Fit(shape if known else None, color, None, color2, cx, cy, radius, tilt, rgb, rgb2, rms, cost)
                continue
        rgb, rgb2 = [*patch.core_colors(layers, colors), None][:2]
        # What lies beside: the ground for lines, the other colour for a filled pattern.
        beside = [patch.background] * 2 if style == "outline" or rgb2 is None else [rgb2, rgb]
        color, color2 = color_name(rgb, beside[0]), "" if rgb2 is None else color_name(rgb2, beside[1])
        rgb, rgb2 = (None if c is None else tuple(float(x) for x in c) for c in (rgb, rgb2))
        fits[style] = Fit(shape, color, pattern, color2, cx, cy, radius, tilt, rgb, rgb2, rms, cost)
    return fits
