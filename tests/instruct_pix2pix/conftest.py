"""A small random edit model and two prompts with a picture."""

import pytest

from palimpsest.tests.helpers.instruct_pix2pix import edit_cond, picture_latent, tiny_edit
from palimpsest.tests.helpers.sampling import latent_noise


@pytest.fixture(scope="module")
def model():
    return tiny_edit()


@pytest.fixture(scope="module")
def picture():
    return picture_latent()


@pytest.fixture(scope="module")
def positive(picture):
    return edit_cond(picture, seed=1)


@pytest.fixture(scope="module")
def negative(picture):
    return edit_cond(picture, seed=2)


@pytest.fixture(scope="module")
def start():
    return latent_noise(1, 4, 16, 16) * 0
