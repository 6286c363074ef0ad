"""Nodes of the host on the same MODEL, before or after us; areas, ControlNet, LoRA; other families and precisions."""

import pytest
import torch

from palimpsest.attention_patches.pnp import apply_pnp
from palimpsest.inversion.trajectory import start_latent
from palimpsest.tests.helpers import host_nodes
from palimpsest.tests.helpers.models import controlled, tiny_cond, tiny_controlnet, tiny_sd2, tiny_sd15, tiny_sdxl, tiny_trajectory
from palimpsest.tests.helpers.sampling import Watch, ksampler, no_free_memory

PATCHES = {
    "free_u": host_nodes.free_u,
    "pag": host_nodes.pag,
    "sag": host_nodes.sag,
    "hyper_tile": host_nodes.hyper_tile,
    "token_merging": host_nodes.token_merging,
    "lora": host_nodes.lora,
}


def relative(a, b):
    return float((a - b).norm() / b.norm())


def seeded(*args, **kwargs):
    """HyperTile and token merging draw from Python's and torch's global generators."""
    import random

    random.seed(0)
    torch.manual_seed(0)
    return ksampler(*args, **kwargs)


@pytest.mark.parametrize("name", PATCHES)
def test_other_nodes_work_in_either_order(model, trajectory, positive, negative, start, name):
    patch = PATCHES[name]
    if name == "free_u":  # it tells the decoder's levels apart by their width
        model = tiny_sd15()
        trajectory = tiny_trajectory(model)
    plain = ksampler(model, start, positive, negative, disable_noise=True)
    ours_last, _ = apply_pnp(patch(model), trajectory)
    ours_first = patch(apply_pnp(model, trajectory)[0])
    last, first = seeded(ours_last, start, positive, negative), seeded(ours_first, start, positive, negative)
    assert torch.isfinite(last).all()
    assert torch.equal(last, first), "the order of nodes on the canvas does not matter"
    only_theirs = seeded(patch(model), start, positive, negative, disable_noise=True)
    assert relative(last, only_theirs) > 1e-3, "the injection takes part"
    if name != "hyper_tile":  # with latents this small HyperTile has nothing to tile
        only_ours = ksampler(apply_pnp(model, trajectory)[0], start, positive, negative)
        assert relative(last, only_ours) > 1e-3, "the other node takes part"
    assert torch.equal(ksampler(model, start, positive, negative, disable_noise=True), plain)


@pytest.mark.parametrize("name", ["pag", "sag"])
def test_guidance_nodes_that_call_twice_reuse_the_features(model, trajectory, positive, negative, start, name):
    edited, _ = apply_pnp(PATCHES[name](model), trajectory)
    watch = Watch()
    ksampler(watch.on(edited), start, positive, negative)
    assert watch.counters.source_calls == 3, "one pass per active step, although the model is asked twice"


@pytest.mark.parametrize("settings", [dict(tau_f=1.0, tau_a=1.0, attention_layers="u0-8")])
def test_hypertile_really_tiles_behind_us(model, positive, negative, settings):
    """Regression: a patch appended behind HyperTile's gave it back untiled q, and it crashed."""
    path = tiny_trajectory(model, size=(32, 32))
    tiled = host_nodes.run_node("nodes_hypertile", "HyperTile", model, 64, 2, 1, False)
    edited, _ = apply_pnp(tiled, path, **settings)
    latent = start_latent(path, model)["samples"]
    with_tiles = seeded(edited, latent, positive, negative)
    without = ksampler(apply_pnp(model, path, **settings)[0], latent, positive, negative)
    assert torch.isfinite(with_tiles).all() and relative(with_tiles, without) > 1e-4


def test_an_area_prompt_gets_the_features_of_its_area(model, trajectory, positive, negative, start, monkeypatch):
    """The host runs an area as a crop; features of the whole picture then raised a size error."""
    import nodes

    area = nodes.ConditioningSetArea().append(tiny_cond(seed=3), 64, 128, 64, 0, 1.0)[0]
    prompts = nodes.ConditioningCombine().combine(positive, area)[0]
    edited, _ = apply_pnp(model, trajectory)
    joint = ksampler(edited, start, prompts, negative)
    assert relative(joint, ksampler(model, start, prompts, negative, disable_noise=True)) > 1e-3
    no_free_memory(monkeypatch)
    assert relative(ksampler(edited, start, prompts, negative), joint) < 1e-4


def test_an_area_as_large_as_the_picture_equals_no_area(model, trajectory, positive, negative, start):
    import nodes

    whole = nodes.ConditioningSetArea().append(positive, 128, 128, 0, 0, 1.0)[0]
    edited, _ = apply_pnp(model, trajectory)
    assert relative(ksampler(edited, start, whole, negative), ksampler(edited, start, positive, negative)) < 1e-4


