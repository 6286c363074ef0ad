"""What can be inverted, asked without running a model."""

import comfy.samplers
import pytest
import torch
from palimpsest.inversion.checks import check_conditioning, check_latent, inversion_sigmas
from palimpsest.tests.helpers.models import tiny_cond, tiny_sd15


@pytest.fixture(scope="module")
def model():
    return tiny_sd15(channel_mult=(1, 1, 1, 1))


def one_sentence(refused) -> str:
    text = str(refused.value)
    assert "\n" not in text and text.endswith(".") and text[0].isupper()
    return text


def test_a_latent_comes_back_as_float32_and_the_callers_stays(model):
    mine = torch.ones(2, 4, 8, 8, dtype=torch.float16)
    found = check_latent(model, {"samples": mine})
    assert found.dtype == torch.float32 and torch.equal(found, mine.float()) and mine.dtype == torch.float16


class Nested:
    is_nested = True


@pytest.mark.parametrize(
    "samples, words",
    [
        (Nested(), "several nested tensors"),
        (torch.ones(4, 8, 8), r"\[4, 8, 8\]"),
        (torch.ones(1, 4, 5, 8, 8), r"\[1, 4, 5, 8, 8\]"),
        (torch.ones(1, 4, 0, 8), "empty"),
        (torch.ones(1, 9, 8, 8), "9 channels, but the model works on 4"),
        (torch.tensor([float("nan")] * 2 + [0.0] * 2).view(1, 4, 1, 1), "2 NaN or infinite values of 4"),
    ],
)
def test_latents_that_cannot_be_inverted(model, samples, words):
    with pytest.raises(ValueError, match=words) as refused:
        check_latent(model, {"samples": samples})
    one_sentence(refused)


@pytest.mark.parametrize(
    "positive, negative, guidance, words",
    [
        (None, None, 1.0, "no conditioning"),
        ([], None, 1.0, "no conditioning"),
        (tiny_cond(), None, 1.5, "Guidance 1.5 needs a negative"),
        (tiny_cond(), [], 0.0, "Guidance 0 needs a negative"),
        (tiny_cond(dim=2048), None, 1.0, "positive conditioning has 2048 values per token, but the connected model wants 768"),
        (tiny_cond(), tiny_cond(dim=1024), 7.0, "negative conditioning has 1024"),
        (tiny_cond() + tiny_cond(dim=1024), None, 1.0, "has 1024"),
    ],
)
def test_prompts_that_the_model_cannot_take(model, positive, negative, guidance, words):
    with pytest.raises(ValueError, match=words) as refused:
        check_conditioning(model, positive, negative, guidance)
    one_sentence(refused)


def test_prompts_that_it_can_take(model):
    check_conditioning(model, tiny_cond(), None, 1.0)
    check_conditioning(model, tiny_cond() + tiny_cond(tokens=154), tiny_cond(seed=1), 7.5)
    check_conditioning(model, [[None, {}]], None, 1.0)


def test_an_unknown_scheduler_is_named_with_those_there_are(model):
    with pytest.raises(ValueError, match="no scheduler called smooth: choose one of .*ddim_uniform") as refused:
        inversion_sigmas(model, 4, "smooth")
    one_sentence(refused)


def test_own_sigmas_may_come_in_either_direction_and_replace_the_schedule(model):
    falling = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "karras", 4)
    down, _ = inversion_sigmas(model, 0, "none", falling)
    up, _ = inversion_sigmas(model, 0, "none", falling.flip(0))
    assert torch.equal(down, up) and torch.equal(down, falling.flip(0).float())
    assert down.dtype == torch.float32 and down.device.type == "cpu"


def test_the_small_sigma_of_flip_sigmas_is_taken_as_zero_and_said(model):
    levels, notes = inversion_sigmas(model, 4, "normal", torch.tensor([1e-4, 1.0, 14.6]))
    assert levels.tolist() == pytest.approx([0.0, 1.0, 14.6]) and "FlipSigmas" in notes[0]


def test_a_cut_schedule_is_said(model):
    levels, notes = inversion_sigmas(model, 4, "normal", torch.tensor([14.6, 3.0, 0.5]))
    assert float(levels[0]) == 0.5 and "ends at sigma 0.5" in notes[0]
