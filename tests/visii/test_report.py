"""Words and pictures of a learning run."""

from dataclasses import replace

import pytest
import torch

from palimpsest.tests.helpers.visii import random_instruction, random_pairs, tiny_edit
from palimpsest.visii.direction import Direction
from palimpsest.visii.learn import Record, Settings
from palimpsest.visii.learn_run import Result
from palimpsest.visii.plot import CHECK, CHOSEN, MEAN, PAPER, STEP, loss_plot, preview_strip, running_mean
from palimpsest.visii.report import describe, information

START = random_instruction()


def result(**changes):
    record = Record(errors=[0.5 / (1 + k) for k in range(30)], checks=[(0, 1.0), (15, 0.8), (30, 0.9)], best=START.tokens, best_step=15)
    given = dict(instruction=START, start=START, settings=Settings(steps=30), record=record, order=list(range(30)), direction=Direction(reason="there is no CLIP_VISION"),
                 pairs=random_pairs(count=2), architecture="SD1.x", seconds=12.3)
    return Result(**{**given, **changes})


def colors(sheet):
    return {tuple(color) for color in (sheet[0].reshape(-1, 3) * 255).round().int().unique(dim=0).tolist()}


def test_the_report_says_what_was_learned_and_how_to_use_it():
    text = describe(result())
    for words in (
        "2 pairs of 128 x 128 px in 30 of 30 steps", "guidance 7.5 (text) and 1.5 (image)", "learning rate 0.001, seed 0",
        'Start: "text 0"; its 5 word positions of 12 were learned',
        "SD1.x, 8 input channels; gradient checkpointing off", "Validation error relative to the start text: 0.900 at the end, 0.800 at its best",
        "smallest error on a fixed validation set, 15 steps made", "Direction loss: off, there is no CLIP_VISION", "12.3 s", "image scale 1.5, a sampler with cfg 7.5",
    ):
        assert words in text, words
    assert text.isascii() and "Note" not in text


def test_the_report_says_what_went_wrong():
    record = replace(result().record, best_step=0, stopped="the loss became NaN or infinite at step 9 of 30 (timestep 3)")
    text = describe(result(record=record))
    assert "given unchanged" in text and "stopped early because the loss became NaN" in text


@pytest.mark.parametrize("weight, words", [(0.1, "0.200 at the start, 0.400 now (weight 0.1)"), (0.0, "not part of the loss")])
def test_the_direction_similarity_is_reported(weight, words):
    assert words in describe(result(alike=(0.2, 0.4), settings=Settings(steps=30, direction_weight=weight)))


def test_what_is_kept_can_be_written_down():
    import json

    kept = information(result(alike=(0.2, 0.4)), "abc:AAA=")
    assert json.loads(json.dumps(kept)) == {**kept, "direction_similarity": [0.2, 0.4]}
    assert kept["model"] == "abc:AAA=" and len(kept["pictures"]) == 4 and len(kept["errors"]) == 30 and kept["text_scale"] == 7.5 and kept["steps"] == 30


def test_the_running_mean():
    assert running_mean([1.0, 3.0, 5.0, 7.0], 2) == pytest.approx([1.0, 2.0, 4.0, 6.0])
    assert running_mean([2.0], 5) == [2.0]


def test_the_plot_shows_every_curve():
    sheet = loss_plot(result())
    assert sheet.shape == (1, 400, 720, 3) and 0 <= float(sheet.min()) and float(sheet.max()) <= 1
    assert {PAPER, STEP, MEAN, CHECK, CHOSEN} <= colors(sheet)
    assert CHECK not in colors(loss_plot(result(record=replace(result().record, checks=[]))))


@pytest.mark.parametrize("errors", [[0.5], [0.0, 0.0], [1e-3] * 3])
def test_runs_of_any_length_can_be_drawn(errors):
    record = Record(errors=errors, best=START.tokens)
    assert torch.isfinite(loss_plot(result(record=record, order=list(range(len(errors)))))).all()


def test_the_strip_shows_the_pair_and_the_previews():
    model = tiny_edit()
    previews = [(made, torch.randn(1, 4, 16, 16)) for made in (10, 20, 15)]
    found = preview_strip(model, None, result(previews=previews))
    alone = preview_strip(model, None, result())
    assert found.shape[1] == alone.shape[1] and found.shape[2] == alone.shape[2] // 2 * 5
    many = preview_strip(model, None, result(previews=previews * 3))
    assert many.shape[1] == 2 * alone.shape[1]
