"""Words and figures of an inversion: text reports, PSNR."""

from __future__ import annotations

import math

from torch import Tensor

from .trajectory import Trajectory


def psnr(reference: Tensor, other: Tensor, peak: float | None = None) -> float:
    """Peak signal-to-noise ratio in dB, 10 log10(peak^2 / mse), over all values of two tensors of one shape.

    peak: 1 for pictures in 0..1; for latents, whose range has no bounds, the default is max - min of the
    reference. Infinite for identical tensors. Raises ValueError for different shapes.
    """
    if reference.shape != other.shape:
        raise ValueError(f"PSNR compares equal shapes, but got {list(reference.shape)} and {list(other.shape)}.")
    reference, other = reference.double(), other.double()
    mse = float((reference - other).square().mean())
    peak = float(reference.max() - reference.min()) if peak is None else peak
    if mse == 0.0:
        return math.inf
    return 10.0 * math.log10(peak * peak / mse) if peak > 0 else -math.inf


def decibel(value: float) -> str:
    """dB for people; "exact" when nothing differs."""
    return "exact" if math.isinf(value) and value > 0 else f"{value:.2f} dB"


def describe(trajectory: Trajectory) -> str:
    """The report of an inversion, a few lines of plain text."""
    info = trajectory.info
    batch, _, height, width = trajectory.latents.shape[1:]
    lines = [
        f"DDIM inversion: {info['steps']} steps, {info['scheduler']}, sigma {info['sigma_min']:.4g} to {info['sigma_max']:.4g}, "
        f"{info['convention']} convention, guidance {trajectory.guidance:g}",
        f"Model: {trajectory.architecture}, predicts {trajectory.prediction}; {batch} latent{'s' if batch > 1 else ''} of {width} x {height}",
        refinement_line(info),
        f"Noise: standard deviation {info['noise_std']:.3f} (1 is white noise; less means that structure of the picture is left in it)",
        f"Time: {info['seconds']:.1f} s for {info['model_calls']} model calls",
    ]
    lines += [f"Note: {note}." for note in info["notes"]]
    return "\n".join(lines)


def refinement_line(info: dict) -> str:
    """What the fixed-point repeats did, in words; info: a trajectory's, with the keys of `run.refinement_figures`, iterations and steps."""
    iterations = info["iterations"]
    if iterations == 0:
        return "Refinement: off (plain DDIM inversion)"
    text = f"Refinement: {iterations} repeat{'s' if iterations > 1 else ''} per step; a plain step misses on the way back by {info['step_error_plain']:.2e} rms"
    if info["step_error_refined"] is not None:
        text += f", a refined one by at most {info['step_error_refined']:.2e}"
    if info["refinement_gain_db"] is not None:
        text += f" ({info['refinement_gain_db']:.1f} dB gained)"
    if info["steps_stopped_early"]:
        text += f"; broken off in {info['steps_stopped_early']} of {info['steps']} steps because the correction grew"
    return text
