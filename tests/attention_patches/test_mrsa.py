"""The MRSA composer through the host's stock samplers: an independent whole-UNet implementation, neutrality, rows, batches, other nodes."""

import pytest
import torch

from palimpsest.attention_patches.concept_run import FIXED, FRESH, noise_like
from palimpsest.attention_patches.mrsa import compose
from palimpsest.attention_patches.mrsa_attention import CODE, PAPER
from palimpsest.attention_patches.mrsa_concept import Concept, Concepts
from palimpsest.attention_patches.reference_pass import edits_of
from palimpsest.tests.helpers.concepts import concept, concepts
from palimpsest.tests.helpers.explicit_mrsa import Steps, explicit_step
from palimpsest.tests.helpers.models import tiny_cond
from palimpsest.tests.helpers.sampling import Watch, custom_advanced, ksampler, latent_noise, no_free_memory, schedule

ZERO = torch.zeros(1, 4, 16, 16)


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("rule", [CODE, PAPER])
@pytest.mark.parametrize("fidelity", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("weights", [(3.0,), (2.0, -1.0)])
def test_every_step_equals_an_explicit_implementation(model, positive, negative, rule, fidelity, weights):
    items = [concept(number, weight=weight) for number, weight in enumerate(weights)]
    composed, _, _ = compose(model, concepts(*items), rule=rule, fidelity=fidelity, seed=5)
    steps = Steps()
    ksampler(steps.on(composed), ZERO, positive, negative, steps=3)
    assert len(steps.seen) == 3
    for x, sigma, uncond, cond in steps.seen:
        expected = explicit_step(model, x, sigma, (positive, negative), list(enumerate(items)), 5, rule, fidelity)
        assert relative(uncond, expected[0]) < 1e-5 and relative(cond, expected[1]) < 1e-5, f"sigma {sigma:.3f}"


@pytest.mark.parametrize("items", [[dict(weight=0.0)], [dict(empty=True)], [dict(weight=0.0), dict(empty=True)]])
@pytest.mark.parametrize("cfg", [1.0, 7.0])
def test_concepts_without_effect_install_nothing_and_say_so_once(model, positive, negative, items, cfg, caplog):
    composed, _, report = compose(model, concepts(*(concept(number, **settings) for number, settings in enumerate(items))))
    assert edits_of(composed) == () and "nothing is installed" in report
    assert sum("MRSA has nothing to show" in line for line in caplog.messages) == 1
    assert torch.equal(ksampler(composed, ZERO, positive, negative, cfg=cfg), ksampler(model, ZERO, positive, negative, cfg=cfg))


def test_a_concept_without_effect_beside_another_changes_nothing(model, positive, negative):
    both, _, report = compose(model, concepts(concept(0), concept(1, empty=True)), seed=3)
    alone, _, _ = compose(model, concepts(concept(0)), seed=3)
    assert "concept 2: weight 2, latent 16 x 16, no effect" in report
    assert torch.equal(ksampler(both, ZERO, positive, negative), ksampler(alone, ZERO, positive, negative))


def test_an_empty_window_is_neutral_and_a_half_one_is_not(model, positive, negative):
    plain = ksampler(model, ZERO, positive, negative)
    none, _, _ = compose(model, concepts(concept(0)), start=0.4, end=0.4)
    assert torch.equal(ksampler(none, ZERO, positive, negative), plain)
    half, _, _ = compose(model, concepts(concept(0)), end=0.5)
    watch = Watch()
    assert relative(ksampler(watch.on(half), ZERO, positive, negative), plain) > 1e-4
    assert 0 < watch.counters.source_calls < 4


@pytest.mark.parametrize("fidelity, rows", [(1.0, 2), (0.5, 4)])
def test_rows_of_two_concepts(model, positive, negative, fidelity, rows):
    """2 + R instead of 2 (1 + R) when the negative half does not see the references."""
    composed, _, _ = compose(model, concepts(concept(0), concept(1)), fidelity=fidelity)
    watch = Watch()
    ksampler(watch.on(composed), ZERO, positive, negative)
    assert watch.counters.source_rows == 4 * rows


@pytest.mark.parametrize("cfg", [1.0, 7.0])
@pytest.mark.parametrize("batch", [2, 3])
def test_batches_and_split_calls_agree(model, positive, negative, cfg, batch, monkeypatch):
    composed, _, _ = compose(model, concepts(concept(0), concept(1)), fidelity=0.5, seed=1)
    start = latent_noise(1, 4, 16, 16, seed=4)
    levels = schedule(model, 3)
    one = custom_advanced(composed, ZERO, positive, negative, levels, cfg=cfg, noise=start)
    many = custom_advanced(composed, ZERO.repeat(batch, 1, 1, 1), positive, negative, levels, cfg=cfg, noise=start.repeat(batch, 1, 1, 1))
    for row in many:
        assert relative(row[None], one) < 1e-4
    no_free_memory(monkeypatch)
    assert relative(custom_advanced(composed, ZERO, positive, negative, levels, cfg=cfg, noise=start), one) < 1e-4


@pytest.mark.parametrize("rule", [CODE, PAPER])
def test_a_wide_picture_and_references_of_other_sizes(model, positive, negative, rule):
    """Also a prompt of another length."""
    items = [concept(0, size=(24, 8)), concept(1, size=(9, 13), cond=tiny_cond(154, seed=3))]
    steps = Steps()
    ksampler(steps.on(compose(model, concepts(*items), rule=rule, fidelity=0.5, seed=5)[0]), torch.zeros(1, 4, 10, 20), positive, negative, steps=2)
    for x, sigma, uncond, cond in steps.seen:
        expected = explicit_step(model, x, sigma, (positive, negative), list(enumerate(items)), 5, rule, 0.5)
        assert relative(uncond, expected[0]) < 1e-5 and relative(cond, expected[1]) < 1e-5, f"sigma {sigma:.3f}"


def test_noise_is_private_fresh_or_fixed_and_follows_the_seed(model, positive, negative):
    latent = torch.zeros(1, 4, 8, 8)
    assert torch.equal(noise_like(latent, 1, 0, 2.5), noise_like(latent, 1, 0, 2.5))
    different = [noise_like(latent, *key) for key in ((1, 0, 2.5), (2, 0, 2.5), (1, 1, 2.5), (1, 0, 1.5), (1, 0, None))]
    assert all(not torch.equal(a, b) for i, a in enumerate(different) for b in different[:i])
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    noise_like(latent, 1, 0, 2.5)
    assert torch.equal(torch.rand(1), expected), "the global generator is left alone"

    def run(noise, seed=None, sampler_seed=1):
        return ksampler(compose(model, concepts(concept(0)), noise=noise, seed=seed)[0], ZERO, positive, negative, seed=sampler_seed)

    assert torch.equal(run(FRESH), run(FRESH)) and relative(run(FRESH), run(FIXED)) > 1e-4 and relative(run(FRESH, 1), run(FRESH, 2)) > 1e-4
    assert torch.equal(run(FRESH), run(FRESH, seed=1)), "without a seed of its own it takes the sampler's"


def test_shares_of_attention_are_noted_on_request(model, positive, negative):
    composed, shares, _ = compose(model, concepts(concept(0, weight=3.0), concept(1, weight=0.5)), watch=True)
    plain, none, _ = compose(model, concepts(concept(0, weight=3.0), concept(1, weight=0.5)))
    assert none is None
    assert torch.equal(ksampler(composed, ZERO, positive, negative), ksampler(plain, ZERO, positive, negative))
    found = shares.read()
    assert len(found) == 6
    for maps, steps, _ in found.values():
        assert steps == 4 and maps.shape[-1] == 2 and bool((maps > 0).all()) and bool((maps.sum(-1) < 4).all())
        assert float(maps[..., 0].mean()) > float(maps[..., 1].mean())


@pytest.mark.parametrize("call", [2, 3, 5])
def test_cancel_and_queue_again(model, positive, negative, call):
    """In the second reference's pass, in the picture's own call, in the second reference's pass of the next step."""
    import comfy.model_management as mm

    composed, _, _ = compose(model, concepts(concept(0), concept(1)))
    before, watch, calls = ksampler(composed, ZERO, positive, negative), Watch(), []
    watched = watch.on(composed)

    def stop(apply_model, args):
        calls.append(args["input"].shape[0])
        if len(calls) == call:
            raise mm.InterruptProcessingException()
        return apply_model(args["input"], args["timestep"], **args["c"])

    watched.set_model_unet_function_wrapper(stop)
    with pytest.raises(mm.InterruptProcessingException):
        ksampler(watched, ZERO, positive, negative)
    assert calls == [1, 1, 2, 1, 1][:call]
    assert all(len(run.store) == 0 and not run.branches for state in watch.states for run in state.sources.values())
    assert torch.equal(ksampler(composed, ZERO, positive, negative), before)


def test_bad_input(model, positive, negative):
    with pytest.raises(ValueError, match="There is no concept"):
        compose(model, Concepts(()))
    with pytest.raises(ValueError, match="The concept 1 conditioning has 64 values per token"):
        compose(model, concepts(concept(0, cond=tiny_cond(dim=64))))
    with pytest.raises(ValueError, match="Style fidelity 2"):
        compose(model, concepts(concept(0)), fidelity=2.0)
    with pytest.raises(ValueError, match="chain all concepts into one composer"):
        compose(compose(model, concepts(concept(0)))[0], concepts(concept(1)))
    sixteen = Concept(torch.randn(1, 16, 16, 16), torch.ones(128, 128), tiny_cond(), 2.0, torch.rand(128, 128, 3))
    with pytest.raises(ValueError, match="The latent of concept 2 has 16 channels, but the connected model works on 4"):
        compose(model, concepts(concept(0), sixteen))
    with pytest.raises(ValueError, match="The empty_prompt conditioning has 64 values per token"):
        compose(model, concepts(concept(0)), empty=tiny_cond(dim=64))
    with pytest.raises(ValueError, match="The watch window goes from 0.5 to 0.5"):
        compose(model, concepts(concept(0)), watch=True, watch_start=0.5, watch_end=0.5)
    with pytest.raises(ValueError, match="None of the watch layers sees the concepts"):
        compose(model, concepts(concept(0)), watch=True, watch_layers="d0")
    compose(model, concepts(concept(0)), watch_layers="nonsense", watch_start=1.0)  # not looked at without watch
