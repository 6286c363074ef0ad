"""Null-text optimisation of the host's models, inside inference mode as the server runs its nodes."""

import dataclasses

import comfy.model_management
import comfy.samplers
import pytest
import torch

from palimpsest.attention_patches.pnp import apply_pnp
from palimpsest.inversion import null_text_run
from palimpsest.inversion.null_text import Settings
from palimpsest.inversion.null_text_run import run_null_text
from palimpsest.inversion.report import psnr
from palimpsest.inversion.run import run_inversion, run_reconstruction
from palimpsest.inversion.trajectory import sampler_to_latent, start_latent
from palimpsest.tests.helpers import host_nodes
from palimpsest.tests.helpers.inversions import picture
from palimpsest.tests.helpers.models import controlled, tiny_cond, tiny_controlnet, tiny_sd15, tiny_sdxl
from palimpsest.tests.helpers.sampling import ksampler, no_free_memory
from palimpsest.tests.helpers.state import same_state, state_of

STEPS = 4
QUICK = Settings(inner_steps=3, early_stop=0.0, checkpointing="off")
PROMPT, EMPTY = tiny_cond(seed=1), tiny_cond(seed=2)


@torch.inference_mode()
def built(make=tiny_sd15, calm=0.3, **options):
    """A model as the server holds it. Random weights answer far more sharply than trained ones; a smaller output makes steps invertible."""
    options = {"channel_mult": (1, 1, 1, 1), "width": 64, **options} if make is tiny_sd15 else options
    model = make(**options)
    model.model.diffusion_model.out[2].weight.mul_(calm)
    return model


@torch.inference_mode()
def inverted(model, batch=1, prompt=PROMPT):
    return run_inversion(model, picture(batch=batch, height=8, width=8), prompt, steps=STEPS, iterations=3).trajectory


@torch.inference_mode()
def optimised(model, path, settings=QUICK, negative=EMPTY, **options):
    return run_null_text(model, path, negative, settings=settings, **options)


@pytest.fixture(scope="module")
def model():
    return built()


@pytest.fixture(scope="module")
def path(model):
    return inverted(model)


@pytest.fixture(scope="module")
def result(model, path):
    return optimised(model, path)


def sampled(model, path, negative, positive=PROMPT, cfg=7.5):
    return ksampler(model, start_latent(path, model), positive, negative, steps=STEPS, cfg=cfg, scheduler="ddim_uniform", disable_noise=True)


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def test_the_picture_comes_back_under_guidance_with_a_stock_sampler(model, path, result):
    clean = path.latents[0]
    before, after = psnr(clean, result.before[-1].latent), psnr(clean, result.steps[-1].latent)
    assert after > before + 3
    assert relative(sampled(model, path, EMPTY), sampler_to_latent(model, result.before[-1].latent)) < 1e-4
    assert relative(sampled(model, path, result.conditioning), sampler_to_latent(model, result.steps[-1].latent)) < 1e-4


def test_every_step_ends_nearer_to_the_path(result):
    assert all(float(step.loss) < float(plain.loss) for step, plain in zip(result.steps, result.before))
    assert all(int(step.inner) == 3 for step in result.steps)


def test_the_result_is_plain_conditioning(path, result):
    assert len(result.conditioning) == STEPS
    for (tokens, options), step in zip(result.conditioning, result.steps):
        assert tokens.shape == (1, 77, 768) and tokens.dtype == torch.float32 and torch.equal(tokens, step.tokens)
        assert not tokens.requires_grad and not tokens.is_inference() and set(options) == {"start_percent", "end_percent"}
    assert result.conditioning[0][1]["start_percent"] == 0.0 and result.conditioning[-1][1]["end_percent"] == 1.0


def test_the_cached_model_is_as_it_was(model, path, result):
    before = sampled(model, path, EMPTY)
    state = state_of(model)
    assert state[1] and all(inference for *_, inference, _ in state[1].values())
    again = optimised(model, path)
    assert same_state(state, state_of(model))
    assert model.model.current_patcher is None and not model.wrappers.get("prepare_sampling")
    assert torch.equal(sampled(model, path, EMPTY), before)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(again.steps, result.steps))


