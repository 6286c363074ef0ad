"""The picture of an edit: encoded as the model was trained, attached to the prompts, batches and masks."""

import logging

import pytest
import torch

from palimpsest.instruct_pix2pix.conditioning import edit_inputs
from palimpsest.instruct_pix2pix.guidance import add_image_guidance
from palimpsest.mini import checkpoint
from palimpsest.mini.storage import read_weights
from palimpsest.tests.helpers.host_nodes import run_node
from palimpsest.tests.helpers.instruct_pix2pix import relative
from palimpsest.tests.helpers.models import tiny_cond
from palimpsest.tests.helpers.sampling import ksampler
from palimpsest.tests.helpers.seecoder import random_picture


@pytest.fixture(scope="module")
def vae():
    return checkpoint.load_vae(read_weights(checkpoint.WEIGHTS / "autoencoder.safetensors")[0])


@torch.inference_mode()
def made(vae, image, **options):
    return edit_inputs(tiny_cond(seed=1), tiny_cond(seed=2), vae, image, **{"longer_side": 128, **options})


def test_the_latent_is_what_the_vae_gives_unscaled_on_both_prompts_and_not_on_the_third(vae):
    image = random_picture(128, 128)
    found = made(vae, image)
    with torch.inference_mode():
        expected = vae.encode(image)
    for conditioning, seed in ((found.positive, 1), (found.negative, 2)):
        assert torch.equal(conditioning[0][1]["concat_latent_image"], expected) and torch.equal(conditioning[0][0], tiny_cond(seed=seed)[0][0])
    assert found.no_image[0][1] == {} and torch.equal(found.no_image[0][0], found.negative[0][0])
    assert found.latent.keys() == {"samples"} and found.latent["samples"].shape == expected.shape and not found.latent["samples"].any()
    assert torch.equal(found.picture, image) and found.describe() == "1 picture edited at 128 x 128 px"


def test_at_its_own_size_it_is_the_hosts_node(vae):
    """InstructPixToPixConditioning cuts to multiples of 8 and gives the same latent."""
    image = random_picture(101, 150)
    found = made(vae, image, longer_side=0)
    with torch.inference_mode():
        theirs = run_node("nodes_ip2p", "InstructPixToPixConditioning", tiny_cond(seed=1), tiny_cond(seed=2), pixels=image, vae=vae)
    assert torch.equal(found.positive[0][1]["concat_latent_image"], theirs[0][1]["concat_latent_image"])
    assert found.picture.shape == (1, 96, 144, 3)


def test_a_picture_is_brought_to_the_published_size(vae):
    found = made(vae, random_picture(200, 300))
    assert found.picture.shape == (1, 128, 192, 3) and found.latent["samples"].shape == (1, 4, 16, 24)


def test_what_the_prompts_carried_stays_but_an_older_picture(vae):
    positive = [[tiny_cond()[0][0], {"strength": 0.5, "concat_latent_image": torch.zeros(1)}]]
    with torch.inference_mode():
        found = edit_inputs(positive, positive, vae, random_picture(128, 128), 128)
    assert found.positive[0][1]["strength"] == 0.5 and found.positive[0][1]["concat_latent_image"].ndim == 4
    assert found.no_image[0][1] == {"strength": 0.5} and positive[0][1]["concat_latent_image"].ndim == 1, "the given prompt is not changed"


def test_batches_grey_and_transparent_pictures(vae):
    assert made(vae, random_picture(128, 192, batch=3)).latent["samples"].shape[0] == 3
    assert made(vae, random_picture(128, 128, channels=1)).picture.shape[-1] == 3
    clear = torch.cat([torch.zeros(1, 128, 128, 3), torch.zeros(1, 128, 128, 1)], -1)
    assert torch.equal(made(vae, clear).picture, torch.ones(1, 128, 128, 3)), "transparency becomes white"


def test_a_mask_keeps_the_picture_where_it_is_black_and_starts_from_noise_where_it_is_white(vae):
    mask = torch.zeros(1, 128, 128)
    mask[:, :, 61:] = 1
    found = made(vae, random_picture(128, 128), mask=mask)
    encoded, samples = found.positive[0][1]["concat_latent_image"], found.latent["samples"]
    assert torch.equal(found.latent["noise_mask"], mask[:, None])
    assert torch.equal(samples[..., :8], encoded[..., :8]) and not samples[..., 8:].any(), "the cell that the edge crosses is the picture's"
    assert "52 % of the picture may change" in found.describe()


@pytest.mark.parametrize("count", [1, 2])
def test_masks_of_batches(vae, count):
    masks = torch.ones(count, 64, 64)
    assert made(vae, random_picture(128, 128, batch=2), mask=masks).latent["noise_mask"].shape == (count, 1, 128, 128)


def test_a_black_mask_is_said(vae, caplog):
    with caplog.at_level(logging.WARNING, "palimpsest"):
        made(vae, random_picture(128, 128), mask=torch.zeros(1, 64, 64))
    assert "the mask is black everywhere" in caplog.text


def test_it_runs_on_the_stock_sampler_with_a_mask(vae):
    from palimpsest.tests.helpers.instruct_pix2pix import tiny_edit

    mask = torch.zeros(1, 128, 128)
    mask[:, 64:] = 1
    found = made(vae, random_picture(128, 128, batch=2), mask=mask)
    out = ksampler(add_image_guidance(tiny_edit()), found.latent, found.positive, found.negative)
    encoded = found.positive[0][1]["concat_latent_image"]
    assert torch.allclose(out[:, :, :8], encoded[:, :, :8], atol=1e-4) and relative(out[:, :, 8:], encoded[:, :, 8:]) > 0.1


class OtherVAE:
    def __init__(self, latent):
        self.latent = latent

    def spacial_compression_encode(self):
        return 8

    def encode(self, pixels):
        return self.latent


@pytest.mark.parametrize("change, words", [
    (dict(image=torch.zeros(0, 64, 64, 3)), "no picture to edit"),
    (dict(positive=[]), "The positive holds no prompt"),
    (dict(negative=[]), "The negative holds no prompt"),
    (dict(image=torch.zeros(3, 128, 128, 3), mask=torch.ones(2, 64, 64)), "2 masks for 3 pictures"),
    (dict(vae=OtherVAE(torch.zeros(1, 16, 16, 16))), r"shape \[1, 16, 16, 16\]"),
    (dict(vae=OtherVAE(torch.zeros(1, 16, 1, 16, 16))), "connect the VAE of the edit checkpoint"),
    (dict(vae=OtherVAE(torch.full((1, 4, 16, 16), float("nan")))), "NaN or infinite"),
    (dict(image=torch.zeros(1, 128, 128, 2)), "has 2"),
    (dict(image=torch.zeros(1, 4, 128, 3), longer_side=0), "too small"),
])
def test_what_cannot_work_is_one_sentence(vae, change, words):
    inputs = {"positive": tiny_cond(), "negative": tiny_cond(), "vae": vae, "image": torch.zeros(1, 128, 128, 3), "longer_side": 128, **change}
    with pytest.raises(ValueError, match=words) as error:
        edit_inputs(**inputs)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)
