"""The Trajectory value: interpolation, validation, and which model it belongs to."""

import comfy.model_management
import comfy.model_sampling
import pytest
import torch
from palimpsest.inversion.fingerprint import model_fingerprint, same_model
from palimpsest.inversion.trajectory import Trajectory, clean_latent, prediction_type, start_latent
from palimpsest.tests.helpers.host_nodes import run_node
from palimpsest.tests.helpers.models import tiny_cond, tiny_sd2, tiny_sd15, tiny_sdxl

SIGMAS = torch.tensor([0.0, 0.5, 2.0, 11.03])
KEY = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"


def latents(batch=1, size=8, seed=0):
    return torch.randn(4, batch, 4, size, size, generator=torch.Generator().manual_seed(seed))


def trajectory(**changes):
    parts = dict(sigmas=SIGMAS, latents=latents(), conditioning=[], architecture="SD1.x", prediction="eps", fingerprint="x:")
    return Trajectory(**{**parts, **changes})


@pytest.fixture(scope="module")
def model():
    return tiny_sd15()


def lora(model, strength=0.5):
    patched = model.clone()
    shape = model.model_state_dict()[KEY].shape
    assert patched.add_patches({KEY: ("diff", (torch.ones(shape),))}, strength) == [KEY]
    return patched


def test_stored_levels_come_back_bit_for_bit():
    path = trajectory()
    for sigma, latent in zip(path.sigmas, path.latents):
        assert torch.equal(path.at(sigma), latent)
        assert torch.equal(path.at(float(sigma)), latent)


def test_between_levels_the_path_is_straight_in_sigma():
    path = trajectory()
    expected = path.latents[1] + (path.latents[2] - path.latents[1]) * ((1.2 - 0.5) / 1.5)
    assert torch.allclose(path.at(1.2), expected, atol=1e-6)


def test_beyond_the_ends_it_follows_the_last_segment():
    path = trajectory(sigmas=torch.tensor([0.1, 0.5, 2.0, 11.03]))
    slope = (path.latents[3] - path.latents[2]) / (11.03 - 2.0)
    assert torch.allclose(path.at(13.68), path.latents[3] + slope * (13.68 - 11.03), atol=1e-5)
    slope = (path.latents[1] - path.latents[0]) / 0.4
    assert torch.allclose(path.at(0.0), path.latents[0] - slope * 0.1, atol=1e-5)


def test_at_returns_a_tensor_of_its_own():
    path = trajectory()
    before = path.latents.clone()
    path.at(0.5).zero_()
    path.at(1.0).zero_()
    assert torch.equal(path.latents, before)


def test_the_callers_tensors_stay_the_callers():
    mine = latents()
    path = trajectory(latents=mine)
    kept = mine.clone()
    mine.zero_()
    assert torch.equal(path.latents, kept)


