"""Prompts that change from step to step, as plain CONDITIONING: one range of the run per step."""

from __future__ import annotations

from torch import Tensor


def _percent_between(model_sampling, low: float, high: float) -> float | None:
    """A percent (0 to 1) whose noise level lies strictly between `low` and `high`, nearest to their middle; None where there is none.

    The host turns percents into noise levels by model_sampling.percent_to_sigma, which falls but has no inverse and is a
    staircase in float32, so this bisects in float64.
    """
    middle = (low + high) / 2
    above, below = 0.0, 1.0  # the host maps these to "all" and 0, whatever the model
    for _ in range(80):
        percent = (above + below) / 2
        if float(model_sampling.percent_to_sigma(percent)) > middle:
            above = percent
        else:
            below = percent
    found = []
    for percent in (above, below):
        sigma = float(model_sampling.percent_to_sigma(percent))
        if 0.0 < percent < 1.0 and low < sigma < high:
            found.append((abs(sigma - middle), percent))
    return min(found)[1] if found else None


def step_ranges(model_sampling, sigmas: Tensor) -> list[tuple[float, float]]:
    """(start_percent, end_percent) of each step of a run over `sigmas` [N + 1], descending: N ranges that tile 0 to 1.

    The model is asked at sigmas[0] to sigmas[N - 1]; range i holds at sigmas[i] and at no other of them. Borders lie midway
    between two levels, never on one, because the host counts an entry as active on both of its ends. So a sampler between
    these levels also meets exactly one entry. Raises ValueError, one sentence, where the model's percents cannot tell two
    levels apart.
    """
    levels = [float(sigma) for sigma in sigmas[:-1]]
    borders = [0.0]
    for high, low in zip(levels, levels[1:]):
        percent = _percent_between(model_sampling, low, high)
        if percent is None or percent <= borders[-1]:
            raise ValueError(
                f"The noise levels {high:.5g} and {low:.5g} of the trajectory cannot be told apart by start and end percent with this model, whose own "
                f"levels run from {float(model_sampling.sigma_min):.5g} to {float(model_sampling.sigma_max):.5g}: invert with one of its schedulers."
            )
        borders.append(percent)
    borders.append(1.0)
    return list(zip(borders, borders[1:]))
