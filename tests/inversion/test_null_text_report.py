"""Words and picture of a null-text optimisation."""

import dataclasses
import math

import pytest
import torch

from palimpsest.inversion.null_text import NullStep, Settings
from palimpsest.inversion.null_text_report import AFTER, BEFORE, PAPER, describe, plot
from palimpsest.inversion.null_text_run import NullText
from palimpsest.inversion.trajectory import Trajectory

BEFORE_LOSSES, AFTER_LOSSES = [1e-3, 4e-3, 9e-3], [1e-5, 5e-5, 2e-5]


def result(batch=1, off=(0.4, 0.1), before=BEFORE_LOSSES, after=AFTER_LOSSES, **changes):
    """off: distance of the last latents before and after from the clean one, whose range is 4."""
    clean = torch.linspace(-2, 2, 48).view(1, 1, 4, 4, 3).expand(1, batch, 4, 4, 3)
    path = Trajectory(torch.tensor([0.0, 1.0, 5.0, 14.6]), clean.repeat(4, 1, 1, 1, 1), [], "SD1.x", "v_prediction", "a:", info={"scheduler": "karras"})
    path = dataclasses.replace(path, **changes)

    def steps(values, distance, inner):
        return [
            NullStep(index, torch.zeros(batch, 2, 3), clean[0] + distance, clean[0], torch.full((batch,), loss), torch.full((batch,), inner))
            for index, loss in enumerate(values)
        ]

    return NullText([], path, Settings(), steps(after, off[1], 7), steps(before, off[0], 0), True, 12.34)


def test_the_report_says_what_was_done():
    text = describe(result())
    for words in (
        "3 steps at guidance 7.5, 21 trainings (at most 30)", "SD1.x, predicts v_prediction; gradient checkpointing on", "12.3 s", "cfg 7.5", "(karras)",
        "before: smallest 1.00e-03, median 4.00e-03, largest 9.00e-03", "after: smallest 1.00e-05, median 2.00e-05, largest 5.00e-05",
        "20.00 dB before, 32.04 dB after",
    ):
        assert words in text, words
    assert "each" not in text and "Note" not in text


def test_each_picture_of_a_batch_has_its_figure():
    text = describe(result(batch=2))
    assert "42 trainings (at most 60)" in text and "PSNR of each after: 32.04 dB, 32.04 dB" in text


def test_what_is_unusual_is_noted():
    assert "made with guidance 3; the method expects 1" in describe(result(guidance=3.0))
    assert "control; connect positive" in describe(result(info={"left_out": ["control"]}))


def rows_of(picture, color):
    """Mean height in the picture (0 is the top) of the pixels of a color, right of the legend's swatches."""
    found = (picture - torch.tensor(color) / 255).abs().amax(-1) < 0.01
    found[:30] = False
    return float(found.nonzero()[:, 0].float().mean())


def test_the_plot_shows_both_runs_per_picture():
    found = plot(result(batch=2))
    assert found.shape[0] == 2 and found.shape[-1] == 3 and 0 <= found.min() and found.max() <= 1
    assert torch.allclose(found[0, 0, 0], torch.tensor(PAPER) / 255)
    assert rows_of(found[0], BEFORE) < rows_of(found[0], AFTER) - 20, "the larger loss is higher up"
    assert torch.equal(found[0], found[1])
    swapped = plot(result(before=AFTER_LOSSES, after=BEFORE_LOSSES))
    assert rows_of(swapped[0], BEFORE) > rows_of(swapped[0], AFTER) + 20


def test_the_scale_is_logarithmic():
    """A ten times smaller loss lies as far below as a hundred times smaller one below that."""
    heights = [rows_of(plot(result(before=[1e-1] * 3, after=[value] * 3))[0], AFTER) for value in (1e-2, 1e-3, 1e-4)]
    top = rows_of(plot(result(before=[1e-1] * 3, after=[1e-4] * 3))[0], BEFORE)
    assert heights == sorted(heights) and top < heights[0]


@pytest.mark.parametrize("after", [[0.0, 0.0, 0.0], [1e-3, 1e-3, 1e-3], [1e30, 1.0, 1e-30]])
def test_any_loss_can_be_drawn(after):
    found = plot(result(after=after))
    assert torch.isfinite(found).all() and math.isfinite(rows_of(found[0], AFTER))


def test_one_step_and_many_can_be_drawn():
    for count in (1, 200):
        assert plot(result(before=[1e-2] * count, after=[1e-3] * count)).shape == plot(result()).shape
