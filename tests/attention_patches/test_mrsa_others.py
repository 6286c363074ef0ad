"""The MRSA composer among other nodes on one MODEL, and on other families and precisions."""

import pytest
import torch

from palimpsest.attention_patches.concept_run import NEGATIVE
from palimpsest.attention_patches.mrsa import compose
from palimpsest.attention_patches.pnp import apply_pnp
from palimpsest.p2p.apply import Settings, apply_p2p
from palimpsest.tests.helpers import host_nodes
from palimpsest.tests.helpers.concepts import concept, concepts
from palimpsest.tests.helpers.explicit_mrsa import XL_PLACES, Steps, explicit_step
from palimpsest.tests.helpers.models import controlled, tiny_cond, tiny_controlnet, tiny_sd2, tiny_sd15, tiny_sdxl
from palimpsest.tests.helpers.prompts import WordClip
from palimpsest.tests.helpers.sampling import Watch, ksampler, latent_noise

ZERO = torch.zeros(1, 4, 16, 16)
PATCHES = {
    "pag": host_nodes.pag,
    "sag": host_nodes.sag,
    "hyper_tile": lambda model: host_nodes.run_node("nodes_hypertile", "HyperTile", model, 64, 2, 1, False),
    "token_merging": host_nodes.token_merging,
    "lora": host_nodes.lora,
    "free_u": host_nodes.free_u,
}


def relative(a, b):
    return float((a - b).norm() / b.norm())


def seeded(*args, **kwargs):
    """HyperTile and token merging draw from Python's and torch's global generators."""
    import random

    random.seed(0)
    torch.manual_seed(0)
    return ksampler(*args, **kwargs)


def composing(model, **settings):
    return compose(model, concepts(concept(0), concept(1, weight=3.0)), seed=4, **settings)[0]


def test_pnp_on_the_same_model_in_either_order(model, positive, negative, trajectory, start):
    first, last = apply_pnp(composing(model), trajectory)[0], composing(apply_pnp(model, trajectory)[0])
    watch = Watch()
    both = ksampler(watch.on(first), start, positive, negative)
    assert torch.equal(both, ksampler(last, start, positive, negative))
    assert len(watch.states[-1].sources) == 2 and watch.counters.source_calls == 3 + 2 * 4, "the inversion while it injects, two references always"
    alone = ksampler(apply_pnp(model, trajectory)[0], start, positive, negative)
    assert relative(both, alone) > 1e-3 and relative(both, ksampler(composing(model), start, positive, negative, disable_noise=True)) > 1e-3
    neutral, _ = apply_pnp(composing(model), trajectory, tau_f=0.0, tau_a=0.0)
    assert torch.equal(ksampler(neutral, start, positive, negative), ksampler(composing(model), start, positive, negative, disable_noise=True))
    idle = compose(apply_pnp(model, trajectory)[0], concepts(concept(0, weight=0.0)))[0]
    assert torch.equal(ksampler(idle, start, positive, negative), alone)


@pytest.mark.parametrize("inverted", [False, True])
def test_p2p_on_the_same_model_in_either_order(model, negative, trajectory, start, inverted):
    clip, path, latent = WordClip(), trajectory if inverted else None, start if inverted else ZERO

    def edit(patched):
        return apply_p2p(patched, clip, "a cat on a red sofa", "a dog on a red sofa", Settings(), trajectory=path)

    first, last, plain = edit(composing(model)), edit(model), edit(model)
    watch = Watch()
    both = ksampler(watch.on(first.model), latent, first.positive, negative)
    assert len(watch.states[0].sources) == 2
    assert torch.equal(both, ksampler(composing(last.model), latent, last.positive, negative))
    assert relative(both, ksampler(plain.model, latent, plain.positive, negative)) > 1e-3, "the concepts are seen"
    assert relative(both, ksampler(composing(model), latent, plain.positive, negative, disable_noise=inverted)) > 1e-3, "the edit takes part"


def test_all_three_on_one_model(model, negative, trajectory, start):
    edit = apply_p2p(composing(apply_pnp(model, trajectory)[0]), WordClip(), "a cat on a red sofa", "a dog on a red sofa", Settings(), trajectory=trajectory)
    watch = Watch()
    out = ksampler(watch.on(edit.model), start, edit.positive, negative)
    assert torch.isfinite(out).all() and len(watch.states) == 1
    assert torch.equal(out, ksampler(edit.model, start, edit.positive, negative)), "and queued again"