def test_latents_made_under_inference_mode_can_take_gradients_later():
    with torch.inference_mode():
        path = trajectory(latents=latents() * 2)
    weight = torch.ones((), requires_grad=True)
    (path.latents * weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"sigmas": SIGMAS[:1], "latents": latents()[:1]}, "at least two"),
        ({"sigmas": SIGMAS.flip(0)}, "ascending"),
        ({"sigmas": torch.tensor([0.0, 1.0, 1.0, 2.0])}, "ascending"),
        ({"sigmas": torch.tensor([-1.0, 1.0, 1.5, 2.0])}, "not negative"),
        ({"sigmas": torch.tensor([0.0, 1.0, float("nan"), 2.0])}, "finite"),
        ({"latents": latents()[:3]}, "4 noise levels"),
        ({"latents": latents()[:, 0]}, "shape"),
        ({"latents": latents()[:, :0]}, "shape"),
        ({"latents": latents() / 0}, "NaN"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(ValueError, match=words) as refused:
        trajectory(**changes)
    assert "\n" not in str(refused.value)


def test_start_latent_is_what_the_sampler_will_hold(model):
    path = Trajectory.for_model(model, SIGMAS, latents(batch=2), tiny_cond(), noise_mask=torch.ones(1, 64, 64))
    start = start_latent(path, model)
    held = model.get_model_object("latent_format").process_in(start["samples"])
    assert torch.allclose(held, path.latents[-1], rtol=1e-6, atol=0)
    assert torch.equal(start["noise_mask"], path.noise_mask)
    assert torch.equal(start_latent(path, model)["samples"], start["samples"])
    assert torch.allclose(clean_latent(path, model)["samples"] * 0.18215, path.latents[0], rtol=1e-5)


def test_lora_and_other_patches_keep_the_model_the_same(model):
    path = Trajectory.for_model(model, SIGMAS, latents())
    patched = lora(model)
    path.check_model(patched)
    patched.set_model_attn1_patch(lambda n, c, v, options: (n, c, v))
    path.check_model(patched)
    assert model_fingerprint(patched) == path.fingerprint


@pytest.fixture(scope="module")
def others():
    return [tiny_sd15(seed=seed, channel_mult=(1, 1, 1, 1)) for seed in range(3)]


def merged(model, other, ratio):
    """The host's node ModelMergeSimple."""
    return run_node("nodes_model_merging", "ModelMergeSimple", model, other, ratio)


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_a_merge_with_another_model_is_another_model(others, ratio):
    """Regression: a model whose every weight was replaced by ModelMergeSimple passed as the original."""
    model, second, third = others
    merge = merged(model, second, ratio)
    with pytest.raises(ValueError, match="another SD1.x model"):
        Trajectory.for_model(model, SIGMAS, latents()).check_model(merge)
    path = Trajectory.for_model(merge, SIGMAS, latents())
    path.check_model(merged(model, second, ratio))
    with pytest.raises(ValueError, match="another SD1.x model"):
        path.check_model(merged(model, third, ratio))


def test_a_merge_that_keeps_all_and_a_scaled_layer_are_the_same_model(others):
    path = Trajectory.for_model(others[0], SIGMAS, latents())
    path.check_model(merged(*others[:2], 1.0))
    path.check_model(run_node("nodes_attention_multiply", "UNetSelfAttentionMultiply", others[0], 0.9, 1.0, 1.0, 1.1))


def test_a_difference_that_replaces_a_part_of_the_weights_is_another_model(model):
    """As merging nodes of other packs add it."""
    patched = model.clone()
    patched.add_patches({KEY: ("diff", (torch.ones(model.model_state_dict()[KEY].shape),))}, 0.5, 0.5)
    with pytest.raises(ValueError, match="another SD1.x model"):
        Trajectory.for_model(model, SIGMAS, latents()).check_model(patched)


def test_adding_another_models_weights_makes_another_model(others):
    path = Trajectory.for_model(others[0], SIGMAS, latents())
    with pytest.raises(ValueError, match="another SD1.x model"):
        path.check_model(run_node("nodes_model_merging", "ModelAdd", *others[:2]))


def test_a_damaged_fingerprint_is_no_raw_error():
    """Regression: comparing with a fingerprint of odd length raised torch's or base64's own error."""
    for text in ("abc", "abc:AAAA", "abc:!", ""):
        with pytest.raises(ValueError, match="fingerprint"):
            same_model(text, "abc:AAA=")


def test_weights_patched_in_place_by_the_host_keep_the_model_the_same():
    model = tiny_sd15()
    before = model_fingerprint(model)
    value = model.model_state_dict()[KEY].clone()
    patched = lora(model)
    comfy.model_management.load_models_gpu([patched], force_patch_weights=True)
    try:
        assert not torch.equal(patched.model.state_dict()[KEY], value), "the host did not patch the weight; the test is empty"
        assert model_fingerprint(patched) == before
        assert model_fingerprint(model) == before
    finally:
        patched.detach()
    assert model_fingerprint(model) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loading_in_another_dtype_keeps_the_model_the_same(model, dtype):
    half = tiny_sd15(dtype=dtype)
    assert half.model.diffusion_model.out[2].weight.dtype == dtype
    Trajectory.for_model(model, SIGMAS, latents()).check_model(half)
    Trajectory.for_model(half, SIGMAS, latents()).check_model(model)


def test_a_single_changed_matrix_family_is_another_model(model):
    other = tiny_sd15()
    with torch.no_grad():
        for name, weight in other.model.diffusion_model.named_parameters():
            if "attn2.to_k" in name:
                weight.mul_(1.05)
    assert not same_model(model_fingerprint(other), model_fingerprint(model))


@pytest.mark.parametrize(
    "other, words",
    [
        (lambda: tiny_sd15(seed=1), "another SD1.x model"),
        (lambda: tiny_sd15(context_dim=512), "another SD1.x model"),
        (lambda: tiny_sd2(), "SD2.x"),
        (lambda: tiny_sdxl(), "SDXL"),
        (lambda: tiny_sd15(prediction="v_prediction"), "predicts eps"),
    ],
)
def test_another_model_is_refused(model, other, words):
    path = Trajectory.for_model(model, SIGMAS, latents())
    with pytest.raises(ValueError, match=words) as refused:
        start_latent(path, other())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("prediction", ["eps", "v_prediction", "edm"])
def test_prediction_type_of_the_model(prediction):
    assert prediction_type(tiny_sd15(prediction=prediction)) == prediction


def test_prediction_type_follows_an_object_patch(model):
    class Sampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.V_PREDICTION):
        pass

    patched = model.clone()
    patched.add_object_patch("model_sampling", Sampling(model.model.model_config))
    assert prediction_type(patched) == "v_prediction"


def test_flow_models_are_refused(model):
    class Sampling(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    patched = model.clone()
    patched.add_object_patch("model_sampling", Sampling())
    with pytest.raises(ValueError, match="CONST"):
        prediction_type(patched)
