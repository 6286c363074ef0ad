"""Equal to diffusers' InstructPix2Pix pipeline on one small random UNet, at every step of a run."""

import pytest
import torch

from palimpsest.instruct_pix2pix.guidance import add_image_guidance
from palimpsest.tests.helpers.instruct_pix2pix import diffusers_unet, edit_cond, picture_latent, relative, tiny_edit
from palimpsest.tests.helpers.sampling import custom_advanced, latent_noise

BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@pytest.fixture(scope="module")
def model():
    return tiny_edit()


@pytest.fixture(scope="module")
def pipeline(model):
    diffusers = pytest.importorskip("diffusers", reason="diffusers, a requirement of the tests only, is not installed")
    vae = diffusers.AutoencoderKL(block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    pipe = diffusers.StableDiffusionInstructPix2PixPipeline(
        vae=vae, text_encoder=None, tokenizer=None, unet=diffusers_unet(model), scheduler=diffusers.EulerDiscreteScheduler(timestep_spacing="linspace", **BETAS),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_pipeline(pipe, noise, picture, positive, negative, image_scale, text_scale, steps, monkeypatch):
    """Per step (latents, guided eps), and the sigmas."""
    seen, step = [], pipe.scheduler.step

    def note(prediction, t, latents, **kwargs):
        seen.append((latents.clone(), prediction.clone()))
        return step(prediction, t, latents, **kwargs)

    monkeypatch.setattr(pipe.scheduler, "step", note)
    final = pipe(
        image=picture, latents=noise, prompt_embeds=positive[0][0], negative_prompt_embeds=negative[0][0], guidance_scale=text_scale, image_guidance_scale=image_scale,
        num_inference_steps=steps, output_type="latent").images
    return seen, pipe.scheduler.sigmas.clone(), final


def note_steps(model):
    """A clone of `model` that notes (x, sigma, denoised) of each step."""
    seen, clone = [], model.clone()

    def note(args):
        seen.append((args["input"].clone(), float(args["sigma"][0]), args["denoised"].clone()))
        return args["denoised"]

    clone.set_model_sampler_post_cfg_function(note)
    return clone, seen


# 999 / 9 and 999 / 3 are whole numbers: the host rounds timesteps, diffusers' Euler does not
@pytest.mark.parametrize("image_scale, text_scale, size, batch, steps", [
    (1.5, 7.5, (16, 16), 1, 10), (1.5, 7.5, (16, 24), 2, 4), (1.0, 5.0, (8, 16), 1, 4), (2.2, 3.0, (24, 16), 2, 4)])
def test_every_step_is_the_pipelines(model, pipeline, monkeypatch, image_scale, text_scale, size, batch, steps):
    """At each step of the pipeline's run, from its latents, and over a whole run of the host's own sampler from the same noise."""
    picture, noise = picture_latent(batch, *size), latent_noise(batch, 4, *size, seed=3)
    positive, negative = edit_cond(picture, seed=1, batch=batch), edit_cond(picture, seed=5, batch=batch)
    theirs, sigmas, final = run_pipeline(pipeline, noise, picture, positive, negative, image_scale, text_scale, steps, monkeypatch)
    assert len(theirs) == steps and len(theirs[0][0]) == batch

    guided, ours = note_steps(add_image_guidance(model, image_scale))
    for (latents, eps), sigma in zip(theirs, sigmas):
        # one step of the host from the pipeline's own latents
        custom_advanced(guided, torch.zeros_like(latents), positive, negative, torch.tensor([float(sigma), 0.0]), cfg=text_scale, noise=start_of(latents, float(sigma), model))
        x, level, denoised = ours[-1]
        assert relative(x, latents) < 1e-6, "the host starts elsewhere"
        assert relative(denoised, latents - sigma * eps) <= 1e-5
        # below that a float32 prediction of latents this large no longer holds its noise to five digits
        assert level < 1.5 or relative((x - denoised) / level, eps) <= 1e-5

    ours.clear()
    # the first latents, because the host and the pipeline scale the first noise differently
    out = custom_advanced(guided, torch.zeros_like(noise), positive, negative, sigmas, cfg=text_scale, noise=start_of(theirs[0][0], float(sigmas[0]), model))
    assert len(ours) == steps
    for (x, _, _), (latents, _) in zip(ours, theirs):
        assert relative(x, latents) <= 1e-5
    assert relative(out * 0.18215, final) <= 1e-5


def start_of(latents, sigma, model):
    """Noise that the host's sampler turns into `latents` at its first level."""
    full = sigma >= float(model.get_model_object("model_sampling").sigma_max) * (1 - 1e-5)
    return latents / (1 + sigma**2) ** 0.5 if full else latents / sigma


def test_it_differs_without_the_node(model, pipeline, monkeypatch):
    """The comparison above can tell the image scale: the plain host is far from the pipeline at 1.5."""
    picture, noise = picture_latent(), latent_noise(1, 4, 16, 16, seed=3)
    positive, negative = edit_cond(picture, seed=1), edit_cond(picture, seed=5)
    theirs, sigmas, _ = run_pipeline(pipeline, noise, picture, positive, negative, 1.5, 7.5, 4, monkeypatch)
    plain, ours = note_steps(model)
    custom_advanced(plain, torch.zeros_like(noise), positive, negative, sigmas[[0, -1]], cfg=7.5, noise=start_of(theirs[0][0], float(sigmas[0]), model))
    x, sigma, denoised = ours[0]
    assert relative((x - denoised) / sigma, theirs[0][1]) > 1e-3
