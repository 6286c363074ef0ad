"""The image scale beside the sampler's cfg: what is evaluated, when, and what comes out."""

import logging

import pytest
import torch

from palimpsest.instruct_pix2pix.guidance import add_image_guidance
from palimpsest.tests.helpers.instruct_pix2pix import Calls, edit_cond, explicit, picture_latent, relative, tiny_edit, tiny_edit_xl
from palimpsest.tests.helpers.sampling import custom_advanced, ksampler, latent_noise, no_free_memory, schedule


def steps_of(model):
    """A clone that notes (x, sigma, denoised) of each step."""
    seen, clone = [], model.clone()

    def note(args):
        seen.append((args["input"], float(args["sigma"][0]), args["denoised"]))
        return args["denoised"]

    clone.set_model_sampler_post_cfg_function(note)
    return clone, seen


@pytest.mark.parametrize("batch, size", [(1, (16, 16)), (2, (16, 24)), (3, (16, 16))])
@torch.inference_mode()
def test_every_step_is_the_papers_equation(model, batch, size):
    picture = picture_latent(batch, *size)
    positive, negative = edit_cond(picture, seed=1), edit_cond(picture, seed=2)
    noted, seen = steps_of(add_image_guidance(model, 1.7))
    ksampler(noted, torch.zeros(batch, 4, *size), positive, negative, cfg=5.0, sampler="euler_ancestral")
    assert len(seen) == 4
    for x, sigma, denoised in seen:
        assert relative(denoised, explicit(model, x, sigma, (positive[0][0], None), (negative[0][0], None), 1.7, 5.0, picture)) <= 1e-5


@pytest.mark.parametrize("cosxl", [False, True])
@torch.inference_mode()
def test_sdxl_shaped_edit_models(cosxl):
    import comfy.latent_formats

    model, picture = tiny_edit_xl(cosxl=cosxl), picture_latent(2)
    positive, negative = (edit_cond(picture, seed=seed, dim=2048, pooled=1280) for seed in (1, 2))
    noted, seen = steps_of(add_image_guidance(model, 1.5))
    ksampler(noted, torch.zeros(2, 4, 16, 16), positive, negative, cfg=4.0, steps=3)
    shown = comfy.latent_formats.SDXL().process_in(picture) if cosxl else picture
    prompts = [(cond[0][0], cond[0][1]["pooled_output"]) for cond in (positive, negative)]
    assert len(seen) == 3
    for x, sigma, denoised in seen:
        assert relative(denoised, explicit(model, x, sigma, *prompts, 1.5, 4.0, shown)) <= 1e-5


def test_scale_one_is_the_plain_host_bit_for_bit_and_as_fast(model, positive, negative, start):
    plain = ksampler(model, start, positive, negative)
    calls = Calls()
    same = ksampler(calls.on(add_image_guidance(model, 1.0)), start, positive, negative)
    assert torch.equal(same, plain) and all(sorted(rows) == [0, 1] for rows in calls.rows)
    assert torch.equal(ksampler(add_image_guidance(model, 1.0), start, positive, negative, cfg=1.0), ksampler(model, start, positive, negative, cfg=1.0))
    # a scale of 1 also takes an earlier node's away
    assert torch.equal(ksampler(add_image_guidance(add_image_guidance(model, 1.5), 1.0), start, positive, negative), plain)


def test_the_third_prediction_rides_in_the_same_call(model, positive, negative, start):
    calls = Calls()
    ksampler(calls.on(add_image_guidance(model)), start, positive, negative)
    assert calls.lists == [(True, True, True)] * 4 and len(calls.rows) == 4 and all(sorted(rows) == [0, 1, 2] for rows in calls.rows)


def test_plain_edited_plain_again_and_queued_twice(model, positive, negative, start):
    plain = ksampler(model, start, positive, negative)
    guided = add_image_guidance(model)
    first = ksampler(guided, start, positive, negative)
    assert relative(first, plain) > 1e-3
    assert torch.equal(ksampler(guided, start, positive, negative), first) and torch.equal(ksampler(model, start, positive, negative), plain)
    assert torch.equal(ksampler(guided.clone(), start, positive, negative), first)