def test_a_controlnet_shapes_the_picture_and_not_the_references(model, positive, negative):
    """Stored features are those of a run without it, although its result differs."""
    kept = []

    def run(prompt):
        watch, features = Watch(), {}
        watched = watch.on(composing(model, fidelity=0.5))

        def note(args):
            (source,) = watch.states[-1].sources.values()
            features.update({(float(args["sigma"][0]), key): feature.tensor.clone() for key, feature in source.store.get(float(args["sigma"][0]), NEGATIVE).items()})
            return args["denoised"]

        watched.set_model_sampler_post_cfg_function(note)
        kept.append(features)
        return ksampler(watched, ZERO, *prompt)

    net = tiny_controlnet()
    with_control, without = run((controlled(positive, net), controlled(negative, net))), run((positive, negative))
    assert relative(with_control, without) > 1e-3
    assert kept[0].keys() == kept[1].keys() and len(kept[0]) > 4 * 2 * 2 * 6
    assert all(torch.equal(kept[0][key], kept[1][key]) for key in kept[0])


@pytest.mark.parametrize("name", PATCHES)
def test_other_nodes_work_in_either_order(model, positive, negative, name):
    patch = PATCHES[name]
    if name == "free_u":  # it tells the decoder's levels apart by their width
        model = tiny_sd15()
    composed, _, _ = compose(patch(model), concepts(concept(0), concept(1, weight=3.0)), seed=4, watch=True)
    last, first = seeded(composed, ZERO, positive, negative), seeded(patch(composing(model)), ZERO, positive, negative)
    assert torch.isfinite(last).all() and torch.equal(last, first), "the order of nodes on the canvas does not matter"
    assert relative(last, seeded(patch(model), ZERO, positive, negative)) > 1e-3, "the concepts are seen"
    assert relative(last, ksampler(composing(model), ZERO, positive, negative)) > 1e-4, "the other node takes part"


def test_another_replacement_of_the_same_layer_is_named(model, positive, negative, caplog):
    """One slot holds one replacement: where another node's sits in a composed layer, people hear which rows are lost to it."""
    other = model.clone()
    other.set_model_attn1_replace(lambda q, k, v, options: torch.zeros_like(q), "output", 7)
    out = ksampler(composing(other), ZERO, positive, negative)
    (line,) = [message for message in caplog.messages if "another node replaces" in message]
    assert "block output 7" in line
    assert relative(out, ksampler(composing(model), ZERO, positive, negative)) > 1e-4, "the negative rows stay the other node's"
    caplog.clear()
    ksampler(composing(model), ZERO, positive, negative)
    assert not [message for message in caplog.messages if "another node replaces" in message]


def test_an_area_prompt_sees_the_concepts_too(model, positive, negative):
    import nodes

    area = nodes.ConditioningSetArea().append(tiny_cond(seed=3), 64, 128, 64, 0, 1.0)[0]
    prompts = nodes.ConditioningCombine().combine(positive, area)[0]
    out = ksampler(composing(model), ZERO, prompts, negative)
    assert torch.isfinite(out).all() and relative(out, ksampler(model, ZERO, prompts, negative)) > 1e-3
    only = nodes.ConditioningSetArea().append(positive, 128, 128, 0, 0, 1.0)[0]
    assert relative(ksampler(composing(model), ZERO, only, negative), ksampler(composing(model), ZERO, positive, negative)) < 1e-4


def test_a_noise_mask_keeps_the_rest_of_the_picture(model, positive, negative):
    """SetLatentNoiseMask: outside the mask stays the given latent, inside is composed."""
    import nodes

    mask = torch.zeros(1, 128, 128)
    mask[..., 64:] = 1.0
    (latent,) = nodes.SetLatentNoiseMask().set_mask({"samples": latent_noise(1, 4, 16, 16, seed=8)}, mask)
    out = ksampler(composing(model), latent, positive, negative)
    assert torch.allclose(out[..., :8], latent["samples"][..., :8], atol=1e-5)
    assert relative(out[..., 8:], ksampler(model, latent, positive, negative)[..., 8:]) > 1e-3


