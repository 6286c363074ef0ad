"""Words and figures of an inversion."""

import math

import pytest
import torch
from palimpsest.inversion.report import decibel, describe, psnr, refinement_line
from palimpsest.inversion.trajectory import Trajectory

INFO = {
    "steps": 2, "scheduler": "karras", "sigma_min": 0.0, "sigma_max": 14.6, "convention": "destination", "iterations": 2, "model_calls": 6, "seconds": 1.26,
    "noise_std": 0.987, "notes": [], "step_error_plain": 0.02, "step_error_refined": 0.002, "refinement_gain_db": 20.0, "steps_stopped_early": 0,
}


def report(batch=1, **changes):
    return describe(Trajectory(torch.tensor([0.0, 1.0, 14.6]), torch.zeros(3, batch, 4, 8, 6), [], "SDXL", "eps", "a:", info={**INFO, **changes}))


def test_psnr_by_its_definition():
    black = torch.zeros(2, 3)
    assert psnr(black, black + 0.1, peak=1.0) == pytest.approx(20)
    assert psnr(black, black + 0.1, peak=2.0) == pytest.approx(20 + 20 * math.log10(2))
    assert psnr(black, black, peak=1.0) == math.inf


def test_the_peak_of_latents_is_their_range():
    latent = torch.linspace(-3, 5, 9)
    assert psnr(latent, latent + 0.8) == pytest.approx(20)
    assert psnr(torch.ones(4), torch.zeros(4)) == -math.inf, "a constant has no range"


def test_psnr_of_different_shapes_is_refused():
    with pytest.raises(ValueError, match=r"equal shapes, but got \[2\] and \[3\]"):
        psnr(torch.zeros(2), torch.zeros(3))


def test_decibel_in_words():
    assert decibel(math.inf) == "exact" and decibel(31.456) == "31.46 dB" and decibel(-math.inf) == "-inf dB"


def test_the_report_names_what_was_run():
    text = report()
    for words in ("2 steps", "karras", "sigma 0 to 14.6", "destination", "guidance 1", "SDXL", "predicts eps", "1 latent of 6 x 8", "0.987", "1.3 s for 6 model calls"):
        assert words in text, words
    assert "2 latents of" in report(batch=2)


def test_notes_are_sentences_at_the_end():
    assert report(notes=["first", "second"]).splitlines()[-2:] == ["Note: first.", "Note: second."]


@pytest.mark.parametrize(
    "changes, words, absent",
    [
        ({"iterations": 0}, "off", "rms"),
        ({}, "2 repeats per step; a plain step misses on the way back by 2.00e-02 rms, a refined one by at most 2.00e-03 (20.0 dB gained)", "broken off"),
        ({"iterations": 1, "step_error_refined": None, "refinement_gain_db": None}, "1 repeat per step", "gained"),
        ({"steps_stopped_early": 1}, "broken off in 1 of 2 steps", "nothing"),
    ],
)
def test_the_refinement_says_what_was_measured_and_no_more(changes, words, absent):
    line = refinement_line({**INFO, **changes})
    assert words in line and absent not in line
