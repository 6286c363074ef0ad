"""Calls that do not look like KSampler's: other guiders, context windows, compiled models, deep copies."""

import copy

import pytest
import torch

from palimpsest.attention_patches import host
from palimpsest.attention_patches.pnp import apply_pnp
from palimpsest.inversion.trajectory import start_latent
from palimpsest.tests.helpers.models import tiny_cond, tiny_trajectory
from palimpsest.tests.helpers.sampling import OneByOne, Watch, ksampler, schedule


def relative(a, b):
    return float((a - b).norm() / b.norm())


@torch.inference_mode()
def dual_cfg(model, latent, positive, middle, negative, cfg1, cfg2):
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG

    guider = Guider_DualCFG(model)
    guider.set_conds(positive, middle, negative)
    guider.set_cfg(cfg1, cfg2)
    return guider.sample(torch.zeros_like(latent), latent, comfy.samplers.sampler_object("euler"), schedule(model, 4), disable_pbar=True, seed=1)


def test_three_branches_are_all_edited(model, trajectory, positive, negative, start):
    """DualCFG puts the negative first; with the middle equal to the negative and equal scales it is plain guidance."""
    edited, _ = apply_pnp(model, trajectory)
    three = dual_cfg(edited, start, positive, negative, negative, 4.0, 4.0)
    assert relative(three, ksampler(edited, start, positive, negative, cfg=4.0)) < 1e-4


def test_the_negative_is_found_by_identity_and_not_by_place(model, trajectory, positive, negative, start):
    settings = dict(negative_schedule="constant", negative_alpha=1.0, unconditional=tiny_cond(seed=20), feature_layers="", attention_layers="")
    edited, _ = apply_pnp(model, trajectory, **settings)
    blended = dual_cfg(edited, start, positive, tiny_cond(seed=3), negative, 4.0, 3.0)
    by_hand = dual_cfg(model, start, positive, tiny_cond(seed=3), tiny_cond(seed=20), 4.0, 3.0)
    assert relative(blended, by_hand) < 1e-4


def test_roles_fall_back_to_the_tag_and_then_to_the_place():
    class Guider:
        conds = {"positive": [{"a": 1}], "negative": [{"b": 2}], "middle": []}

    guider = Guider()
    host.tag_roles(guider)
    positive, negative = guider.conds["positive"], guider.conds["negative"]
    assert host.role_of(negative, 0, [negative], guider) == "negative"
    assert host.role_of(list(negative), 0, [list(negative), list(positive)], guider) == "negative", "context windows copy the lists"
    assert host.role_of([{}], 1, [[{}], [{}]], guider) == "negative"
    assert host.role_of([{}], 0, [[{}], [{}], [{}]], guider) is None
    assert host.role_of(None, 1, [positive, None], guider) is None


def test_context_windows_get_the_features_of_their_latents(model, positive, negative):
    pytest.importorskip("comfy.context_windows")
    two = tiny_trajectory(model, batch=2)
    latent = start_latent(two, model)["samples"]
    edited, _ = apply_pnp(model, two)
    whole = ksampler(edited, latent, positive, negative)
    windowed = edited.clone()
    windowed.model_options["context_handler"] = OneByOne()
    watch = Watch()
    assert relative(ksampler(watch.on(windowed), latent, positive, negative), whole) < 1e-4
    assert watch.counters.source_calls == 2 * 3, "one pass per window and active step"


def test_a_picture_cut_without_our_knowledge_is_left_alone_with_one_warning(model, trajectory, positive, negative, start, caplog):
    """Regression: tiling packs cut the latent inside the model call, the source's too; the first tile's features went into all tiles."""
    edited, _ = apply_pnp(model, trajectory)

    def tiles(apply_model, args):
        x = args["input"]
        parts = [apply_model(part, args["timestep"], **args["c"]) for part in x.chunk(2, dim=-1)]
        return torch.cat(parts, dim=-1)

    edited.set_model_unet_function_wrapper(tiles)
    with caplog.at_level("WARNING", logger="palimpsest"):
        out = ksampler(edited, start, positive, negative)
    tiled = model.clone()
    tiled.set_model_unet_function_wrapper(tiles)
    assert torch.equal(out, ksampler(tiled, start, positive, negative, disable_noise=True))
    assert sum("another node cuts the source's picture into tiles" in line for line in caplog.messages) == 1