def test_inputs_are_not_altered(model, path):
    negative = [[EMPTY[0][0].clone(), {"start_percent": 0.2, "end_percent": 0.6, "other": 1}]]
    latents = path.latents.clone()
    entries = optimised(model, path, dataclasses.replace(QUICK, inner_steps=1), negative).conditioning
    assert torch.equal(negative[0][0], EMPTY[0][0]) and negative[0][1] == {"start_percent": 0.2, "end_percent": 0.6, "other": 1}
    assert torch.equal(path.latents, latents)
    assert all(options["other"] == 1 for _, options in entries) and entries[0][1]["start_percent"] == 0.0


@pytest.mark.parametrize("prediction", ["v_prediction", "edm"])
def test_other_predictions(prediction):
    model = built(prediction=prediction)
    path = inverted(model)
    found = optimised(model, path)
    assert sum(float(step.loss) for step in found.steps) < sum(float(step.loss) for step in found.before)
    assert relative(sampled(model, path, found.conditioning), sampler_to_latent(model, found.steps[-1].latent)) < 1e-4


def test_sdxl_with_pooled_vectors():
    model = built(tiny_sdxl)
    prompt, empty = tiny_cond(seed=1, dim=2048, pooled=1280), tiny_cond(seed=2, dim=2048, pooled=1280)
    path = inverted(model, prompt=prompt)
    found = optimised(model, path, dataclasses.replace(QUICK, inner_steps=2), empty)
    assert float(found.steps[-1].loss) < float(found.before[-1].loss)
    assert all(torch.equal(options["pooled_output"], empty[0][1]["pooled_output"]) for _, options in found.conditioning)
    assert relative(sampled(model, path, found.conditioning, prompt), sampler_to_latent(model, found.steps[-1].latent)) < 1e-4


def test_half_precision_weights_are_computed_with_in_float32():
    half, full = built(dtype=torch.float16), built(dtype=torch.float16)
    with torch.inference_mode():
        full.model.diffusion_model.float().dtype = torch.float32
    path = inverted(full)
    found, expected = optimised(half, path), optimised(full, path)
    for a, b in zip(found.steps, expected.steps):
        assert torch.equal(a.tokens, b.tokens)
    assert all(weight.dtype == torch.float16 for weight in half.model.diffusion_model.parameters())


def test_lora_is_part_of_the_model(model, path, result):
    patched = host_nodes.lora(model)
    with_lora = inverted(patched)
    found = optimised(patched, with_lora)
    assert relative(sampled(patched, with_lora, found.conditioning), sampler_to_latent(model, found.steps[-1].latent)) < 1e-4
    assert relative(found.before[-1].latent, result.before[-1].latent) > 1e-3
    again = optimised(model, path)
    assert torch.equal(again.steps[-1].tokens, result.steps[-1].tokens), "the LoRA does not stay"


def test_pictures_of_a_batch_each_get_their_own(model):
    path = inverted(model, batch=2)
    both = optimised(model, path)
    assert all(tokens.shape == (2, 77, 768) for tokens, _ in both.conditioning)
    for row in range(2):
        alone = optimised(model, dataclasses.replace(path, latents=path.latents[:, row : row + 1]))
        # Adam makes whole steps of differences in the last digit where a gradient is nearly zero: later steps drift apart
        for number, (together, single) in enumerate(zip(both.steps, alone.steps)):
            assert float(together.loss[row]) == pytest.approx(float(single.loss), rel=0.3 if number else 1e-3)
    first, second = both.steps[0].loss
    assert abs(float(first) - float(second)) > 0.2 * float(first), "the two pictures tell apart"
    end = sampler_to_latent(model, both.steps[-1].latent)
    swapped = [[tokens.flip(0), options] for tokens, options in both.conditioning]
    # the sampler's four rows round otherwise than two and two: 5e-4 on a processor with AVX2 alone, below 1e-4 with AVX-512
    assert relative(sampled(model, path, both.conditioning), end) < 2e-3 < 0.02 < relative(sampled(model, path, swapped), end)


