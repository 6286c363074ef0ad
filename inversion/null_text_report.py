"""Words and a picture of a null-text optimisation."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .null_text import stop_at
from .null_text_run import NullText
from .report import decibel, psnr

SIZE = (720, 400)
MARGIN = (64, 34, 16, 34)  # left, top, right, bottom
PAPER, INK, GRID = (24, 24, 24), (225, 225, 225), (60, 60, 60)
BEFORE, AFTER, STOP = (235, 140, 70), (90, 190, 250), (130, 130, 130)
SMALLEST = 1e-10  # of what a logarithm can show


def losses(steps: list) -> Tensor:
    """[N, B] loss after each step."""
    return torch.stack([step.loss for step in steps])


def describe(result: NullText) -> str:
    """The report of a null-text optimisation, a few lines of plain text."""
    path, settings = result.trajectory, result.settings
    batch = path.latents.shape[1]
    inner = torch.stack([step.inner for step in result.steps])
    clean = path.latents[0]
    before, after = result.before[-1].latent, result.steps[-1].latent
    lines = [
        f"Null-text optimisation: {path.steps} steps at guidance {settings.guidance:g}, {int(inner.sum())} trainings (at most {inner.numel() * settings.inner_steps})",
        f"Model: {path.architecture}, predicts {path.prediction}; gradient checkpointing {'on' if result.checkpointing else 'off'}",
        _loss_line("Loss per step before", losses(result.before)),
        _loss_line("Loss per step after", losses(result.steps)),
        f"Reconstruction under guidance: {decibel(psnr(clean, before))} before, {decibel(psnr(clean, after))} after (PSNR of the latent, peak = its range)",
    ]
    if batch > 1:
        lines.append("PSNR of each after: " + ", ".join(decibel(psnr(a, b)) for a, b in zip(clean, after)))
    lines.append(f"Time: {result.seconds:.1f} s")
    lines.append(
        f"Use: negative of a sampler with cfg {settings.guidance:g}, euler or ddim, no added noise, and the inversion's steps and scheduler "
        f"({path.info.get('scheduler', 'its own')}); it belongs to this picture, prompt and model"
    )
    if path.guidance != 1.0:
        lines.append(f"Note: the inversion was made with guidance {path.guidance:g}; the method expects 1.")
    if left_out := path.info.get("left_out"):
        lines.append(f"Note: the trajectory's file does not hold the conditioning's {', '.join(left_out)}; connect positive to use them.")
    return "\n".join(lines)


def _loss_line(name: str, values: Tensor) -> str:
    values = values.flatten()
    return f"{name}: smallest {float(values.min()):.2e}, median {float(values.median()):.2e}, largest {float(values.max()):.2e} (mean squared error of the latent)"


def plot(result: NullText) -> Tensor:
    """One picture per latent, [B, H, W, 3] in 0..1: the loss after each step, before and after training, on a logarithmic scale."""
    before, after = losses(result.before), losses(result.steps)
    stops = torch.tensor([stop_at(index, result.settings.early_stop) for index in range(len(after))])
    return torch.cat([_draw(before[:, row], after[:, row], stops) for row in range(after.shape[1])])


def _draw(before: Tensor, after: Tensor, stops: Tensor) -> Tensor:
    curves = [("good enough (early stop)", STOP, stops), ("guided, empty prompt as it is", BEFORE, before), ("guided, optimised", AFTER, after)]
    # a perfect step has no place on a logarithmic scale
    curves = [(name, color, [math.log10(max(value, SMALLEST)) for value in values.tolist()]) for name, color, values in curves]
    values = [value for _, _, curve in curves for value in curve]
    low, high = math.floor(min(values)), max(math.ceil(max(values)), math.floor(min(values)) + 1)
    left, top, right, bottom = MARGIN
    width, height = SIZE[0] - left - right, SIZE[1] - top - bottom
    count = len(after)

    def place(index: float, value: float) -> tuple[float, float]:
        return left + width * (index + 0.5) / count, top + height * (high - value) / (high - low)

    sheet = Image.new("RGB", SIZE, PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for power in range(low, high + 1):
        y = place(0, power)[1]
        pen.line([(left, y), (left + width, y)], fill=GRID)
        pen.text((8, y - 6), f"1e{power}", fill=INK, font=font)
    every = max(1, math.ceil(count / 20))
    for index in range(0, count, every):
        pen.text((place(index, low)[0] - 4, top + height + 4), str(index + 1), fill=INK, font=font)
    pen.text((left, top + height + 18), "step, from noise to picture", fill=INK, font=font)
    x = left
    for name, color, curve in curves:
        points = [place(index, value) for index, value in enumerate(curve)]
        pen.line(points, fill=color, width=2)
        for point in points if color != STOP else []:
            pen.ellipse([point[0] - 2, point[1] - 2, point[0] + 2, point[1] + 2], fill=color)
        pen.rectangle([x, 14, x + 10, 18], fill=color)
        pen.text((x + 16, 9), name, fill=INK, font=font)
        x += 16 + int(pen.textlength(name, font=font)) + 24
    return torch.from_numpy(np.asarray(sheet).copy()).float()[None] / 255.0
