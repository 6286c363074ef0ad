"""MRSA Concept Composer and Concept Attention Preview: schema and wiring."""

import pytest
import torch

from palimpsest.attention_patches.concept_run import FIXED
from palimpsest.attention_patches.mrsa import compose
from palimpsest.nodes.mrsa import ConceptAttentionPreview, MRSAConceptComposer
from palimpsest.tests.helpers.concepts import concept, concepts
from palimpsest.tests.helpers.models import tiny_cond, tiny_sd15
from palimpsest.tests.helpers.sampling import ksampler

ZERO = torch.zeros(2, 4, 16, 16)
PROMPTS = tiny_cond(seed=1), tiny_cond(seed=2)


@pytest.fixture(scope="module")
def model():
    return tiny_sd15(channel_mult=(1, 1, 1, 1))


def defaults():
    return {item.id: item.default for item in MRSAConceptComposer.define_schema().inputs if getattr(item, "default", None) is not None}


def run(model, *items, **changed):
    return MRSAConceptComposer.execute(model=model, concepts=concepts(*items), **{**defaults(), **changed}).args


def test_ids_and_order_of_inputs_are_for_ever():
    composer, preview = MRSAConceptComposer.define_schema(), ConceptAttentionPreview.define_schema()
    assert (composer.node_id, preview.node_id) == ("PalimpsestMRSAConceptComposer", "PalimpsestConceptAttentionPreview")
    assert [item.id for item in composer.inputs] == [
        "model", "concepts", "layers", "start", "end", "style_fidelity", "rule", "noise", "reference_seed", "watch", "bank_device", "empty_prompt",
        "watch_layers", "watch_start", "watch_end"]
    assert [item.id for item in composer.outputs] == ["composing_model", "shares", "report"]
    assert [item.id for item in preview.inputs] == ["shares", "latent", "image"] and [item.id for item in preview.outputs] == ["sheet", "maps"]


def test_defaults_are_the_published_ones():
    values = defaults()
    assert (values["layers"], values["start"], values["end"], values["style_fidelity"]) == ("preset default", 0.0, 1.0, 1.0)
    assert values["rule"] == "code" and values["noise"].startswith("fresh") and values["watch"] is False


def test_the_model_is_the_composed_one_and_the_report_says_what_is_seen(model):
    composed, _, report = run(model, concept(0), concept(1, weight=3.0))
    expected = compose(model, concepts(concept(0), concept(1, weight=3.0)))[0]
    assert torch.equal(ksampler(composed, ZERO, *PROMPTS), ksampler(expected, ZERO, *PROMPTS))
    assert "self-attention: 6 layers, 0 to 1 of the schedule" in report and "concept 2: weight 3" in report and "rows per step: 2 more" in report


@pytest.mark.parametrize("changed", [
    {"layers": "u6-8"}, {"start": 0.5}, {"end": 0.5}, {"style_fidelity": 0.5}, {"rule": "paper"}, {"noise": FIXED}, {"reference_seed": 7}, {"empty_prompt": tiny_cond(seed=9)}])
def test_every_widget_reaches_the_model(model, changed):
    plain, other = run(model, concept(0))[0], run(model, concept(0), **changed)[0]
    assert not torch.equal(ksampler(plain, ZERO, *PROMPTS), ksampler(other, ZERO, *PROMPTS))


def test_the_reference_seed_is_the_samplers_unless_it_is_given(model):
    followed, given = run(model, concept(0))[0], run(model, concept(0), reference_seed=1)[0]
    assert torch.equal(ksampler(followed, ZERO, *PROMPTS, seed=1), ksampler(given, ZERO, *PROMPTS, seed=1))
    assert not torch.equal(ksampler(followed, ZERO, *PROMPTS, seed=2), ksampler(given, ZERO, *PROMPTS, seed=2))


def test_shares_are_shown_per_picture_and_concept(model):
    composed, shares, _ = run(model, concept(0, weight=3.0), concept(1, weight=0.5), watch=True)
    with pytest.raises(ValueError, match="There are no attention shares to show because the patched MODEL has not been sampled"):
        ConceptAttentionPreview.execute(shares=shares, latent=None, image=torch.rand(2, 128, 128, 3))
    out = ksampler(composed, ZERO, *PROMPTS)
    sheet, maps = ConceptAttentionPreview.execute(shares=shares, latent={"samples": out}, image=torch.rand(2, 128, 128, 3)).args
    assert maps.shape == (4, 16, 16) and sheet.shape[0] == 1 and sheet.shape[-1] == 3
    # pictures first, concepts within; one with more weight is looked at more
    assert bool((maps > 0).all()) and bool((maps < 1).all()) and float(maps[0].mean()) > float(maps[1].mean()) and float(maps[2].mean()) > float(maps[3].mean())


def test_shares_of_a_wide_picture_lie_the_right_way(model):
    composed, shares, report = run(model, concept(0), concept(1, size=(24, 8)), watch=True, watch_layers="u6-8", watch_start=0.5)
    assert "watched: 3 of these layers, 0.5 to 1 of the schedule" in report
    out = ksampler(composed, torch.zeros(1, 4, 10, 22), *PROMPTS)
    sheet, maps = ConceptAttentionPreview.execute(shares=shares, latent={"samples": out}, image=torch.rand(1, 80, 176, 3)).args
    assert maps.shape == (2, 10, 22) and bool((maps > 0).all()) and sheet.shape[2] > sheet.shape[1]


def test_shares_of_concepts_without_effect_are_explained(model):
    """Regression: the message asked for a sampler although one had run."""
    composed, shares, _ = run(model, concept(0, empty=True), watch=True)
    ksampler(composed, ZERO, *PROMPTS, steps=1)
    with pytest.raises(ValueError, match="There are no attention shares to show because no concept has an effect") as error:
        ConceptAttentionPreview.execute(shares=shares, latent=None, image=torch.rand(2, 128, 128, 3))
    assert "has not been sampled" not in str(error.value) and str(error.value).endswith(".")


def test_shares_without_watch_are_explained(model):
    _, shares, _ = run(model, concept(0))
    with pytest.raises(ValueError, match="switch its watch on"):
        ConceptAttentionPreview.execute(shares=shares, latent=None, image=torch.rand(1, 128, 128, 3))


def test_numbers_of_a_concept_without_effect_stay_its_own(model):
    """Regression: the second concept's map was called that of the first when the first had no effect."""
    composed, shares, _ = run(model, concept(0, empty=True), concept(1), watch=True)
    out = ksampler(composed, ZERO, *PROMPTS)
    _, maps = ConceptAttentionPreview.execute(shares=shares, latent={"samples": out}, image=torch.rand(2, 128, 128, 3)).args
    assert maps.shape == (4, 16, 16)
    assert float(maps[0].max()) == 0.0 == float(maps[2].max()) and float(maps[1].min()) > 0.0