def test_kernels_that_leave_masks_out_get_the_weights_too(model, positive, negative, monkeypatch):
    """SageAttention ignores a mask without a word and FlashAttention takes none, so the weights must not travel in one."""
    import comfy.ldm.modules.attention as attention

    expected, original = ksampler(composing(model), ZERO, positive, negative), attention.optimized_attention

    def maskless(q, k, v, heads, mask=None, **kwargs):
        return original(q, k, v, heads, **kwargs)

    for name in ("optimized_attention", "optimized_attention_masked"):
        monkeypatch.setattr(attention, name, maskless)
    assert torch.equal(ksampler(composing(model), ZERO, positive, negative), expected)
    other = compose(model, concepts(concept(0), concept(1, weight=0.5)), seed=4)[0]
    assert relative(ksampler(other, ZERO, positive, negative), expected) > 1e-4


@pytest.mark.parametrize("build, width", [(lambda: tiny_sd15(prediction="v_prediction", channel_mult=(1, 1, 1, 1)), 768), (tiny_sd2, 1024)])
def test_v_prediction_models(build, width):
    model, (positive, negative, own) = build(), (tiny_cond(seed=seed, dim=width) for seed in (1, 2, 3))
    out = ksampler(compose(model, concepts(concept(0, cond=own)))[0], ZERO, positive, negative)
    assert torch.isfinite(out).all() and relative(out, ksampler(model, ZERO, positive, negative)) > 1e-3


@pytest.mark.parametrize("rule", ["code", "paper"])
def test_reduced_precision(positive, negative, rule):
    def run(dtype):
        model = tiny_sd15(dtype=dtype, channel_mult=(1, 1, 1, 1))
        return [ksampler(chosen, ZERO, positive, negative, steps=2) for chosen in (composing(model, rule=rule), model)]

    (out, plain), (exact, plain_exact) = run(torch.bfloat16), run(torch.float32)
    assert out.dtype == torch.float32 and relative(out, exact) < 0.05
    assert relative(out, exact) < 2 * relative(plain, plain_exact), "rounding of the model itself, and not much more"


@pytest.fixture(scope="module")
def xl():
    return tiny_sdxl()


def prompt(seed):
    return tiny_cond(seed=seed, dim=2048, pooled=1280)


@pytest.mark.parametrize("layers", ["preset default", "preset last", "preset all"])
def test_sdxl(xl, layers):
    composed, _, report = compose(xl, concepts(concept(0, cond=prompt(3)), concept(1, cond=prompt(4), size=(12, 20))), layers=layers, fidelity=0.5)
    out = ksampler(composed, ZERO, prompt(1), prompt(2), steps=2)
    assert "SDXL" in report and torch.isfinite(out).all() and relative(out, ksampler(xl, ZERO, prompt(1), prompt(2), steps=2)) > 1e-4


def test_every_step_of_sdxl_equals_an_explicit_implementation(xl):
    items, steps = [concept(0, cond=prompt(3)), concept(1, cond=prompt(4), size=(12, 20), weight=-1.0)], Steps()
    ksampler(steps.on(compose(xl, concepts(*items), seed=5)[0]), ZERO, prompt(1), prompt(2), steps=2)
    assert len(steps.seen) == 2
    for x, sigma, uncond, cond in steps.seen:
        expected = explicit_step(xl, x, sigma, (prompt(1), prompt(2)), list(enumerate(items)), 5, places=XL_PLACES)
        assert relative(uncond, expected[0]) < 1e-5 and relative(cond, expected[1]) < 1e-5, f"sigma {sigma:.3f}"


def test_every_reference_of_sdxl_has_its_own_pooled_text_and_size(xl):
    import comfy.patcher_extension

    seen = {}

    def keep(executor, x, t, context, y=None, *args, **kwargs):
        seen.setdefault(tuple(x.shape[-2:]), y.clone())
        return executor(x, t, context, y, *args, **kwargs)

    composed, _, _ = compose(xl, concepts(concept(0, cond=prompt(3), size=(24, 12)), concept(1, cond=prompt(4), size=(12, 20))))
    composed.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "keep", keep)
    ksampler(composed, ZERO, prompt(1), prompt(2), steps=1)
    for (height, width), own in (((24, 12), prompt(3)), ((12, 20), prompt(4))):
        expected = xl.model.encode_adm(pooled_output=own[0][1]["pooled_output"], height=height * 8, width=width * 8, device="cpu")
        assert torch.allclose(seen[(height, width)], expected.to(seen[(height, width)]), atol=1e-5)
