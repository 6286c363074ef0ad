"""Inversion through the host's sampling path."""

import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import pytest
import torch
from palimpsest.inversion import run as run_module
from palimpsest.inversion.report import psnr
from palimpsest.inversion.run import run_reconstruction
from palimpsest.inversion.trajectory import clean_latent, start_latent
from palimpsest.tests.helpers.models import tiny_cond, tiny_sd15, tiny_sdxl
from palimpsest.tests.helpers.inversions import STEPS, invert, picture, smooth, stock_sampler


@pytest.fixture(scope="module")
def model():
    return smooth(tiny_sd15())


def test_reference_in_float32_step_by_step(model):
    """The whole host path against DDIM in alpha-bar terms with the network called directly."""
    path = invert(model)
    base = model.model
    abar = 1 / (1 + path.sigmas.double() ** 2)
    context = tiny_cond()[0][0]
    x = picture()["samples"] * 0.18215
    table = base.model_sampling.sigmas
    for k in range(STEPS):
        timestep = int((table - path.sigmas[k + 1]).abs().argmin())
        with torch.no_grad():
            e = base.diffusion_model(x.float(), torch.tensor([float(timestep)]), context).double()
        a, b = abar[k], abar[k + 1]
        x = b.sqrt() * (x - (1 - a).sqrt() * e) / a.sqrt() + (1 - b).sqrt() * e
        assert torch.allclose(path.latents[k + 1], (x / b.sqrt()).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheduler", comfy.samplers.SCHEDULER_NAMES)
@pytest.mark.parametrize("steps", [1, 7, 30])
def test_levels_are_those_of_the_later_sampler(model, scheduler, steps):
    if scheduler == "kl_optimal" and steps == 1:
        pytest.skip("the host's own schedule is NaN there; see test_bad_input")
    sampler = comfy.samplers.KSampler(model, steps, model.load_device, "euler", scheduler, denoise=1.0)
    levels, _ = run_module.inversion_sigmas(model, steps, scheduler)
    assert torch.equal(levels.flip(0), sampler.sigmas.cpu())
    assert levels[0] == 0


def test_step_count_the_scheduler_changes_is_said(model):
    path = invert(model, steps=6)
    assert path.steps == 7
    assert any("7 steps when asked for 6" in note for note in path.info["notes"])


def test_the_stock_sampler_starts_from_the_trajectorys_end_and_returns(model):
    path = invert(model, iterations=5)
    back = stock_sampler(model, start_latent(path, model))
    assert psnr(picture()["samples"], back) > 20
    assert torch.equal(back, run_reconstruction(model, path)), "Reconstruct Check and the stock sampler disagree"


def test_every_repeat_makes_the_round_trip_closer(model):
    found = []
    for iterations in (0, 2, 5):
        path = invert(model, iterations=iterations)
        found.append(psnr(picture()["samples"], run_reconstruction(model, path)))
    assert found == sorted(found) and found[-1] > found[0] + 10, found


def test_report_figures_of_the_refinement(model):
    info = invert(model, iterations=5).info
    assert info["step_error_refined"] < 0.5 * info["step_error_plain"]
    assert info["refinement_gain_db"] > 6
    assert info["model_calls"] <= STEPS * 6
    info = invert(model, iterations=0).info
    assert info["step_error_plain"] is None and info["refinement_gain_db"] is None and info["model_calls"] == STEPS


def test_source_convention_is_euler_over_flipped_sigmas(model):
    path = invert(model, convention="source")
    flipped = path.sigmas.clone()
    flipped[0] = 1e-4  # what FlipSigmas does
    samples = picture()["samples"]
    other = comfy.sample.sample_custom(
        model, torch.zeros_like(samples), 1.0, comfy.samplers.ksampler("euler"), flipped, tiny_cond(), [], samples, seed=0
    )
    ours = start_latent(path, model)["samples"]
    assert (ours - other).norm() / other.norm() < 2e-3


def test_conventions_differ(model):
    assert not torch.allclose(invert(model).latents[-1], invert(model, convention="source").latents[-1], atol=1e-2)


@pytest.mark.parametrize("prediction", ["v_prediction", "edm"])
def test_other_predictions_go_there_and_back(prediction):
    model = smooth(tiny_sd15(prediction=prediction))
    path = invert(model, iterations=5, scheduler="karras")
    assert path.prediction == prediction
    assert psnr(picture()["samples"], run_reconstruction(model, path)) > 20


def test_sdxl_goes_there_and_back():
    model = smooth(tiny_sdxl())
    conditioning = tiny_cond(dim=2048, pooled=1280)
    path = invert(model, positive=conditioning, iterations=5)
    assert path.architecture == "SDXL"
    assert torch.allclose(clean_latent(path, model)["samples"], picture()["samples"], atol=1e-5)
    assert psnr(picture()["samples"], run_reconstruction(model, path)) > 20


@pytest.mark.parametrize("iterations", [0, 3])
def test_a_batch_is_its_pictures_alone(model, iterations):
    samples = picture(batch=2)["samples"]
    both = invert(model, {"samples": samples}, iterations=iterations).latents
    for row in range(2):
        alone = invert(model, {"samples": samples[row : row + 1]}, iterations=iterations).latents[:, 0]
        assert (both[:, row] - alone).norm() / alone.norm() < 1e-4


def test_odd_sizes(model):
    path = invert(model, picture(height=19, width=13), iterations=1)
    assert path.latents.shape == (STEPS + 1, 1, 4, 19, 13)
    assert run_reconstruction(model, path).shape == (1, 4, 19, 13)


def test_noise_mask_travels_and_does_not_restrict(model):
    mask = torch.zeros(1, 128, 128)
    mask[:, :64] = 1
    latent = {**picture(), "noise_mask": mask}
    path = invert(model, latent)
    assert torch.equal(path.latents, invert(model).latents)
    assert torch.equal(start_latent(path, model)["noise_mask"], mask)


def test_guidance_uses_the_negative(model):
    plain = invert(model)
    same = invert(model, guidance=1.0, negative=tiny_cond(seed=1))
    guided = invert(model, guidance=3.0, negative=tiny_cond(seed=1))
    assert torch.equal(plain.latents, same.latents)
    assert guided.guidance == 3.0 and not torch.allclose(plain.latents[-1], guided.latents[-1], atol=1e-2)


def test_controlnet_in_the_conditioning_runs_and_is_cleaned_up(model):
    """Without a negative the host divided by zero when an empty list stood next to a ControlNet for both sides."""
    import comfy.controlnet

    class Control(comfy.controlnet.ControlBase):
        asked, cleaned = 0, 0

        def get_control(self, *args, **kwargs):
            Control.asked += 1

        def get_models(self):
            return []

        def cleanup(self):
            Control.cleaned += 1

    positive = [[tiny_cond()[0][0], {"control": Control(), "control_apply_to_uncond": True}]]
    path = invert(model, positive=positive)
    assert torch.equal(path.latents, invert(model).latents)
    assert Control.asked == STEPS and Control.cleaned >= 1


def test_own_sigmas_replace_steps_and_scheduler(model):
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "karras", 5)
    path = invert(model, sigmas=sigmas)
    assert torch.equal(path.sigmas.flip(0), sigmas)
    assert path.info["scheduler"] == "SIGMAS input"


