"""Learning with the host's models, inside inference mode as the server runs its nodes."""

from dataclasses import replace

import comfy.model_management
import pytest
import torch

from palimpsest.instruct_pix2pix.guidance import add_image_guidance
from palimpsest.tests.helpers import host_nodes
from palimpsest.tests.helpers.sampling import ksampler, no_free_memory
from palimpsest.tests.helpers.visii import WIDTH, random_instruction, random_pairs, tiny_edit, tiny_edit_sdxl
from palimpsest.tests.helpers.state import same_state, state_of
from palimpsest.visii import learn_run, step
from palimpsest.visii.direction import Direction
from palimpsest.visii.learn import Settings
from palimpsest.visii.learn_run import run_learn, total_steps
from palimpsest.visii.step import VALIDATION

STEPS, PREVIEW_STEPS = 6, 4
SETTINGS = Settings(steps=STEPS, learning_rate=0.05, preview_every=0, checkpointing="off", choice="last")
START, PAIRS = random_instruction(), random_pairs()


@pytest.fixture(autouse=True)
def short_previews(monkeypatch):
    for module in (step, learn_run):
        monkeypatch.setattr(module, "PREVIEW_STEPS", PREVIEW_STEPS)


@torch.inference_mode()
def built(make=tiny_edit, **options):
    """A model as the server holds it, quiet enough for its noise predictions to be of use."""
    model = make(**options)
    model.model.diffusion_model.out[2].weight.mul_(0.3)
    return model


@torch.inference_mode()
def learned(model, settings=SETTINGS, start=START, pairs=PAIRS, null=None, **options):
    return run_learn(model, pairs, start, null or (start.null, {}), settings, **options)


@pytest.fixture(scope="module")
def model():
    return built()


@pytest.fixture(scope="module")
def result(model):
    return learned(model)


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def sampled(model, conditioning=None):
    extra = {"concat_latent_image": PAIRS.image}
    positive = [[(conditioning or START.conditioning)[0][0], dict(extra)]]
    return ksampler(model, torch.zeros_like(PAIRS.image), positive, [[START.null, dict(extra)]], steps=3)


def test_only_word_positions_move_and_what_comes_out_is_plain(result):
    tokens = result.instruction.tokens
    assert torch.equal(tokens[:, 0], START.tokens[:, 0]) and torch.equal(tokens[:, START.end :], START.tokens[:, START.end :])
    assert bool((tokens[:, 1 : START.end] != START.tokens[:, 1 : START.end]).all())
    assert not tokens.requires_grad and not tokens.is_inference() and tokens.dtype == torch.float32 and tokens.device.type == "cpu"
    assert len(result.record.errors) == STEPS and result.record.best_step == STEPS and result.seconds > 0


def test_the_error_of_a_fixed_set_falls(model):
    found = learned(model, replace(SETTINGS, steps=10, learning_rate=0.4, choice="validation"))
    assert found.record.checks[0] == (0, pytest.approx(1.0)) and min(value for _, value in found.record.checks) < 0.97
    assert found.record.best_step > 0


def test_same_seed_same_result_and_the_cached_model_is_as_it_was(model, result):
    before, state = sampled(model), state_of(model)
    assert state[1] and all(inference for *_, inference, _ in state[1].values())
    again, other = learned(model), learned(model, replace(SETTINGS, seed=1))
    assert same_state(state, state_of(model))
    assert model.model.current_patcher is None and not model.wrappers.get("prepare_sampling")
    assert torch.equal(sampled(model), before)
    assert torch.equal(again.instruction.tokens, result.instruction.tokens) and again.record.errors == result.record.errors
    assert not torch.equal(other.instruction.tokens, result.instruction.tokens) and other.order != result.order


def test_inputs_are_not_altered(model):
    tokens, image, target, null = START.tokens.clone(), PAIRS.image.clone(), PAIRS.target.clone(), [START.null.clone(), {"other": 1}]
    learned(model, replace(SETTINGS, steps=1), null=tuple(null))
    assert torch.equal(tokens, START.tokens) and torch.equal(image, PAIRS.image) and torch.equal(target, PAIRS.target)
    assert torch.equal(null[0], START.null) and null[1] == {"other": 1}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_are_computed_with_in_float32(dtype):
    half, full = built(dtype=dtype), built(dtype=dtype)
    with torch.inference_mode():
        full.model.diffusion_model.float().dtype = torch.float32
    assert torch.equal(learned(half).instruction.tokens, learned(full).instruction.tokens)
    assert {weight.dtype for weight in half.model.diffusion_model.parameters()} == {dtype}