def test_features_of_an_area_are_cut_from_its_place(model, positive, negative):
    """An independent truth: with a source whose features differ by side, an area on the right must get the right side's."""
    import nodes

    from palimpsest.attention_patches.blocks import Point
    from palimpsest.attention_patches.edit import Edit
    from palimpsest.attention_patches.reference_pass import add_edit
    from palimpsest.attention_patches.source import Source

    path = tiny_trajectory(model)
    seen = []

    class Look(Edit):
        def points(self, sigma):
            return frozenset({Point("attn1", "output", 11)})

        def attention(self, point, n, context, value, source):
            seen.append((n.shape, source.get("source"), tuple(chunk.role for chunk in source.chunks)))
            return n, context, value

    edited = add_edit(model, Look(source=Source(path, (("source", path.conditioning),))))
    right = nodes.ConditioningSetArea().append(positive, 64, 128, 64, 0, 1.0)[0]
    captured = {}

    def keep(executor, x, t, context, y, control, transformer_options, **kwargs):
        if transformer_options["cond_or_uncond"] == [0] and "full" not in captured:
            original = transformer_options["patches"]["attn1_patch"]

            def also(n, k, v, extra):
                if extra["block"] == ("output", 11):
                    captured["full"] = n.clone()
                return n, k, v

            transformer_options["patches"]["attn1_patch"] = [also, *original]
        return executor(x, t, context, y, control, transformer_options, **kwargs)

    import comfy.patcher_extension

    edited.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "keep", keep)
    ksampler(edited, start_latent(path, model)["samples"], right, negative, steps=4)
    areas = [entry for entry in seen if entry[0][1] == 16 * 8]
    assert areas and {role for entry in areas for role in entry[2]} == {"positive", "negative"}
    expected = captured["full"].unflatten(1, (16, 16))[:, :, 8:].flatten(1, 2)
    assert torch.equal(areas[0][1][:1], expected)


@pytest.fixture(scope="module")
def controlnet():
    return tiny_controlnet()


@pytest.mark.parametrize("batch", [1, 2])
def test_controlnet_on_the_target_leaves_the_source_alone(model, trajectory, positive, negative, start, controlnet, batch):
    edited, _ = apply_pnp(model, trajectory)
    watch, features = Watch(), []
    guided = controlled(positive, controlnet)
    latent = start.repeat(batch, 1, 1, 1)
    edited = watch.on(edited)

    def note(args):
        (run,) = watch.states[-1].sources.values()
        stored = run.store.get(float(args["sigma"][0]))
        features.append({key: feature.tensor.clone() for key, feature in stored.items()} if stored else {})
        return args["denoised"]

    edited.set_model_sampler_post_cfg_function(note)
    with_control = ksampler(edited, latent, guided, negative)
    first, features[:] = features[0], []
    without = ksampler(edited, latent, positive, negative)
    assert relative(with_control, without) > 1e-3
    assert all(torch.equal(first[key], features[0][key]) for key in first) and first
    assert torch.equal(ksampler(edited, latent, guided, negative), with_control)


def test_controlnet_on_the_source_only_is_loaded_and_cleaned(model, trajectory, positive, negative, start, controlnet, monkeypatch):
    import comfy.controlnet

    cleaned, loaded = [], []
    original = comfy.controlnet.ControlNet.cleanup
    monkeypatch.setattr(comfy.controlnet.ControlNet, "cleanup", lambda self: cleaned.append(self) or original(self))
    original_models = comfy.controlnet.ControlNet.get_models
    monkeypatch.setattr(comfy.controlnet.ControlNet, "get_models", lambda self: loaded.append(self) or original_models(self))
    guided = controlled(trajectory.conditioning, controlnet)
    edited, _ = apply_pnp(model, trajectory, conditioning=guided)
    out = ksampler(edited, start, positive, negative)
    assert relative(out, ksampler(apply_pnp(model, trajectory)[0], start, positive, negative)) > 1e-3
    assert loaded and cleaned, "the host must be told to load it, and it must be let go"
    target = controlled(positive, controlnet)
    assert torch.isfinite(ksampler(edited, start, target, negative)).all(), "the same ControlNet on both sides"


@pytest.mark.parametrize("build, size", [(lambda: tiny_sd15(prediction="v_prediction", channel_mult=(1, 1, 1, 1)), 768), (tiny_sd2, 1024)])
def test_v_prediction_models(build, size):
    model = build()
    path = tiny_trajectory(model, cond=tiny_cond(seed=7, dim=size))
    prompts = tiny_cond(seed=1, dim=size), tiny_cond(seed=2, dim=size)
    latent = start_latent(path, model)["samples"]
    out = ksampler(apply_pnp(model, path)[0], latent, *prompts)
    assert torch.isfinite(out).all() and relative(out, ksampler(model, latent, *prompts, disable_noise=True)) > 1e-3


def test_sdxl_layout():
    model = tiny_sdxl()
    source, positive, negative = (tiny_cond(seed=seed, dim=2048, pooled=1280) for seed in (7, 1, 2))
    path = tiny_trajectory(model, cond=source)
    latent = start_latent(path, model)["samples"]
    edited, report = apply_pnp(model, path)
    out = ksampler(edited, latent, positive, negative)
    assert torch.isfinite(out).all() and relative(out, ksampler(model, latent, positive, negative, disable_noise=True)) > 1e-3
    assert "experimental" in report and "output0 (2 blocks)" in report


def test_reduced_precision(positive, negative):
    model = tiny_sd15(dtype=torch.bfloat16, channel_mult=(1, 1, 1, 1))
    path = tiny_trajectory(model)
    out = ksampler(apply_pnp(model, path)[0], start_latent(path, model)["samples"], positive, negative)
    assert out.dtype == torch.float32 and torch.isfinite(out).all()
