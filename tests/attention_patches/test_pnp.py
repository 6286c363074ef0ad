"""Plug-and-Play's windows and its refusals."""

import math

import pytest
import torch

from palimpsest.attention_patches.pnp import apply_pnp, in_window, step_count, window_floor
from palimpsest.tests.helpers.models import tiny_cond, tiny_sd2, tiny_sd15, tiny_trajectory
from palimpsest.tests.helpers.sampling import ksampler


def levels(steps):
    """An ascending schedule of `steps` steps with a clean end."""
    return torch.linspace(0.0, 10.0, steps + 1)


@pytest.mark.parametrize(
    "steps, fraction, count",
    [(50, 0.8, 40), (50, 0.5, 25), (20, 0.8, 16), (4, 0.2, 0), (4, 0.5, 2), (7, 1.0, 7), (7, 0.0, 0), (100, 0.29, 29), (50, 0.58, 29), (3, 0.99, 2)],
)
def test_a_fraction_means_the_first_whole_steps(steps, fraction, count):
    sigmas = levels(steps)
    assert step_count(sigmas, fraction) == count
    floor = window_floor(sigmas, fraction)
    assert sum(in_window(float(sigma), floor) for sigma in sigmas[1:]) == count


def test_the_window_is_a_threshold_between_steps_too():
    sigmas = levels(10)
    floor = window_floor(sigmas, 0.3)  # 10, 9, 8 are active, 7 is the first that is not
    assert floor == 7.0
    assert in_window(12.0, floor) and in_window(7.5, floor)
    assert not in_window(7.0, floor) and not in_window(7.0 * (1 + 2e-5), floor)
    assert in_window(0.01, window_floor(sigmas, 1.0)) and window_floor(sigmas, 0.0) == math.inf


def refusal(message, model, trajectory, **settings):
    with pytest.raises(ValueError, match=message) as error:
        apply_pnp(model, trajectory, **settings)
    text = str(error.value)
    assert "\n" not in text and text.endswith(".") and ". " not in text.rstrip(".").replace("1.x", "").replace("2.x", "")


def test_wrong_pairings_are_refused_in_one_sentence(model, trajectory):
    refusal("made with an SD1.x model, but an SD2.x model is connected", tiny_sd2(), trajectory)
    refusal("another SD1.x model", tiny_sd15(seed=5, channel_mult=(1, 1, 1, 1)), trajectory)
    refusal("predicts", tiny_sd15(prediction="v_prediction", channel_mult=(1, 1, 1, 1)), trajectory)
    refusal("for SDXL, but the connected model is SD1.x", model, trajectory, attention_layers="preset ctrl-x")
    refusal("that layer of this SD1.x model has 1", model, trajectory, attention_layers="u1.0-9")


def test_wrong_conditioning_is_refused(model, trajectory):
    refusal("source conditioning has 2048 values per token, but the connected model wants 768", model, trajectory, conditioning=tiny_cond(dim=2048))
    refusal("limited to an area or a mask", model, trajectory, conditioning=[[torch.zeros(1, 77, 768), {"area": (8, 8, 0, 0)}]])
    refusal("source conditioning carries hooks", model, trajectory, conditioning=[[torch.zeros(1, 77, 768), {"hooks": object()}]])
    refusal("source conditioning is empty", model, trajectory, conditioning=[])
    refusal("connect the prompt of the source picture", model, tiny_trajectory(model, cond=[]))


@pytest.mark.parametrize("settings, message", [(dict(tau_f=1.5), "tau_f is a fraction"), (dict(tau_a=-0.1), "tau_A is a fraction"), (dict(tau_f=math.nan), "tau_f is a fraction")])
def test_fractions_outside_the_run_are_refused(model, trajectory, settings, message):
    refusal(message, model, trajectory, **settings)


def test_the_source_entry_without_area_is_used(model, trajectory, positive, negative, start):
    alone = tiny_cond(seed=7)
    both = [[torch.zeros(1, 77, 768), {"area": (8, 8, 0, 0)}], *alone]
    edited, report = apply_pnp(model, trajectory, conditioning=both)
    expected, plain_report = apply_pnp(model, trajectory, conditioning=alone)
    assert torch.equal(ksampler(edited, start, positive, negative), ksampler(expected, start, positive, negative))
    assert "the first of 1 usable ones that is active at the step (of 2 connected)" in report
    assert "source:" not in plain_report


def test_the_report_says_what_is_done(model, trajectory, caplog):
    _, report = apply_pnp(model, trajectory)
    assert report.splitlines() == [
        "model: SD1.x",
        "features: output4; first 3 of 4 steps",
        "self-attention: output4, output5, output6, output7, output8, output9, output10, output11; first 2 of 4 steps",
    ]
    with caplog.at_level("INFO", logger="palimpsest"):
        _, report = apply_pnp(model, trajectory, tau_f=0.1, tau_a=0.0)
    assert "no effect" in report and any("no effect" in line for line in caplog.messages)
