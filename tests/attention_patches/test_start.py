"""Where a run starts: all stock samplers agree, and schedules that do not belong to the start are refused."""

from types import SimpleNamespace

import pytest
import torch

from palimpsest.attention_patches.pnp import apply_pnp
from palimpsest.attention_patches.start import near_top, prepare_start
from palimpsest.inversion.trajectory import clean_latent, sampler_to_latent, start_latent
from palimpsest.tests.helpers.models import tiny_trajectory
from palimpsest.tests.helpers.sampling import custom_advanced, ksampler, latent_noise, schedule


@pytest.fixture(scope="module")
def edited(model, trajectory):
    return apply_pnp(model, trajectory)[0]


def test_all_three_stock_samplers_end_bit_identical(model, edited, positive, negative, start, caplog):
    with caplog.at_level("INFO", logger="palimpsest"):
        stock = ksampler(edited, start, positive, negative)
    assert sum("no other noise is added" in line for line in caplog.messages) == 1
    advanced = ksampler(edited, start, positive, negative, disable_noise=True, start_step=0, last_step=10000, force_full_denoise=True)
    custom = custom_advanced(edited, start, positive, negative, schedule(model, 4))
    assert torch.equal(stock, advanced) and torch.equal(stock, custom)
    assert torch.equal(ksampler(edited, start, positive, negative, seed=99), stock), "the seed has nothing to decide"


def test_a_start_that_differs_by_rounding_is_recognised(edited, positive, negative, start):
    nudged = ksampler(edited, start * (1 + 1e-6), positive, negative, seed=3)
    assert torch.equal(nudged, ksampler(edited, start * (1 + 1e-6), positive, negative, disable_noise=True))


@pytest.mark.parametrize("denoise", [0.3, 0.6, 0.8])
def test_denoise_below_one_is_refused(edited, positive, negative, start, denoise):
    with pytest.raises(ValueError, match="set denoise to 1") as error:
        ksampler(edited, start, positive, negative, denoise=denoise)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="set denoise to 1"):
        ksampler(edited, torch.zeros_like(start), positive, negative, denoise=denoise)


def test_denoise_just_below_one_is_refused_at_usual_step_counts(model, positive, negative):
    path = tiny_trajectory(model, steps=20)
    edited, _ = apply_pnp(model, path)
    with pytest.raises(ValueError, match="set denoise to 1"):
        ksampler(edited, start_latent(path, model)["samples"], positive, negative, steps=20, denoise=0.95)


def test_the_trajectorys_noise_on_a_later_start_step_is_refused(edited, positive, negative, start):
    with pytest.raises(ValueError, match="its latent is the trajectory's noise of level"):
        ksampler(edited, start, positive, negative, disable_noise=True, start_step=2, last_step=4)


def test_a_stored_latent_starts_at_its_own_level_only(model, trajectory, edited, positive, negative):
    stored = sampler_to_latent(model, trajectory.latents[3])
    with_noise = ksampler(edited, stored, positive, negative, start_step=1)
    assert torch.equal(with_noise, ksampler(edited, stored, positive, negative, start_step=1, disable_noise=True))
    with pytest.raises(ValueError, match="its latent is the trajectory's noise of level"):
        ksampler(edited, stored, positive, negative)


def test_another_latent_starts_from_random_noise_and_says_so(model, trajectory, edited, positive, negative, caplog):
    picture = clean_latent(trajectory, model)["samples"]
    with caplog.at_level("INFO", logger="palimpsest"):
        one, two = (ksampler(edited, picture, positive, negative, seed=seed) for seed in (1, 2))
    assert sum("starts from random noise" in line for line in caplog.messages) == 2
    assert not torch.equal(one, two)


@pytest.mark.parametrize("sampler", ["dpm_2", "uni_pc", "heun"])
@pytest.mark.parametrize("steps", [4, 5])
def test_samplers_whose_schedule_starts_off_the_trajectory_are_not_refused(model, positive, negative, sampler, steps):
    path = tiny_trajectory(model, steps=steps, scheduler="ddim_uniform")
    edited, _ = apply_pnp(model, path)
    out = ksampler(edited, start_latent(path, model)["samples"], positive, negative, steps=steps, sampler=sampler, scheduler="ddim_uniform")
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("scheduler", ["normal", "simple", "karras", "ddim_uniform", "sgm_uniform", "exponential", "beta", "kl_optimal", "linear_quadratic"])
@pytest.mark.parametrize("steps", [7, 10, 19, 20, 24, 30, 50])
def test_full_schedules_and_cut_ones_are_told_apart(model, scheduler, steps):
    sampling = model.get_model_object("model_sampling")
    sigmas = schedule(model, steps, scheduler).flip(0)
    dropped = schedule(model, steps + 1, scheduler)
    assert near_top(sigmas.flip(0), sigmas, sampling.timestep)
    assert near_top(dropped, sigmas, sampling.timestep), "dpm_2 and uni_pc make one step more and drop one"
    for denoise in (0.9, 0.75, 0.5):
        longer = int(steps / denoise)
        if longer == steps:  # the host's own rounding: nothing is cut
            continue
        cut = schedule(model, longer, scheduler)[-(steps + 1) :]
        # ddim_uniform makes a step more where the count does not divide 1000, so a small cut may fall into the tolerance
        if scheduler != "ddim_uniform" or denoise < 0.8:
            assert not near_top(cut, sigmas, sampling.timestep), f"denoise {denoise}"


