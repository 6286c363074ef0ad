"""Small models, prompts and paths; CLIPs of the host that only tokenize; the published cases."""

import json

import pytest
from safetensors.torch import load_file

from palimpsest.p2p.tokens import read_tokens
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


def text_only(tokenizer):
    """A CLIP of the host with this tokenizer and no network."""
    import comfy.sd

    clip = comfy.sd.CLIP(no_init=True)
    clip.tokenizer, clip.tokenizer_options = tokenizer, {}
    return clip


@pytest.fixture(scope="session")
def sd1():
    import comfy.sd1_clip

    return text_only(comfy.sd1_clip.SD1Tokenizer())


@pytest.fixture(scope="session")
def sd2():
    import comfy.text_encoders.sd2_clip

    return text_only(comfy.text_encoders.sd2_clip.SD2Tokenizer())


@pytest.fixture(scope="session")
def sdxl():
    import comfy.sdxl_clip

    return text_only(comfy.sdxl_clip.SDXLTokenizer())


@pytest.fixture(scope="session")
def read(sd1):
    """Text to PromptTokens under SD1's tokenizer."""
    return lambda text: read_tokens(sd1, text)


@pytest.fixture(scope="session")
def cases(oracles):
    """Names, prompts and settings of the published results."""
    return json.loads((oracles / "p2p" / "mappers.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def published(oracles):
    """The published results."""
    return load_file(oracles / "p2p" / "mappers.safetensors")
