"""The MRSA Concept node: schema and wiring, on a picture and a VAE of the mini family."""

import pytest
import torch

from palimpsest.attention_patches import mrsa_concept
from palimpsest.attention_patches.mrsa_masks import MASK_POLICIES, RESIZES
from palimpsest.mini import checkpoint, scenes
from palimpsest.mini.storage import read_weights
from palimpsest.nodes.mrsa_concept import MRSAConcept
from palimpsest.tests.helpers.models import tiny_cond

COND = tiny_cond()


@pytest.fixture(scope="module")
def vae():
    return checkpoint.load_vae(read_weights(checkpoint.WEIGHTS / "autoencoder.safetensors")[0])


@pytest.fixture(scope="module")
def scene():
    drawn = scenes.sample_scene(7, 1)
    return torch.from_numpy(scenes.render(drawn))[None], torch.from_numpy(scenes.masks(drawn))


def defaults():
    return {item.id: item.default for item in MRSAConcept.define_schema().inputs if getattr(item, "default", None) is not None}


@torch.inference_mode()
def run(scene, decoder, **changed):
    image, mask = scene
    given = {"image": image, "mask": mask, "vae": decoder, "picture_prompt": COND, "width": 128, "height": 128}
    return MRSAConcept.execute(**{**defaults(), **given, **changed}).args


def test_ids_and_order_of_inputs_are_for_ever():
    schema = MRSAConcept.define_schema()
    assert schema.node_id == "PalimpsestMRSAConcept"
    assert [item.id for item in schema.inputs] == [
        "mask", "picture_prompt", "weight", "resize", "width", "height", "mask_policy", "mask_threshold", "image", "vae", "latent", "concept"]
    assert [(item.id, item.io_type) for item in schema.outputs] == [("concepts", "PALIMPSEST_CONCEPT"), ("preview", "IMAGE"), ("report", "STRING")]
    assert RESIZES == ("crop", "whole", "squash (published)") and MASK_POLICIES == ("area", "255 only (published)")


def test_defaults_are_the_published_ones_where_they_serve():
    values = defaults()
    assert (values["weight"], values["width"], values["height"], values["resize"], values["mask_policy"], values["mask_threshold"]) == (3.0, 512, 512, "crop", "area", 0.5)


def test_a_picture_becomes_a_concept_with_preview_and_report(scene, vae):
    concepts, preview, report = run(scene, vae)
    (concept,) = concepts
    assert torch.equal(concept.latent, vae.encode(scene[0])) and concept.conditioning is COND and concept.weight == 3.0
    covered = torch.nn.functional.avg_pool2d(scene[1][None], 8)[0, 0] >= 0.5
    assert torch.equal(concept.layer_mask((16, 16)).bool(), covered) and covered.any() and not covered.all()
    assert preview.shape[0] == 1 and preview.shape[2] == 5 * 194
    assert report.splitlines()[0] == "concept 1: 128 x 128 px, weight 3, from 128 x 128 px" and f"{int(covered.sum())} of 256 at 16 x 16" in report


def test_a_mask_of_another_aspect_is_reported(scene, vae):
    assert "mask: 64 x 32 px, stretched to the picture's 128 x 128" in run(scene, vae, mask=torch.ones(1, 32, 64))[2]
    assert "stretched" not in run(scene, vae)[2] and "stretched" not in run(scene, vae, mask=torch.ones(1, 64, 64))[2]


def test_concepts_chain_to_any_number(scene, vae):
    chain = None
    for weight in (3.0, 2.0, -1.0):
        before, (chain, _, report) = chain, run(scene, vae, weight=weight, concept=chain)
        assert before is None or list(chain)[: len(before)] == list(before)
    assert [concept.weight for concept in chain] == [3.0, 2.0, -1.0] and report.startswith("concept 3: ")


def test_every_widget_reaches_the_concept(scene, vae):
    def concept(**changed):
        return list(run(scene, vae, **changed)[0])[0]

    plain = concept()
    assert concept(width=192, height=64).size == (8, 24)
    assert concept(width=192, height=64, resize="whole").size == (14, 14)
    squashed = concept(width=192, height=64, resize="squash (published)")
    assert squashed.size == (8, 24) and torch.equal(squashed.picture, scene[0][0, ::2][:, torch.arange(192) * 128 // 192])
    published = concept(mask_policy="255 only (published)")
    assert torch.equal(published.mask, (scene[1][0] * 255).round().eq(255).float())
    touched = concept(mask_threshold=0.0)
    assert touched.layer_mask((4, 4)).sum() > plain.layer_mask((4, 4)).sum()


def test_a_latent_takes_the_place_of_the_picture(scene, vae):
    latent = {"samples": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))}
    concepts, preview, report = run(scene, None, image=None, latent=latent)
    assert torch.equal(list(concepts)[0].latent, latent["samples"]) and report.startswith("concept 1: 128 x 128 px, weight 3\n")
    assert not torch.equal(preview, run(scene, vae, image=None, latent=latent)[1]), "with a VAE the preview shows the picture"


@pytest.mark.parametrize("message, changed", [
    ("neither is connected: connect one of them", {"image": None}),
    ("both are connected: connect one of them", {"latent": {"samples": torch.zeros(1, 4, 16, 16)}}),
    ("no VAE is connected", {"vae": None}),
    ("one mask, but there are 2", {"mask": torch.ones(2, 128, 128)}),
    ("picture_prompt conditioning is empty", {"picture_prompt": []}),
])
def test_what_does_not_fit_is_refused_in_one_sentence(scene, vae, message, changed):
    with pytest.raises(ValueError, match=message) as error:
        run(scene, vae, **changed)
    assert "\n" not in str(error.value)


def test_cancel_is_heard_before_the_vae(scene, vae, monkeypatch):
    import comfy.model_management as mm

    monkeypatch.setattr(vae, "encode", lambda pixels: pytest.fail("encoded"))
    mm.interrupt_current_processing()
    try:
        with pytest.raises(mm.InterruptProcessingException):
            run(scene, vae)
    finally:
        mm.interrupt_current_processing(False)


def test_the_help_says_how_the_prompt_must_be():
    text = next(item.tooltip for item in MRSAConcept.define_schema().inputs if item.id == "picture_prompt")
    assert "whole picture" in text and "worn, held or used" in text
    assert mrsa_concept.PROMPT == "picture_prompt", "messages call the input by its name"