def test_negative_prompt_inversion_is_a_matter_of_wiring(model, path):
    """The source prompt as negative: guidance then changes nothing."""
    guided = torch.inference_mode()(run_reconstruction)(model, dataclasses.replace(path, guidance=7.5), negative=PROMPT)
    plain = torch.inference_mode()(run_reconstruction)(model, path)
    assert relative(guided, plain) < 1e-4
    empty = torch.inference_mode()(run_reconstruction)(model, dataclasses.replace(path, guidance=7.5), negative=EMPTY)
    assert psnr(sampler_to_latent(model, path.latents[0]), plain) > psnr(sampler_to_latent(model, path.latents[0]), empty) + 3


def test_checkpointing_gives_the_same(model, path, result):
    found = optimised(model, path, dataclasses.replace(QUICK, checkpointing="on"))
    assert found.checkpointing and not result.checkpointing
    for a, b in zip(found.steps, result.steps):
        assert float(a.loss) == pytest.approx(float(b.loss), rel=1e-3)


def test_auto_looks_at_the_free_memory(model, path, monkeypatch):
    quick = Settings(inner_steps=1)
    assert not optimised(model, path, quick).checkpointing
    no_free_memory(monkeypatch)
    assert optimised(model, path, quick).checkpointing


def test_auto_tries_again_when_memory_runs_out(model, path, monkeypatch):
    tried = []

    def runs_out(branch, y, targets, sigmas, tokens, settings, tell=None):
        if settings.inner_steps:
            tried.append(1)
        for step in real(branch, y, targets, sigmas, tokens, settings, tell):
            if len(tried) == 1 and step.index == 1:
                raise torch.cuda.OutOfMemoryError("out of memory")
            yield step

    real = null_text_run.optimise
    monkeypatch.setattr(null_text_run, "optimise", runs_out)
    quick = Settings(inner_steps=1)
    found = optimised(model, path, quick)
    assert found.checkpointing and len(tried) == 2 and [step.index for step in found.steps] == list(range(STEPS))
    tried.clear()
    with pytest.raises(torch.cuda.OutOfMemoryError):
        optimised(model, path, dataclasses.replace(quick, checkpointing="off"))


def test_the_host_is_asked_for_room(model, path, monkeypatch):
    asked = []
    real = comfy.model_management.load_models_gpu

    def load(models, memory_required=0, **rest):
        asked.append((memory_required, rest))
        return real(models, memory_required=memory_required, **rest)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", load)
    optimised(model, path, dataclasses.replace(QUICK, inner_steps=1))
    needed = null_text_run.memory_needed(model, "SD1.x", (1, 4, 8, 8), False)
    assert asked[0][0] >= needed and asked[0][1]["minimum_memory_required"] >= needed


@pytest.mark.parametrize("call", [0, 2, 9, 20])
def test_cancel_leaves_nothing_behind(model, path, result, call):
    state, calls = state_of(model), []

    def cancel(apply_model, parameters):
        calls.append(1)
        if len(calls) == call + 1:
            comfy.model_management.interrupt_current_processing(True)
        return apply_model(parameters["input"], parameters["timestep"], **parameters["c"])

    cancelled = model.clone()
    cancelled.set_model_unet_function_wrapper(cancel)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            optimised(cancelled, path)
    finally:
        comfy.model_management.interrupt_current_processing(False)
    assert len(calls) == call + 1 and model.model.current_patcher is None
    assert same_state(state, state_of(model))
    assert torch.equal(optimised(model, path).steps[-1].tokens, result.steps[-1].tokens)


