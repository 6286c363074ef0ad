"""Pictures of a learning run: the loss plot and the strip of previews."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..inversion.filmstrip import strip
from ..inversion.pictures import decode_frames
from .learn_run import Result

SIZE = (720, 400)
MARGIN = (64, 34, 16, 34)  # left, top, right, bottom
PAPER, INK, GRID = (24, 24, 24), (225, 225, 225), (60, 60, 60)
STEP, MEAN, CHECK, CHOSEN = (120, 120, 120), (235, 140, 70), (90, 190, 250), (120, 220, 130)
SMALLEST = 1e-10  # of what a logarithm can show
PER_ROW = 6  # pictures in a row of the strip


def running_mean(values: list[float], width: int) -> list[float]:
    """Mean of each value and the width - 1 before it, of fewer at the start."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    starts = np.maximum(np.arange(len(values)) - width + 1, 0)
    return ((sums[1:] - sums[starts]) / (np.arange(len(values)) - starts + 1)).tolist()


def loss_plot(result: Result) -> Tensor:
    """[1, H, W, 3] in 0..1: each step's squared error, logarithmic, its running mean, the validation error, and the state that was chosen."""
    record, steps = result.record, len(result.order)
    errors = [math.log10(max(value, SMALLEST)) for value in record.errors]
    means = [math.log10(max(value, SMALLEST)) for value in running_mean(record.errors, max(1, steps // 20))]
    # relative to the start, which is drawn at the height of the mean of all steps
    checks = [(made, math.log10(max(value, SMALLEST)) + sum(errors) / len(errors)) for made, value in record.checks]
    values = errors + [value for _, value in checks]
    low, high = math.floor(min(values)), max(math.ceil(max(values)), math.floor(min(values)) + 1)
    left, top, right, bottom = MARGIN
    width, height = SIZE[0] - left - right, SIZE[1] - top - bottom

    def place(step: float, value: float) -> tuple[float, float]:
        return left + width * step / steps, top + height * (high - value) / (high - low)

    sheet = Image.new("RGB", SIZE, PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for power in range(low, high + 1):
        y = place(0, power)[1]
        pen.line([(left, y), (left + width, y)], fill=GRID)
        pen.text((8, y - 6), f"1e{power}", fill=INK, font=font)
    for tick in sorted({round(steps * k / 10) for k in range(11)}):
        pen.text((place(tick, low)[0] - 6, top + height + 4), str(tick), fill=INK, font=font)
    pen.text((left, top + height + 18), "steps", fill=INK, font=font)
    for step, value in enumerate(errors):
        x, y = place(step + 0.5, value)
        pen.ellipse([x - 1, y - 1, x + 1, y + 1], fill=STEP)
    curves = [("squared error of a step (mostly its timestep's)", STEP, []), ("running mean", MEAN, [place(step + 0.5, value) for step, value in enumerate(means)])]
    if checks:
        curves.append(("validation, relative to the start", CHECK, [place(*check) for check in checks]))
    chosen = place(record.best_step, low)[0]
    pen.line([(chosen, top), (chosen, top + height)], fill=CHOSEN)
    curves.append(("chosen", CHOSEN, []))
    x = left
    for name, color, points in curves:
        if len(points) > 1:
            pen.line(points, fill=color, width=2)
        pen.rectangle([x, 14, x + 10, 18], fill=color)
        pen.text((x + 16, 9), name, fill=INK, font=font)
        x += 16 + int(pen.textlength(name, font=font)) + 20
    return torch.from_numpy(np.asarray(sheet).copy()).float()[None] / 255.0


def preview_strip(model, vae, result: Result) -> Tensor:
    """One picture [1, H, W, 3] in 0..1: the first pair before and after, then what the instruction made of it on the way, the result last."""
    pictures = [(result.pairs.before[0], "before"), (result.pairs.after[0], "after")]
    if result.previews:
        decoded = decode_frames(model, [latent for _, latent in result.previews], vae)
        names = [f"step {made}" for made, _ in result.previews[:-1]] + [f"result (step {result.previews[-1][0]})"]
        # a VAE gives whole blocks of 8 pixels only
        size = pictures[0][0].shape[:2]
        pictures += [(fitted(picture, size), name) for picture, name in zip(decoded, names)]
    return strip([pictures[start : start + PER_ROW] for start in range(0, len(pictures), PER_ROW)])


def fitted(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """A picture [h, w, 3] scaled to (H, W)."""
    if picture.shape[:2] == size:
        return picture
    return torch.nn.functional.interpolate(picture.movedim(-1, 0)[None], size=size, mode="bilinear", align_corners=False)[0].movedim(0, -1)