def test_checkpointing_gives_the_same(model, result):
    found = learned(model, replace(SETTINGS, checkpointing="on"))
    assert found.checkpointing and not result.checkpointing
    assert found.record.errors == pytest.approx(result.record.errors, rel=1e-4)


def test_auto_looks_at_the_free_memory(model, monkeypatch):
    quick = replace(SETTINGS, steps=1, checkpointing="auto")
    assert not learned(model, quick).checkpointing
    no_free_memory(monkeypatch)
    assert learned(model, quick).checkpointing


def test_short_memory_changes_the_calls_and_not_the_result(model, monkeypatch):
    """The host then gives each row a call of its own, the validation set included."""
    settings = replace(SETTINGS, steps=2, choice="validation")
    whole = learned(model, settings)
    no_free_memory(monkeypatch)
    parts = learned(model, settings)
    assert [value for _, value in parts.record.checks] == pytest.approx([value for _, value in whole.record.checks], rel=1e-4)
    assert parts.record.errors == pytest.approx(whole.record.errors, rel=1e-4)


def test_the_host_is_asked_for_room(model, monkeypatch):
    asked = []
    real = comfy.model_management.load_models_gpu

    def load(models, memory_required=0, **rest):
        asked.append((memory_required, rest))
        return real(models, memory_required=memory_required, **rest)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", load)
    learned(model, replace(SETTINGS, steps=1))
    needed = learn_run.memory_needed(model, "SD1.x", (1, 4, 16, 16), False)
    assert asked[0][0] >= needed and asked[0][1]["minimum_memory_required"] >= needed


def test_it_tries_again_with_checkpointing_when_memory_runs_out(model, monkeypatch):
    real, tried = learn_run.learn, []

    def runs_out(*args, **kwargs):
        tried.append(1)
        for found in real(*args, **kwargs):
            if len(tried) == 1 and found.index == 1:
                raise torch.cuda.OutOfMemoryError("out of memory")
            yield found

    monkeypatch.setattr(learn_run, "learn", runs_out)
    found = learned(model, replace(SETTINGS, steps=3, checkpointing="auto"))
    assert found.checkpointing and len(tried) == 2 and len(found.record.errors) == 3
    tried.clear()
    with pytest.raises(torch.cuda.OutOfMemoryError):
        learned(model, replace(SETTINGS, steps=3))


@pytest.mark.parametrize("call", [0, 1, 5, 2 * STEPS + 3])
def test_cancel_leaves_nothing_behind(model, result, call):
    """In the prediction without gradient, in the one with, and in a preview."""
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
            learned(cancelled, replace(SETTINGS, preview_every=100))
    finally:
        comfy.model_management.interrupt_current_processing(False)
    assert len(calls) == call + 1 and model.model.current_patcher is None
    assert same_state(state, state_of(model))
    assert torch.equal(learned(model).instruction.tokens, result.instruction.tokens)


def test_progress_previews_and_text(model, monkeypatch):
    seen, told = [], []

    class Bar:
        def __init__(self, total, node_id=None):
            pass

        def update_absolute(self, value, total=None, preview=None):
            seen.append((value, total))

    monkeypatch.setattr(learn_run.comfy.utils, "ProgressBar", Bar)
    settings = replace(SETTINGS, preview_every=2)
    found = learned(model, settings, say=told.append)
    assert [made for made, _ in found.previews] == [2, 4, STEPS] and total_steps(settings) == STEPS + 3 * PREVIEW_STEPS
    assert all(latent.shape == (1, 4, 16, 16) and torch.isfinite(latent).all() for _, latent in found.previews)
    values = [value for value, _ in seen]
    assert {total for _, total in seen} == {total_steps(settings)} and values == sorted(values) and values[-1] == total_steps(settings)
    assert len(told) == STEPS and told[0].startswith("Step 1 of 6: error of the noise ")
    assert learned(model, replace(SETTINGS, steps=2)).previews == []


def test_a_preview_is_what_a_stock_sampler_makes_of_the_instruction(model):
    """At image guidance 1 that is euler from the same noise."""
    from palimpsest.visii.objective import fixed_noise

    found = learned(model, replace(SETTINGS, preview_every=100, image_scale=1.0, text_scale=4.0))
    extra = {"concat_latent_image": PAIRS.image}
    noise = fixed_noise((1, 4, 16, 16), 1000, SETTINGS.seed)

    with torch.inference_mode():
        import comfy.samplers

        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds([[found.instruction.tokens, dict(extra)]], [[START.null, dict(extra)]])
        guider.set_cfg(4.0)
        levels = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", PREVIEW_STEPS)
        # without noise of its own the sampler starts from the latent as it is
        start = model.model.process_latent_out(levels[0] * noise)
        stock = guider.sample(torch.zeros_like(noise), start, comfy.samplers.ksampler("euler"), levels, disable_pbar=True, seed=0)
    assert relative(model.model.process_latent_out(found.previews[-1][1]), stock) < 1e-4


