"""Blending of unconditional and negative prediction."""

import math

import pytest
import torch

from palimpsest.attention_patches.negative import run_position, unconditional_share
from palimpsest.attention_patches.pnp import apply_pnp
from palimpsest.tests.helpers.models import tiny_cond
from palimpsest.tests.helpers.sampling import Watch, ksampler

SIGMAS = torch.tensor([0.0, 1.0, 2.0, 4.0, 8.0])
OFF = dict(feature_layers="", attention_layers="")


@pytest.mark.parametrize("sigma, position", [(8.0, 0.0), (4.0, 1 / 3), (2.0, 2 / 3), (1.0, 1.0), (0.5, 1.0), (14.0, 0.0), (6.0, 1 / 6), (3.0, 1 / 2)])
def test_position_counts_steps(sigma, position):
    assert run_position(sigma, SIGMAS) == pytest.approx(position)


def test_schedules_are_the_published_ones():
    assert [unconditional_share(0.75, "constant", u) for u in (0.0, 0.5, 1.0)] == [0.75, 0.75, 0.75]
    assert [unconditional_share(0.75, "linear", u) for u in (0.0, 0.5, 1.0)] == [0.75, 0.375, 0.0]
    assert [unconditional_share(1.0, "exp", u) for u in (0.0, 0.5, 1.0)] == pytest.approx([1.0, math.exp(-3), math.exp(-6)])


@pytest.fixture(scope="module")
def empty():
    return tiny_cond(seed=20)


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("schedule, alpha", [("constant", 0.6), ("linear", 1.0), ("exp", 0.8)])
def test_guidance_uses_the_blend_at_every_step(model, trajectory, positive, negative, start, empty, schedule, alpha):
    """The textbook formula e~ = a e_uncond + (1 - a) e_negative, with each prediction taken from the plain model."""
    import comfy.samplers

    edited, report = apply_pnp(model, trajectory, negative_schedule=schedule, negative_alpha=alpha, unconditional=empty, **OFF)
    assert schedule in report
    steps = []

    def note(args):
        steps.append((args["input"], float(args["sigma"][0]), args["uncond_denoised"], args["cond_denoised"]))
        return args["denoised"]

    edited.set_model_sampler_post_cfg_function(note)
    ksampler(edited, start, positive, negative)

    def plain(prompt, x, sigma):
        found = []

        def once(denoiser, noise, sigmas, extra_args=None, callback=None, disable=None):
            found.append(denoiser(x, sigma * x.new_ones([1]), **extra_args))
            return noise

        comfy.samplers.sample(model, torch.zeros_like(x), prompt, prompt, 1.0, x.device, comfy.samplers.KSAMPLER(once), torch.tensor([sigma, 0.0]), latent_image=x)
        return found[0]

    with torch.inference_mode():
        for i, (x, sigma, blended, target) in enumerate(steps):
            share = unconditional_share(alpha, schedule, i / 3)
            expected = share * plain(empty, x, sigma) + (1 - share) * plain(negative, x, sigma)
            assert relative(blended, expected) < 1e-5
            assert relative(target, plain(positive, x, sigma)) < 1e-5


def test_alpha_zero_equals_the_plain_negative_bit_for_bit(model, trajectory, positive, negative, start, empty):
    edited, _ = apply_pnp(model, trajectory, negative_schedule="linear", negative_alpha=0.0, unconditional=empty, **OFF)
    assert torch.equal(ksampler(edited, start, positive, negative), ksampler(model, start, positive, negative, disable_noise=True))


def test_without_guidance_nothing_is_blended(model, trajectory, positive, negative, start, empty):
    edited, _ = apply_pnp(model, trajectory, negative_schedule="constant", negative_alpha=1.0, unconditional=empty, **OFF)
    watch = Watch()
    ksampler(watch.on(edited), start, positive, negative, cfg=1.0)
    assert set(watch.calls) == {(1, 2)}, "no third prediction is computed"


def test_the_third_prediction_is_left_out_where_its_share_is_zero(model, trajectory, positive, negative, start, empty):
    edited, _ = apply_pnp(model, trajectory, negative_schedule="linear", negative_alpha=1.0, unconditional=empty, **OFF)
    watch = Watch()
    ksampler(watch.on(edited), start, positive, negative)
    assert watch.calls == [(1, 3), (1, 3), (1, 3), (1, 2)]


def test_works_together_with_the_injection(model, trajectory, positive, negative, start, empty):
    edited, _ = apply_pnp(model, trajectory, negative_schedule="constant", negative_alpha=1.0, unconditional=empty)
    reference, _ = apply_pnp(model, trajectory)
    # share 1 at every step is guidance against the empty prompt
    assert relative(ksampler(edited, start, positive, negative), ksampler(reference, start, positive, empty)) < 1e-4


def test_blending_without_an_unconditional_prompt_is_refused(model, trajectory):
    with pytest.raises(ValueError, match="connect an empty prompt to unconditional"):
        apply_pnp(model, trajectory, negative_schedule="linear")