def test_the_last_node_counts(model, positive, negative, start):
    twice = add_image_guidance(add_image_guidance(model, 3.0), 1.5)
    assert torch.equal(ksampler(twice, start, positive, negative), ksampler(add_image_guidance(model, 1.5), start, positive, negative))


def test_cancel_then_queue_again(model, positive, negative, start):
    import comfy.model_management as mm

    guided = add_image_guidance(model)
    expected = ksampler(guided, start, positive, negative)
    for cancelled in (1, 3):
        def stop(args, left=[cancelled]):  # noqa: B006 (counts down)
            left[0] -= 1
            if left[0] == 0:
                raise mm.InterruptProcessingException()
            return args["denoised"]

        stopping = guided.clone()
        stopping.set_model_sampler_post_cfg_function(stop)
        with pytest.raises(mm.InterruptProcessingException):
            ksampler(stopping, start, positive, negative)
        assert torch.equal(ksampler(guided, start, positive, negative), expected)


def test_split_calls_and_split_batches(model, monkeypatch):
    picture, start = picture_latent(2), torch.zeros(2, 4, 16, 16)
    positive, negative = edit_cond(picture, seed=1), edit_cond(picture, seed=2)
    guided = add_image_guidance(model)
    joint = ksampler(guided, start, positive, negative)
    no_free_memory(monkeypatch)
    calls = Calls()
    assert relative(ksampler(calls.on(guided), start, positive, negative), joint) < 1e-4
    assert len(calls.rows) == 12 and all(len(rows) == 1 for rows in calls.rows)


@pytest.mark.parametrize("pictures", [1, 2])
def test_one_picture_for_all_latents_or_one_each(model, pictures):
    picture = picture_latent(pictures)
    positive, negative = edit_cond(picture, seed=1), edit_cond(picture, seed=2)
    noise = latent_noise(2, 4, 16, 16, seed=4)
    sigmas = schedule(model, 3)
    both = custom_advanced(add_image_guidance(model), torch.zeros(2, 4, 16, 16), positive, negative, sigmas, noise=noise)
    for i in range(2):
        own = picture[i % pictures : i % pictures + 1]
        alone = custom_advanced(
            add_image_guidance(model), torch.zeros(1, 4, 16, 16), edit_cond(own, seed=1), edit_cond(own, seed=2), sigmas, noise=noise[i : i + 1])
        assert relative(both[i : i + 1], alone) < 1e-4


def test_start_and_end_are_a_window_of_noise_levels(model, positive, negative, start):
    sampling = model.get_model_object("model_sampling")
    noted, seen = steps_of(add_image_guidance(model, 2.0, 0.3, 0.7))
    calls = Calls()
    ksampler(calls.on(noted), start, positive, negative, steps=8)
    inside = [float(sampling.percent_to_sigma(0.7)) <= sigma <= float(sampling.percent_to_sigma(0.3)) for _, sigma, _ in seen]
    assert any(inside) and not inside[0] and not inside[-1]
    assert [len(lists) for lists in calls.lists] == [3 if acts else 2 for acts in inside]
    with torch.inference_mode():
        for (x, sigma, denoised), acts in zip(seen, inside):
            expected = explicit(model, x, sigma, (positive[0][0], None), (negative[0][0], None), 2.0 if acts else 1.0, 4.0, positive[0][1]["concat_latent_image"])
            assert relative(denoised, expected) <= 1e-5


def test_a_schedule_of_two_nodes_samplers_is_one_run(model, positive, negative, start):
    """KSamplerAdvanced in two halves: the window is one of noise levels, not of steps."""
    guided = add_image_guidance(model, 2.0, 0.2, 0.6)
    whole = ksampler(guided, start, positive, negative, steps=6)
    half = ksampler(guided, start, positive, negative, steps=6, start_step=0, last_step=3)
    rest = ksampler(guided, half, positive, negative, steps=6, start_step=3, last_step=6, disable_noise=True)
    assert relative(rest, whole) < 1e-4


def test_a_negative_without_a_picture_takes_the_positives(model, positive, negative, start, caplog):
    bare = [[negative[0][0], {}]]
    guided = add_image_guidance(model)
    expected = ksampler(guided, start, positive, negative)
    with caplog.at_level(logging.INFO, "palimpsest"):
        assert torch.equal(ksampler(guided, start, positive, bare), expected)
    # the host may warn of the models of earlier tests meanwhile, when its count of them comes by
    assert [record.message for record in caplog.records if record.name == "palimpsest"] == ["Palimpsest: the negative carries no picture and gets the positive's."]
    assert torch.equal(ksampler(guided, start, [[positive[0][0], {}]], negative), expected)


