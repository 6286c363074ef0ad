"""Small models, prompts and paths for the tests of this folder."""

import pytest

from palimpsest.tests.helpers.models import tiny_cond, tiny_sd15, tiny_trajectory
from palimpsest.tests.helpers.prompts import WordClip


@pytest.fixture(scope="session")
def model():
    return tiny_sd15(channel_mult=(1, 1, 1, 1))


@pytest.fixture(scope="session")
def clip():
    return WordClip()


@pytest.fixture(scope="session")
def negative():
    return tiny_cond(seed=2)


@pytest.fixture(scope="session")
def trajectory(model, clip):
    return tiny_trajectory(model, cond=clip.encode_from_tokens_scheduled(clip.tokenize("a cat on a red sofa")))


@pytest.fixture(scope="session")
def start(model, trajectory):
    """LATENT samples of the trajectory's noise."""
    from palimpsest.inversion.trajectory import start_latent

    return start_latent(trajectory, model)["samples"]
