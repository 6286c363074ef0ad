"""P2P Controller, Local Blend and Mask Preview: schema and wiring."""

import pytest
import torch
from comfy_execution.graph_utils import ExecutionBlocker

from palimpsest.nodes.p2p import P2PController, P2PLocalBlend, P2PMaskPreview
from palimpsest.p2p.apply import Settings, apply_p2p
from palimpsest.tests.helpers.models import tiny_cond, tiny_sd15, tiny_trajectory
from palimpsest.tests.helpers.prompts import WordClip
from palimpsest.tests.helpers.sampling import ksampler

SOURCE, SWAP = "a cat on a red sofa", "a dog on a red sofa"
ZERO = torch.zeros(1, 4, 16, 16)


@pytest.fixture(scope="module")
def model():
    return tiny_sd15(channel_mult=(1, 1, 1, 1))


def defaults(node):
    return {item.id: item.default for item in node.define_schema().inputs if getattr(item, "default", None) is not None}


def controlled(model, **changed):
    values = {**defaults(P2PController), "source_prompt": SOURCE, "edit_prompt": SWAP, **changed}
    return P2PController.execute(model=model, clip=WordClip(), **values).args


def test_ids_and_order_of_inputs_are_for_ever():
    assert [node.define_schema().node_id for node in (P2PController, P2PLocalBlend, P2PMaskPreview)] == [
        "PalimpsestP2PController", "PalimpsestP2PLocalBlend", "PalimpsestP2PMaskPreview",
    ]
    assert [item.id for item in P2PController.define_schema().inputs] == [
        "model", "clip", "source_prompt", "edit_prompt", "mode", "cross_start", "cross_end", "self_start", "self_end", "word_schedule", "word_weights",
        "self_limit", "tail", "trajectory", "source", "bank_device",
    ]
    assert [item.id for item in P2PLocalBlend.define_schema().inputs] == [
        "model", "words", "source_words", "subtract", "threshold", "subtract_threshold", "start", "pooling", "mask",
    ]
    assert [item.id for item in P2PMaskPreview.define_schema().inputs] == ["masks", "latent", "image", "columns"]


def test_defaults_are_the_published_ones():
    values = defaults(P2PController)
    assert (values["cross_start"], values["cross_end"], values["self_start"], values["self_end"], values["self_limit"]) == (0.0, 0.8, 0.0, 0.4, 0.25)
    assert (values["mode"], values["tail"]) == ("auto", "aligned")
    blend = defaults(P2PLocalBlend)
    assert (blend["threshold"], blend["start"], blend["pooling"]) == (0.3, 0.2, True)


def test_the_controller_gives_model_prompts_report_and_picture(model):
    edited, positive, source, start, report, picture = controlled(model)
    assert isinstance(start, ExecutionBlocker) and "no TRAJECTORY" in start.message
    assert picture.shape[0] == 1 and picture.shape[-1] == 3 and 0 <= float(picture.min()) and float(picture.max()) <= 1
    assert "replace" in report and torch.equal(source[0][0], WordClip().encode_from_tokens_scheduled(WordClip().tokenize(SOURCE))[0][0])
    expected = apply_p2p(model, WordClip(), SOURCE, SWAP, Settings())
    negative = tiny_cond(seed=2)
    assert torch.equal(ksampler(edited, ZERO, positive, negative), ksampler(expected.model, ZERO, expected.positive, negative))


def test_with_a_trajectory_it_gives_the_start(model):
    trajectory = tiny_trajectory(model)
    start = controlled(model, trajectory=trajectory)[3]
    assert torch.allclose(start["samples"], trajectory.latents[-1] / 0.18215)


def test_several_edit_prompts_give_one_picture_each(model):
    _, positive, _, _, _, picture = controlled(model, edit_prompt="a dog on a red sofa\n---\na big cat on a red sofa in a garden")
    assert picture.shape[0] == 2 and positive[0][0].shape[0] == 2


def test_weights_of_words_in_one_of_several_prompts_only(model):
    report = controlled(model, edit_prompt="a dog on a red sofa\n---\na tiger on a red sofa", word_weights="tiger: x2")[4]
    assert "tiger" in report
    with pytest.raises(ValueError, match="bird"):
        controlled(model, edit_prompt="a dog on a red sofa\n---\na tiger on a red sofa", word_weights="bird: x2")


def test_blend_and_mask_preview(model):
    edited, positive, *_ = controlled(model)
    blended, masks = P2PLocalBlend.execute(model=edited, **{**defaults(P2PLocalBlend), "words": "dog", "source_words": "cat"}).args
    with pytest.raises(ValueError, match="There are no blend masks to show"):
        P2PMaskPreview.execute(masks=masks, latent=None, image=torch.rand(1, 128, 128, 3), columns=8)
    out = ksampler(blended, ZERO, positive, tiny_cond(seed=2), steps=6)
    preview, last = P2PMaskPreview.execute(masks=masks, latent={"samples": out}, image=torch.rand(1, 128, 128, 3), columns=3).args
    assert preview.shape[0] == 1 and preview.shape[-1] == 3 and last.shape == (1, 16, 16)