@pytest.mark.parametrize("separate", ["auto", "on"])
def test_cfg_one_keeps_the_picture(model, positive, negative, start, separate):
    """The host leaves the negative out at cfg 1: the image scale would be gone with it."""
    noted, seen = steps_of(add_image_guidance(model, 1.5, separate=separate))
    out = ksampler(noted, start, positive, negative, cfg=1.0)
    assert relative(out, ksampler(model, start, positive, negative, cfg=1.0)) > 1e-3
    x, sigma, denoised = seen[0]
    with torch.inference_mode():
        expected = explicit(model, x, sigma, (positive[0][0], None), (negative[0][0], None), 1.5, 1.0, positive[0][1]["concat_latent_image"])
    assert relative(denoised, expected) <= 1e-5


def test_no_picture_is_an_error(model, start):
    with pytest.raises(ValueError, match="Neither the positive nor the negative carries a picture.*InstructPix2Pix Conditioning") as error:
        ksampler(add_image_guidance(model), start, edit_cond(None, seed=1), edit_cond(None, seed=2))
    assert str(error.value).count(".") == 1 and "\n" not in str(error.value)


def test_no_negative_is_one_warning(model, positive, start, caplog):
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(add_image_guidance(model))
    guider.inner_set_conds({"positive": positive})  # as BasicGuider does
    with torch.inference_mode():
        out = guider.sample(latent_noise(1, 4, 16, 16), start, comfy.samplers.sampler_object("euler"), schedule(model, 3), disable_pbar=True, seed=1)
    assert torch.isfinite(out).all()
    assert [record.message for record in caplog.records if record.name == "palimpsest"] == [
        "Palimpsest: there is no negative, so the image scale of InstructPix2Pix CFG has no effect."]


def test_three_prompts_pass_through_with_one_warning(model, positive, negative, caplog):
    """DualCFGGuider has the paper's equation of its own: the node must not act on top of it."""
    from palimpsest.tests.helpers.instruct_pix2pix import dual_cfg

    bare = [[negative[0][0], {}]]
    plain = dual_cfg(model, positive, negative, bare, 5.0, 1.5)
    assert torch.equal(dual_cfg(add_image_guidance(model, 2.0), positive, negative, bare, 5.0, 1.5), plain)
    assert len([record for record in caplog.records if "DualCFGGuider" in record.message]) == 1


def test_dual_cfg_guider_with_the_third_conditioning_gives_the_same_picture(model, positive, negative):
    from palimpsest.tests.helpers.instruct_pix2pix import dual_cfg

    bare = [[negative[0][0], {}]]
    noise = latent_noise(1, 4, 16, 16, seed=4)
    ours = custom_advanced(add_image_guidance(model, 1.5), torch.zeros(1, 4, 16, 16), positive, negative, schedule(model, 3), cfg=5.0, noise=noise)
    assert relative(dual_cfg(model, positive, negative, bare, 5.0, 1.5), ours) < 1e-4


def test_a_window_without_a_step_says_so(model, positive, negative, start, caplog):
    out = ksampler(add_image_guidance(model, 1.5, 0.98, 0.99), start, positive, negative)
    assert torch.equal(out, ksampler(model, start, positive, negative))
    assert [r.message for r in caplog.records if r.name == "palimpsest"] == [
        "Palimpsest: no step of this run lies between its start and its end, so the image scale of InstructPix2Pix CFG has no effect."]


@pytest.mark.parametrize("settings, words", [
    (dict(start=0.8, end=0.2), "which is never"), (dict(scale=float("nan")), "set it to a number"), (dict(separate="both"), "no separate call both")])
def test_settings_that_mean_nothing_are_refused(model, settings, words):
    with pytest.raises(ValueError, match=words):
        add_image_guidance(model, **settings)


def test_reduced_precision(positive, negative, start):
    out = ksampler(add_image_guidance(tiny_edit(dtype=torch.bfloat16)), start, positive, negative)
    assert out.dtype == torch.float32 and torch.isfinite(out).all()