def test_only_the_targets_tiles_are_left_alone_too(model, trajectory, positive, negative, start, caplog):
    edited, _ = apply_pnp(model, trajectory)

    def tiles(apply_model, args):
        x, order = args["input"], args["cond_or_uncond"]
        if len(order) == 1:
            return apply_model(x, args["timestep"], **args["c"])
        return torch.cat([apply_model(part, args["timestep"], **args["c"]) for part in x.chunk(2, dim=-1)], dim=-1)

    edited.set_model_unet_function_wrapper(tiles)
    tiled = model.clone()
    tiled.set_model_unet_function_wrapper(tiles)
    with caplog.at_level("WARNING", logger="palimpsest"):
        out = ksampler(edited, start, positive, negative)
    assert torch.equal(out, ksampler(tiled, start, positive, negative, disable_noise=True))
    assert sum("tiles whose place is not known" in line for line in caplog.messages) == 1


def replaced_calls(args):
    return [torch.zeros_like(args["input"]) for _ in args["conds"]]


@pytest.mark.parametrize("settings, warnings", [(dict(), 1), (dict(tau_f=0.0, tau_a=0.0), 0)])
def test_an_edit_that_never_came_to_act_is_said_once(model, trajectory, positive, negative, start, caplog, settings, warnings):
    """Regression: beside a pack that replaces the host's conditioning batch, edits had no effect and nobody said so."""
    edited, _ = apply_pnp(model, trajectory, **settings)
    edited.model_options["sampler_calc_cond_batch_function"] = replaced_calls
    with caplog.at_level("WARNING", logger="palimpsest"):
        ksampler(edited, start, positive, negative)
    assert sum("nothing was injected in this run" in line for line in caplog.messages) == warnings


def test_a_run_that_injects_warns_of_nothing(model, trajectory, positive, negative, start, caplog):
    edited, _ = apply_pnp(model, trajectory)
    with caplog.at_level("WARNING", logger="palimpsest"):
        ksampler(edited, start, positive, negative)
    assert not [line for line in caplog.messages if line.startswith("Palimpsest")]


def test_deep_copies_of_options_share_the_run(model, trajectory, positive, negative, start):
    """Other nodes deep-copy model_options in the middle of a run; a copied state would lose its store and carry the trajectory along."""
    import comfy.samplers

    edited, _ = apply_pnp(model, trajectory)
    expected = ksampler(edited, start, positive, negative)

    def again(args):
        options = copy.deepcopy(args["model_options"])
        same = options["transformer_options"]["palimpsest"] is args["model_options"]["transformer_options"]["palimpsest"]
        states.append(same)
        comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], args["input"], args["sigma"], options)
        return args["denoised"]

    states = []
    edited.set_model_sampler_post_cfg_function(again)
    watch = Watch()
    assert torch.equal(ksampler(watch.on(edited), start, positive, negative), expected)
    assert states == [True] * 4 and watch.counters.source_calls == 3


@pytest.mark.slow
def test_compiled_models_inject_too(model, trajectory, positive, negative, start):
    """Regression: a graph compiled without hooks was reused with them, and the features were not injected."""
    torch_helpers = pytest.importorskip("comfy_api.torch_helpers")
    expected = ksampler(apply_pnp(model, trajectory)[0], start, positive, negative)
    plain = ksampler(model, start, positive, negative, disable_noise=True)
    compiled = model.clone()
    torch_helpers.set_torch_compile_wrapper(model=compiled, backend="eager")
    # plain first: a graph without hooks is compiled before one with
    assert relative(ksampler(compiled, start, positive, negative, disable_noise=True), plain) < 1e-4
    assert relative(ksampler(apply_pnp(compiled, trajectory)[0], start, positive, negative), expected) < 1e-4
    assert relative(ksampler(compiled, start, positive, negative, disable_noise=True), plain) < 1e-4