def test_several_pairs_take_turns(model):
    pairs = random_pairs(count=3)
    both = learned(model, pairs=pairs)
    assert len({timestep % 3 for timestep in both.order}) > 1
    alone = learned(model, pairs=random_pairs(count=1))
    assert not torch.equal(both.instruction.tokens, alone.instruction.tokens)


def test_the_direction_term_takes_part_and_is_reported(model, result):
    generator = torch.Generator().manual_seed(0)
    direction = Direction(torch.nn.functional.normalize(torch.randn(1, 20, generator=generator), dim=-1), torch.randn(20, WIDTH, generator=generator))
    found = learned(model, replace(SETTINGS, direction_weight=100.0), direction=direction)
    assert found.alike[1] > found.alike[0] and len(found.record.alike) == STEPS and result.alike is None
    only_told = learned(model, replace(SETTINGS, direction_weight=0.0), direction=direction)
    assert torch.equal(only_told.instruction.tokens, result.instruction.tokens) and only_told.alike[0] == found.alike[0]


def test_lora_is_part_of_the_model(model, result):
    assert relative(learned(host_nodes.lora(model)).instruction.tokens, result.instruction.tokens) > 1e-4
    assert torch.equal(learned(model).instruction.tokens, result.instruction.tokens), "the LoRA does not stay"


def test_guidance_of_other_nodes_takes_no_part(model, result):
    """The published objective guides by itself; a patch that makes a third prediction of its own must not see a pair of lists."""
    seen = []

    def count(executor, base, conds, *args, **kwargs):
        seen.append(len(conds))
        return executor(base, conds, *args, **kwargs)

    clone = host_nodes.pag(model).clone()
    clone.add_wrapper_with_key("calc_cond_batch", "count", count)
    assert torch.equal(learned(clone).instruction.tokens, result.instruction.tokens)
    assert len(seen) == 2 * STEPS and set(seen) == {3}


def test_a_model_with_image_guidance_learns_the_same(model, result):
    """The image scale is part of the objective here; the patch that adds it to sampling knows a pair by its two lists."""
    assert torch.equal(learned(add_image_guidance(model, 2.0)).instruction.tokens, result.instruction.tokens)


def test_learning_goes_on_from_an_instruction(model, result):
    found = learned(model, start=result.instruction)
    assert torch.equal(found.start.tokens, result.instruction.tokens) and not torch.equal(found.instruction.tokens, result.instruction.tokens)


def test_sdxl_with_pooled_vectors():
    start = random_instruction(width=2048, pooled=1280)
    found = learned(built(tiny_edit_sdxl), replace(SETTINGS, steps=2), start=start, null=(start.null, {"pooled_output": torch.zeros(1, 1280)}))
    assert found.architecture == "SDXL" and torch.equal(found.instruction.pooled, start.pooled)
    assert not torch.equal(found.instruction.tokens, start.tokens)


def test_validation_set_size(model):
    calls = []

    def count(apply_model, parameters):
        calls.append(len(parameters["input"]))
        return apply_model(parameters["input"], parameters["timestep"], **parameters["c"])

    clone = model.clone()
    clone.set_model_unet_function_wrapper(count)
    learned(clone, replace(SETTINGS, steps=1, choice="validation"))
    # the pair of predictions without text once, then one look at the start and one at the end
    assert calls == [2 * VALIDATION, VALIDATION, 2, 1, VALIDATION]


def test_weights_that_give_nan_are_an_error():
    broken = built()
    with torch.inference_mode():
        broken.model.diffusion_model.out[2].bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="very first step"):
        learned(broken)


def test_nan_on_the_way_gives_the_last_good_state(model):
    calls = []

    def breaks(apply_model, parameters):
        calls.append(1)
        out = apply_model(parameters["input"], parameters["timestep"], **parameters["c"])
        return out * float("nan") if len(calls) == 8 else out

    clone = model.clone()
    clone.set_model_unet_function_wrapper(breaks)
    found = learned(clone)
    assert "at step 4 of 6" in found.record.stopped and torch.isfinite(found.instruction.tokens).all() and found.record.best_step == 2
