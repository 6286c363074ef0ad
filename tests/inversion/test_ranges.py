"""Prompts per step: exactly one is active at every call of a stock sampler."""

import comfy.patcher_extension
import comfy.samplers
import pytest
import torch

from palimpsest.inversion.ranges import step_ranges
from palimpsest.tests.helpers.models import tiny_cond, tiny_sd15
from palimpsest.tests.helpers.sampling import ksampler

TAG = "step_of_the_test"
MODELS = {}


def model_of(prediction):
    """A model whose network is not run: only its noise levels matter."""
    if prediction not in MODELS:
        model = tiny_sd15(channel_mult=(1, 1, 1, 1), prediction=prediction)
        model.set_model_unet_function_wrapper(lambda apply_model, parameters: 0.5 * parameters["input"])
        MODELS[prediction] = model
    return MODELS[prediction]


def active_entries(model, conditioning, **settings):
    """Steps' numbers of the negative's active entries, per call of the sampler."""
    seen = []

    def note(executor, base, conds, x, timestep, *args, **kwargs):
        found = [entry[TAG] for entry in conds[1] if comfy.samplers.get_area_and_mult(entry, x, timestep) is not None]
        seen.append(found)
        return executor(base, conds, x, timestep, *args, **kwargs)

    watched = model.clone()
    watched.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, "note", note)
    ksampler(watched, torch.zeros(1, 4, 8, 8), tiny_cond(), conditioning, cfg=7.5, **settings)
    return seen


def per_step(model, scheduler, steps):
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)
    ranges = step_ranges(model.get_model_object("model_sampling"), sigmas)
    tokens = tiny_cond()[0][0]
    return [[tokens, {"start_percent": first, "end_percent": last, TAG: index}] for index, (first, last) in enumerate(ranges)]


@pytest.mark.parametrize("prediction", ["eps", "edm"])
@pytest.mark.parametrize("steps", [10, 20])
@pytest.mark.parametrize("scheduler", comfy.samplers.SCHEDULER_NAMES)
def test_euler_meets_its_own_entry_at_every_step(prediction, scheduler, steps):
    model = model_of(prediction)
    conditioning = per_step(model, scheduler, steps)
    assert active_entries(model, conditioning, scheduler=scheduler, steps=steps) == [[index] for index in range(len(conditioning))]


@pytest.mark.parametrize("scheduler", ["normal", "karras", "ddim_uniform"])
@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_2m", "dpmpp_sde", "uni_pc", "lms"])
def test_other_samplers_meet_exactly_one(sampler, scheduler):
    """They also ask between the levels, or start on another one."""
    model = model_of("eps")
    seen = active_entries(model, per_step(model, scheduler, 10), scheduler=scheduler, steps=10, sampler=sampler)
    assert seen and all(len(found) == 1 for found in seen)


@pytest.mark.parametrize("steps", [7, 33])
def test_other_step_counts_meet_exactly_one_and_in_order(steps):
    model = model_of("eps")
    seen = active_entries(model, per_step(model, "normal", 10), scheduler="normal", steps=steps)
    assert all(len(found) == 1 for found in seen) and seen == sorted(seen)


def test_ranges_tile_the_run_and_borders_lie_between_levels():
    sampling = model_of("eps").get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "karras", 12)
    ranges = step_ranges(sampling, sigmas)
    assert len(ranges) == 12 and ranges[0][0] == 0.0 and ranges[-1][1] == 1.0
    for (_, end), (start, _), high, low in zip(ranges, ranges[1:], sigmas, sigmas[1:]):
        assert start == end
        assert sampling.percent_to_sigma(end) == pytest.approx(float(high + low) / 2, rel=1e-4), "midway"


def test_one_step_is_the_whole_run():
    assert step_ranges(model_of("eps").get_model_object("model_sampling"), torch.tensor([14.6, 0.0])) == [(0.0, 1.0)]


def test_a_schedule_that_ends_above_zero():
    sampling = model_of("eps").get_model_object("model_sampling")
    assert len(step_ranges(sampling, torch.tensor([14.6, 3.0, 1.0]))) == 2


@pytest.mark.parametrize("levels", [[1.0, 0.02, 0.01, 0.0], [40.0, 30.0, 1.0, 0.0]])
def test_levels_that_percents_cannot_tell_apart_are_one_sentence(levels):
    """The host's percents reach from the model's smallest level to its largest."""
    with pytest.raises(ValueError, match="cannot be told apart") as refused:
        step_ranges(model_of("eps").get_model_object("model_sampling"), torch.tensor(levels))
    assert str(refused.value).endswith(".") and "\n" not in str(refused.value)
