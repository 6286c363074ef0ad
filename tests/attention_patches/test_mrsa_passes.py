"""When the references run and who sees them: prompts of a part of the schedule, calls without a negative, context windows, thin masks, watching."""

import nodes
import pytest
import torch

from palimpsest.attention_patches.mrsa import compose
from palimpsest.attention_patches.mrsa_concept import Concept
from palimpsest.attention_patches.reference_pass import edits_of
from palimpsest.tests.helpers.concepts import concept, concepts
from palimpsest.tests.helpers.explicit_mrsa import Steps, explicit_step
from palimpsest.tests.helpers.models import tiny_cond
from palimpsest.tests.helpers.sampling import OneByOne, Watch, ksampler, latent_noise

ZERO = torch.zeros(1, 4, 16, 16)


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("fidelity", [1.0, 0.5])
def test_a_concept_that_is_switched_off_leaves_the_others_as_they_are(model, positive, negative, fidelity, caplog):
    """Regression: ConditioningSetTimestepRange on one concept's prompt switched all concepts off beyond its range."""
    (early,) = nodes.ConditioningSetTimestepRange().set_range(tiny_cond(seed=21), 0.0, 0.4)
    items, limit = [concept(0), concept(1, cond=early)], float(model.get_model_object("model_sampling").percent_to_sigma(0.4))
    composed, steps = compose(model, concepts(*items), fidelity=fidelity, seed=5)[0], Steps()
    with caplog.at_level("INFO", logger="palimpsest"):
        ksampler(steps.on(composed), ZERO, positive, negative, steps=3)
    there = []
    for x, sigma, uncond, cond in steps.seen:
        active = [(place, item) for place, item in enumerate(items) if place == 0 or sigma >= limit]
        there.append(len(active))
        expected = explicit_step(model, x, sigma, (positive, negative), active, 5, fidelity=fidelity)
        assert relative(uncond, expected[0]) < 1e-5 and relative(cond, expected[1]) < 1e-5, f"sigma {sigma:.3f}"
    assert set(there) == {1, 2}
    assert sum("a concept's prompt is switched off at some steps" in line for line in caplog.messages) == 1


@pytest.mark.parametrize("cfg, rows", [(1.0, 2), (4.0, 4)])
def test_the_negative_references_run_only_where_a_negative_does(model, positive, negative, cfg, rows):
    composed, _, _ = compose(model, concepts(concept(0), concept(1)), fidelity=0.5)
    watch = Watch()
    ksampler(watch.on(composed), ZERO, positive, negative, cfg=cfg)
    assert watch.counters.source_rows == 4 * rows


def test_a_later_call_without_a_negative_uses_the_same_pass(model, positive, negative):
    """PAG asks for the positive once more at every step."""
    from palimpsest.tests.helpers.host_nodes import pag

    composed, _, _ = compose(pag(model), concepts(concept(0)), fidelity=0.5)
    watch = Watch()
    ksampler(watch.on(composed), ZERO, positive, negative)
    assert watch.counters.source_calls == 4 * 2


def test_a_negative_of_areas_only_is_explained(model, positive, negative, caplog):
    (area,) = nodes.ConditioningSetArea().append(negative, 64, 128, 64, 0, 1.0)
    composed, _, _ = compose(model, concepts(concept(0)), fidelity=0.5, seed=3)
    watch = Watch()
    with caplog.at_level("INFO", logger="palimpsest"):
        out = ksampler(watch.on(composed), ZERO, positive, area)
    assert any("the negative prompt has no entry for the whole picture" in line for line in caplog.messages) and not any("switched off" in line for line in caplog.messages)
    assert watch.counters.source_calls == 4
    assert torch.equal(out, ksampler(compose(model, concepts(concept(0)), seed=3)[0], ZERO, positive, area)), "that half sees nothing, as with fidelity 1"


def test_context_windows_share_one_pass_of_the_references(model, positive, negative):
    """Regression: the same references ran again for every window."""
    pytest.importorskip("comfy.context_windows")
    composed, latent, watch = compose(model, concepts(concept(0)), seed=3)[0], latent_noise(2, 4, 16, 16), Watch()
    windowed = composed.clone()
    windowed.model_options["context_handler"] = OneByOne()
    assert relative(ksampler(watch.on(windowed), latent, positive, negative), ksampler(composed, latent, positive, negative)) < 1e-4
    assert watch.counters.source_calls == 4


def thin():
    """Kept at 16 x 16 tokens, thinner than half a token at 8 x 8."""
    mask = torch.zeros(128, 128)
    mask[:, 32:38] = 1.0
    return Concept(torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), mask, tiny_cond(), 2.0, torch.rand(128, 128, 3))


def test_effect_is_judged_at_the_sizes_of_the_chosen_layers(model, caplog):
    """Regression: a thing kept at the finest size only ran a pass per step for layers that never saw it, without a word."""
    coarse, _, report = compose(model, concepts(thin()), layers="u3-5")
    assert edits_of(coarse) == () and "concept 1: weight 2, latent 16 x 16, no effect: its mask keeps no token at the sizes of these layers" in report
    assert sum("concept 1 has no effect, its mask keeps no token at the sizes of the chosen layers" in line for line in caplog.messages) == 1
    fine, _, report = compose(model, concepts(thin()), layers="u6-8")
    assert len(edits_of(fine)) == 1 and "no effect" not in report
    (edit,) = edits_of(compose(model, concepts(thin(), concept(1)), layers="u3-5")[0])
    assert edit.numbers == (1,), "no pass for what is not seen"


def test_watching_is_limited_to_its_layers_and_window(model, positive, negative):
    items = concepts(concept(0, weight=3.0), concept(1))
    composed, shares, report = compose(model, items, seed=1, watch=True, watch_layers="d0,u6-8", watch_end=0.5)
    assert "watched: 3 of these layers, 0 to 0.5 of the schedule" in report
    out = ksampler(composed, ZERO, positive, negative)
    assert torch.equal(out, ksampler(compose(model, items, seed=1)[0], ZERO, positive, negative))
    found = shares.read()
    assert {(point.part, point.number) for point in found} == {("output", number) for number in (9, 10, 11)}
    assert all(0 < steps < 4 for _, steps, _ in found.values())


def test_shares_in_an_area_prompts_run_are_of_the_whole_picture(model, positive, negative):
    (area,) = nodes.ConditioningSetArea().append(tiny_cond(seed=3), 64, 128, 64, 0, 1.0)
    composed, shares, _ = compose(model, concepts(concept(0)), watch=True, layers="u6")
    ksampler(composed, torch.zeros(1, 4, 12, 20), nodes.ConditioningCombine().combine(positive, area)[0], negative)
    ((maps, steps, _),) = shares.read().values()
    assert maps.shape == (1, 12, 20, 1) and steps == 4