def test_the_progress_bar_ends_full_and_text_is_told(model, path, monkeypatch):
    seen, told = [], []

    class Bar:
        def __init__(self, total, node_id=None):
            pass

        def update_absolute(self, value, total=None, preview=None):
            seen.append((value, total))

    monkeypatch.setattr(null_text_run.comfy.utils, "ProgressBar", Bar)
    optimised(model, path, Settings(inner_steps=3, early_stop=1e6), say=told.append)
    assert {total for _, total in seen} == {STEPS * 4}
    values = [value for value, _ in seen]
    assert values == sorted(values) and values[-1] == STEPS * 4, "although every step stopped after its first training"
    assert len(told) == STEPS and told[0].startswith("Step 1 of 4: loss ")


def test_a_controlnet_on_the_positive_takes_part(model):
    prompt = controlled(PROMPT, tiny_controlnet())
    path = inverted(model, prompt=prompt)
    found = optimised(model, path, dataclasses.replace(QUICK, inner_steps=1))
    assert relative(sampled(model, path, found.conditioning, prompt), sampler_to_latent(model, found.steps[-1].latent)) < 1e-4
    assert relative(optimised(model, path, dataclasses.replace(QUICK, inner_steps=1), positive=PROMPT).before[-1].latent, found.before[-1].latent) > 1e-3


def test_guidance_of_other_nodes_is_the_samplers(model, path, result):
    """What sits in the host's slots for guidance, before and after it is mixed, takes part as in the sampler."""
    clone = model.clone()
    clone.set_model_sampler_cfg_function(lambda args: args["uncond"] + 0.5 * args["cond_scale"] * (args["cond"] - args["uncond"]))
    clone.set_model_sampler_post_cfg_function(lambda args: 0.9 * args["denoised"])
    found = optimised(clone, path)
    assert relative(sampled(clone, path, found.conditioning), sampler_to_latent(model, found.steps[-1].latent)) < 1e-4
    assert relative(found.before[-1].latent, result.before[-1].latent) > 1e-2


MASK = {"mask": torch.ones(1, 64, 64)}
REFUSED = {
    "cfg 1": ({"settings": Settings(guidance=1.0)}, "guidance is 1"),
    "no trainings": ({"settings": Settings(inner_steps=0)}, "at least 1 inner step"),
    "rate": ({"settings": Settings(learning_rate=0.0)}, "learning rate above 0"),
    "checkpointing": ({"settings": Settings(checkpointing="maybe")}, "one of auto, on, off"),
    "no negative": ({"negative": []}, "needs a negative"),
    "two negatives": ({"negative": EMPTY + PROMPT}, "has 2 parts"),
    "three prompts": ({"negative": [[torch.zeros(3, 77, 768), {}]]}, "holds 3 prompts, but the trajectory 1 picture:"),
    "width": ({"negative": tiny_cond(dim=1024)}, "1024 values per token"),
    "mask": ({"positive": [[PROMPT[0][0], MASK]]}, "positive conditioning carries a mask"),
    "area": ({"negative": [[EMPTY[0][0], {"area": (8, 8, 0, 0)}]]}, "negative conditioning carries an area"),
    "hooks": ({"positive": [[PROMPT[0][0], {"hooks": object()}]]}, "positive conditioning carries hooks"),
    "control": ({"negative": [[EMPTY[0][0], {"control": object()}]]}, "negative conditioning carries a ControlNet"),
    "both": ({"positive": [[PROMPT[0][0], {"control": object(), "control_apply_to_uncond": True}]]}, "acts on the negative prompt as well"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_one_sentence(model, path, name):
    options, words = REFUSED[name]
    with pytest.raises(ValueError, match=words) as refused:
        optimised(model, path, **options)
    assert "\n" not in str(refused.value) and str(refused.value).endswith(".")


def test_another_model_and_an_edited_one_are_refused(model, path):
    with pytest.raises(ValueError, match="another SD1.x model"):
        optimised(built(seed=5), path)
    with pytest.raises(ValueError, match="carries an edit of this pack"):
        optimised(apply_pnp(model, path)[0], path)
