"""CLIPs of the host that only tokenize, and the published cases."""

import json

import pytest
from safetensors.torch import load_file

from palimpsest.p2p.tokens import read_tokens


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
