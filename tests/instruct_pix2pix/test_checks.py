"""Which models can edit by instruction, and what the others are told."""

import pytest

from palimpsest.instruct_pix2pix.checks import check_edit_model
from palimpsest.instruct_pix2pix.guidance import add_image_guidance
from palimpsest.tests.helpers.instruct_pix2pix import tiny_edit, tiny_edit_xl
from palimpsest.tests.helpers.models import SD15_LAYOUT, _build, tiny_sd15


def inpainting():
    import comfy.supported_models

    layout = {**SD15_LAYOUT, "model_channels": 32, "context_dim": 768, "channel_mult": [1, 1, 1, 1], "in_channels": 9}
    return _build(comfy.supported_models.SD15, layout, None, "eps", 0)


def eight_channels_of_no_edit_model():
    import comfy.supported_models

    layout = {**SD15_LAYOUT, "model_channels": 32, "context_dim": 768, "channel_mult": [1, 1, 1, 1], "in_channels": 8}
    return _build(comfy.supported_models.SD15, layout, None, "eps", 0)


class Transformer:
    """As much of a DiT's patcher as the check looks at."""

    class Flux:
        diffusion_model = object()

    model = Flux()


@pytest.mark.parametrize("build, words", [
    (lambda: tiny_sd15(channel_mult=(1, 1, 1, 1)), "takes 4, as an ordinary text-to-image model: load an instruct-pix2pix checkpoint or CosXL-Edit."),
    (inpainting, "takes 9, as an inpainting model"),
    (eight_channels_of_no_edit_model, "is BaseModel, to which ComfyUI gives no picture although its first layer takes 8 channels"),
    (lambda: tiny_edit(in_channels=12), "takes 12: load"),
    (Transformer, "is Flux: load"),
])
def test_others_are_refused_in_one_sentence_when_the_node_runs(build, words):
    with pytest.raises(ValueError) as error:
        add_image_guidance(build())
    message = str(error.value)
    assert words in message and message.startswith("InstructPix2Pix CFG needs an edit model") and message.endswith(".") and "\n" not in message


def test_a_scale_of_one_refuses_them_too():
    with pytest.raises(ValueError, match="takes 4"):
        add_image_guidance(tiny_sd15(channel_mult=(1, 1, 1, 1)), 1.0)


@pytest.mark.parametrize("build", [tiny_edit, tiny_edit_xl, lambda: tiny_edit_xl(cosxl=True)])
def test_edit_models_pass(build):
    check_edit_model(build(), "The test")
