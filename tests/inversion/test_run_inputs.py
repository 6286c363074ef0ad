"""What an inversion refuses, and what it leaves as it found it."""

import dataclasses

import pytest
import torch
from palimpsest.inversion import trajectory as trajectory_module
from palimpsest.inversion.run import run_inversion, run_reconstruction
from palimpsest.inversion.trajectory import clean_latent, start_latent
from palimpsest.tests.helpers.models import tiny_cond, tiny_sd15
from palimpsest.tests.helpers.inversions import STEPS, invert, picture, smooth


@pytest.fixture(scope="module")
def model():
    return smooth(tiny_sd15())


LATENTS = {
    "channels": ({"samples": torch.ones(1, 16, 8, 8)}, {}, "16 channels, but the model works on 4"),
    "video": ({"samples": torch.ones(1, 4, 3, 8, 8)}, {}, r"\[batch, channels, height, width\]"),
    "empty": ({"samples": torch.ones(0, 4, 8, 8)}, {}, "empty"),
    "nan": ({"samples": torch.full((1, 4, 8, 8), float("nan"))}, {}, "256 NaN or infinite"),
    "infinite": ({"samples": torch.full((1, 4, 8, 8), float("inf"))}, {}, "256 NaN or infinite"),
    "zero steps": (None, {"steps": 0}, "at least 1 step"),
    "negative steps": (None, {"steps": -3}, "at least 1 step"),
    "NaN schedule": (None, {"steps": 1, "scheduler": "kl_optimal"}, "finite"),
    "one sigma": (None, {"sigmas": torch.tensor([1.0])}, "at least two noise levels"),
    "no sigmas": (None, {"sigmas": torch.tensor([])}, "at least two noise levels"),
    "turning sigmas": (None, {"sigmas": torch.tensor([3.0, 1.0, 2.0, 0.0])}, "strictly"),
    "repeated sigmas": (None, {"sigmas": torch.tensor([3.0, 1.0, 1.0, 0.0])}, "strictly"),
    "equal sigmas": (None, {"sigmas": torch.tensor([1.0, 1.0])}, "strictly"),
    "negative sigmas": (None, {"sigmas": torch.tensor([3.0, 1.0, -1.0])}, "not negative"),
    "NaN sigmas": (None, {"sigmas": torch.tensor([3.0, float("nan"), 0.0])}, "finite"),
    "guidance alone": (None, {"guidance": 7.5}, "needs a negative"),
    "no negative": (None, {"guidance": 7.5, "negative": []}, "needs a negative"),
    "iterations": (None, {"iterations": 9}, "0 to 5"),
    "convention": (None, {"convention": "both"}, "conventions"),
}


@pytest.mark.parametrize("name", LATENTS)
def test_bad_input_is_one_sentence(model, name):
    latent, options, words = LATENTS[name]
    with pytest.raises(ValueError, match=words) as refused:
        invert(model, latent, **options)
    message = str(refused.value)
    assert "\n" not in message and message.endswith(".")


def test_no_conditioning(model):
    with pytest.raises(ValueError, match="no conditioning"):
        run_inversion(model, picture(), [], steps=2)
    path = run_inversion(model, picture(), tiny_cond(), steps=2).trajectory
    with pytest.raises(ValueError, match="no conditioning"):
        run_reconstruction(model, path, positive=[])


@pytest.mark.parametrize("name", ["positive", "negative"])
def test_a_prompt_of_another_models_clip_is_one_sentence(model, name):
    """Regression: "mat1 and mat2 shapes cannot be multiplied", deep inside a block."""
    prompts = {"positive": tiny_cond(), "negative": tiny_cond(seed=1), name: tiny_cond(dim=1024)}
    with pytest.raises(ValueError, match=f"The {name} conditioning has 1024 values per token, but the connected model wants 768"):
        run_inversion(model, picture(), **prompts, guidance=2.0, steps=2)
    path = run_inversion(model, picture(), tiny_cond(), tiny_cond(seed=1), guidance=2.0, steps=2).trajectory
    with pytest.raises(ValueError, match=f"The {name} conditioning has 1024"):
        run_reconstruction(model, path, **prompts)


def test_a_trajectorys_own_prompt_of_another_width_is_named(model):
    path = dataclasses.replace(invert(model, steps=2), conditioning=tiny_cond(dim=1024))
    with pytest.raises(ValueError, match="The trajectory's conditioning has 1024"):
        run_reconstruction(model, path)


def test_an_inversion_may_be_made_of_areas(model):
    halves = [[tiny_cond(seed=i)[0][0], {"area": (16, 8, 0, 8 * i), "strength": 1.0}] for i in (0, 1)]
    assert invert(model, positive=halves, steps=2).steps == 2


def test_the_models_weights_are_read_once(model, monkeypatch):
    """Regression: inverting and checking read the weights for the fingerprint two and three times."""
    reads = []
    monkeypatch.setattr(trajectory_module, "model_fingerprint", lambda model, real=trajectory_module.model_fingerprint: reads.append(1) or real(model))
    path = invert(model, steps=2)
    start_latent(path, model, check=False)
    assert len(reads) == 1
    run_reconstruction(model, path)
    clean_latent(path, model, check=False)
    assert len(reads) == 2


def test_an_empty_prompts_conditioning_is_fine(model):
    assert invert(model, positive=[[torch.zeros(1, 77, 768), {}]]).steps == STEPS


def test_reconstruction_refuses_another_model(model):
    with pytest.raises(ValueError, match="another SD1.x model"):
        run_reconstruction(tiny_sd15(seed=1), invert(model))


def test_models_that_are_no_unet_are_refused_by_name(model):
    class Flux(torch.nn.Module):
        diffusion_model = torch.nn.Linear(1, 1)

    class Patcher:
        model = Flux()

    with pytest.raises(ValueError, match="Flux"):
        run_inversion(Patcher(), picture(), tiny_cond())


def test_inputs_are_not_altered(model):
    latent, conditioning = picture(), tiny_cond()
    samples, context = latent["samples"].clone(), conditioning[0][0].clone()
    invert(model, latent, conditioning, iterations=2)
    assert list(latent) == ["samples"] and torch.equal(latent["samples"], samples)
    assert torch.equal(conditioning[0][0], context) and conditioning[0][1] == {}