@pytest.mark.parametrize("inverted, sampled, denoise", [(20, 50, 0.95), (10, 20, 0.95), (10, 30, 0.9), (4, 30, 0.8)])
def test_a_cut_run_of_more_steps_than_the_inversion_is_refused(model, positive, negative, inverted, sampled, denoise):
    """Regression: the tolerance was measured in the trajectory's coarse steps alone."""
    path = tiny_trajectory(model, steps=inverted)
    edited, _ = apply_pnp(model, path)
    with pytest.raises(ValueError, match="set denoise to 1"):
        ksampler(edited, start_latent(path, model)["samples"], positive, negative, steps=sampled, denoise=denoise)


def test_a_whole_run_of_another_step_count_is_welcome(model):
    sampling = model.get_model_object("model_sampling")
    for inverted, sampled in ((20, 50), (50, 20), (10, 30)):
        assert near_top(schedule(model, sampled), schedule(model, inverted).flip(0), sampling.timestep)


def test_a_schedule_that_starts_off_the_trajectory_starts_on_its_path(model, positive, negative):
    """Regression: the noise of the trajectory's own top was handed over at another noise level."""
    path = tiny_trajectory(model, steps=5, scheduler="ddim_uniform")
    edited, _ = apply_pnp(model, path)
    sigmas = schedule(model, 6, "ddim_uniform")
    assert abs(float(sigmas[0] / path.sigmas[-1]) - 1) > 1e-3
    expected = sampler_to_latent(model, path.at(float(sigmas[0])))
    silent = torch.zeros_like(expected)
    found_noise, found = prepare_start(edited, [SimpleNamespace(trajectory=path)], silent + 1, start_latent(path, model)["samples"], None, sigmas, None)
    assert torch.equal(found_noise, silent)
    assert torch.allclose(found, expected, atol=1e-6)


def test_the_clean_picture_without_noise_is_refused(model, trajectory, edited, positive, negative):
    """Regression: VAE Encode wired where the injector's LATENT belongs ran to garbage."""
    picture = clean_latent(trajectory, model)["samples"]
    with pytest.raises(ValueError, match="its latent is the clean picture"):
        ksampler(edited, picture, positive, negative, disable_noise=True)


def test_outside_a_noise_mask_the_inverted_picture_is_kept(model, trajectory, edited, positive, negative, start):
    """Regression: with zero noise the host would keep the start's noise outside the mask."""
    mask = torch.zeros(1, 128, 128)
    mask[:, :, 64:] = 1.0
    out = ksampler(edited, {"samples": start, "noise_mask": mask}, positive, negative)
    picture = clean_latent(trajectory, model)["samples"]
    assert torch.allclose(out[..., :8], picture[..., :8], atol=1e-4)
    assert (out[..., 8:] - picture[..., 8:]).abs().mean() > 0.1
    custom = custom_advanced(edited, {"samples": start, "noise_mask": mask}, positive, negative, schedule(model, 4))
    assert torch.equal(out, custom)


def test_a_full_noise_mask_equals_none(edited, positive, negative, start):
    masked = ksampler(edited, {"samples": start, "noise_mask": torch.ones(1, 128, 128)}, positive, negative)
    plain = ksampler(edited, start, positive, negative)
    assert (masked - plain).norm() / plain.norm() < 1e-4


@pytest.mark.parametrize(
    "shape, message",
    [
        ((1, 4, 16, 24), "latent of 4x16x16 .channels, height, width., but the sampler got 4x16x24"),
        ((1, 16, 16, 16), "but the sampler got 16x16x16"),
    ],
)
def test_another_size_is_refused_before_sampling(model, edited, positive, negative, shape, message):
    called = []
    handle = model.model.diffusion_model.register_forward_pre_hook(lambda *args: called.append(1))
    try:
        with pytest.raises(ValueError, match=message):
            ksampler(edited, latent_noise(*shape), positive, negative)
    finally:
        handle.remove()
    assert not called


def test_another_number_of_pictures_is_refused(model, positive, negative):
    two = tiny_trajectory(model, batch=2)
    edited, _ = apply_pnp(model, two)
    with pytest.raises(ValueError, match="holds 2 pictures, but the sampler got 3 latents"):
        ksampler(edited, latent_noise(3, 4, 16, 16), positive, negative)