def test_flipped_sigmas_are_taken_as_they_were_meant(model):
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "karras", 5)
    flipped = sigmas.flip(0)
    flipped[0] = 0.0001
    path = invert(model, sigmas=flipped)
    assert torch.equal(path.latents, invert(model, sigmas=sigmas).latents)
    assert any("FlipSigmas" in note for note in path.info["notes"])


def test_a_cut_schedule_ends_where_it_was_cut(model):
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "karras", 6)[:-1]
    path = invert(model, sigmas=sigmas, iterations=5)
    assert float(path.sigmas[0]) > 0 and any("not 0" in note for note in path.info["notes"])
    assert psnr(picture()["samples"], run_reconstruction(model, path)) > 20


def test_half_precision_network_keeps_float32_latents():
    model = tiny_sd15(dtype=torch.bfloat16)
    path = invert(model, iterations=2)
    assert path.latents.dtype == torch.float32
    # values of the path are not confined to bf16's grid
    assert not torch.equal(path.latents[1:], path.latents[1:].bfloat16().float())


def test_nothing_stays_on_the_model(model):
    start = start_latent(invert(model), model)
    before = stock_sampler(model, start, cfg=7.0)
    invert(model, iterations=2)
    assert torch.equal(before, stock_sampler(model, start, cfg=7.0))


@pytest.mark.parametrize("call", [0, 3, 9])
def test_cancel_leaves_nothing_behind(model, call):
    fresh = invert(model, iterations=1)
    calls = []

    def cancel(apply_model, parameters):
        calls.append(1)
        if len(calls) == call + 1:
            comfy.model_management.interrupt_current_processing(True)
        return apply_model(parameters["input"], parameters["timestep"], **parameters["c"])

    cancelled = model.clone()
    cancelled.set_model_unet_function_wrapper(cancel)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            invert(cancelled, iterations=1)
    finally:
        comfy.model_management.interrupt_current_processing(False)
    assert len(calls) <= call + 1
    assert model.model.current_patcher is None
    assert torch.equal(invert(model, iterations=1).latents, fresh.latents)


def test_progress_counts_model_calls_and_ends_full(model, monkeypatch):
    seen = []

    class Bar:
        def __init__(self, total, node_id=None):
            pass

        def update_absolute(self, value, total=None, preview=None):
            seen.append((value, total))

    monkeypatch.setattr(run_module.comfy.utils, "ProgressBar", Bar)
    invert(model, iterations=2)
    values = [value for value, _ in seen]
    assert {total for _, total in seen} == {STEPS * 3}
    assert values == sorted(values) and values[-1] == STEPS * 3


def test_the_progress_bar_ends_full_where_the_last_step_stops_early(model, monkeypatch):
    """Regression: the bar stopped short."""
    seen = []

    class Bar:
        def __init__(self, total, node_id=None):
            pass

        def update_absolute(self, value, total=None, preview=None):
            seen.append(value)

    def stops_early(denoiser, y, sigmas, iterations, **options):
        return real(denoiser, y, sigmas, iterations=0, **options)

    real = run_module.invert
    monkeypatch.setattr(run_module, "invert", stops_early)
    monkeypatch.setattr(run_module.comfy.utils, "ProgressBar", Bar)
    invert(model, iterations=2)
    assert seen[-1] == STEPS * 3 and seen == sorted(seen)


def test_a_network_that_breaks_is_named_with_its_step(model):
    def breaks(apply_model, parameters):
        out = apply_model(parameters["input"], parameters["timestep"], **parameters["c"])
        return out / 0 if float(parameters["timestep"][0]) > 1 else out

    broken = model.clone()
    broken.set_model_unet_function_wrapper(breaks)
    with pytest.raises(ValueError, match=r"NaN or infinite values at step \d"):
        invert(broken)
