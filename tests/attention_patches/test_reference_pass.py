"""The reference pass through the host's stock samplers: exactness, neutrality, state, cancel, batches."""

import pytest
import torch

from palimpsest.attention_patches.pnp import apply_pnp
from palimpsest.attention_patches.reference_pass import edits_of
from palimpsest.inversion.trajectory import start_latent
from palimpsest.tests.helpers.models import tiny_cond, tiny_trajectory
from palimpsest.tests.helpers.sampling import Watch, custom_advanced, ksampler, no_free_memory, schedule


def relative(a, b):
    return float((a - b).norm() / b.norm())


class OwnLatents:
    """A source that is always where the target is: what it injects is what the target would have computed itself."""

    conditioning: list = []

    def __init__(self, like, cond):
        self.sigmas, self.latents, self.conditioning = like.sigmas, like.latents, cond
        self.x = None

    def at(self, sigma):
        return self.x

    def check_model(self, model):
        pass

    def following(self, model):
        """A clone of `model` that tells this source the target's current x."""
        import comfy.patcher_extension

        def note(executor, x, timestep, *args, **kwargs):
            self.x = x.clone()
            return executor(x, timestep, *args, **kwargs)

        clone = model.clone()
        clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.PREDICT_NOISE, "follow", note)
        return clone


@pytest.mark.parametrize("layers", ["preset default", "d0-5,m0,u0-8"])
def test_source_equal_to_the_target_gives_the_plain_host_bit_for_bit(model, trajectory, positive, negative, start, layers):
    own = OwnLatents(trajectory, positive)
    edited, _ = apply_pnp(own.following(model), own, attention_layers=layers, feature_layers="input4, middle0, u1", tau_f=1.0, tau_a=1.0)
    watch = Watch()
    with_source = ksampler(watch.on(edited), start, positive, negative, cfg=1.0, disable_noise=True)
    assert watch.counters.source_calls == 4 and watch.counters.patch_calls > 0
    assert torch.equal(with_source, ksampler(model, start, positive, negative, cfg=1.0, disable_noise=True))


def test_an_edit_changes_the_picture_and_the_plain_model_stays_as_it_was(model, trajectory, positive, negative, start):
    plain = ksampler(model, start, positive, negative, disable_noise=True)
    edited, _ = apply_pnp(model, trajectory)
    first = ksampler(edited, start, positive, negative)
    assert relative(first, plain) > 0.01
    assert torch.equal(ksampler(model, start, positive, negative, disable_noise=True), plain)
    assert torch.equal(ksampler(edited, start, positive, negative), first)


@pytest.mark.parametrize("cfg", [1.0, 7.0])
@pytest.mark.parametrize("settings", [dict(tau_f=0.0, tau_a=0.0), dict(feature_layers="", attention_layers="preset none"), dict(tau_f=0.2, tau_a=0.2)])
def test_neutral_settings_equal_the_plain_host_bit_for_bit(model, trajectory, positive, negative, start, cfg, settings):
    edited, _ = apply_pnp(model, trajectory, **settings)  # 0.2 of 4 steps is no step
    out = ksampler(edited, start, positive, negative, cfg=cfg)
    assert torch.equal(out, ksampler(model, start, positive, negative, cfg=cfg, disable_noise=True))


def test_no_source_rows_and_no_patch_calls_after_the_last_window(model, trajectory, positive, negative, start):
    edited, _ = apply_pnp(model, trajectory, tau_f=0.5, tau_a=0.25)
    watch, seen = Watch(), []

    def note(args):
        counters = watch.states[-1].counters
        seen.append((counters.source_rows, counters.patch_calls))
        return args["denoised"]

    edited = watch.on(edited)
    edited.set_model_sampler_post_cfg_function(note)
    ksampler(edited, start, positive, negative)
    # step 1: one conv and eight attentions; step 2: the conv alone; steps 3 and 4: nothing
    assert seen == [(1, 9), (2, 10), (2, 10), (2, 10)]
    assert watch.calls == [(1, 1), (1, 2), (1, 1), (1, 2), (1, 2), (1, 2)]


def test_the_source_stops_after_the_last_layer_that_is_needed(model, trajectory, positive, negative, start):
    unet, finished = model.model.diffusion_model, []
    handles = [unet.output_blocks[n][0].register_forward_hook(lambda *_, n=n: finished.append(n)) for n in (3, 4, 11)]
    try:
        edited, _ = apply_pnp(model, trajectory, tau_f=1.0, tau_a=0.0)
        ksampler(edited, start, positive, negative)
    finally:
        for handle in handles:
            handle.remove()
    # four steps, source and target: the source never leaves block 4
    assert [finished.count(n) for n in (3, 4, 11)] == [8, 4, 4]


def test_several_edits_of_one_source_share_one_pass_and_equal_one_edit(model, trajectory, positive, negative, start):
    both, _ = apply_pnp(model, trajectory)
    features, _ = apply_pnp(model, trajectory, attention_layers="")
    split, _ = apply_pnp(features, trajectory, feature_layers="")
    watch = Watch()
    out = ksampler(watch.on(split), start, positive, negative)
    assert torch.equal(out, ksampler(both, start, positive, negative))
    assert watch.counters.source_calls == 3


def test_adding_an_edit_leaves_the_model_upstream_alone(model, trajectory, positive, negative, start):
    one, _ = apply_pnp(model, trajectory, attention_layers="")
    before = ksampler(one, start, positive, negative)
    two, _ = apply_pnp(one, trajectory, feature_layers="")
    assert (len(edits_of(model)), len(edits_of(one)), len(edits_of(two))) == (0, 1, 2)
    assert torch.equal(ksampler(one, start, positive, negative), before)
    assert list(one.wrappers["calc_cond_batch"]) == ["palimpsest"] and len(two.wrappers["calc_cond_batch"]["palimpsest"]) == 1


def test_two_sources_make_two_passes(model, trajectory, positive, negative, start):
    other = tiny_trajectory(model, seed=3)
    first, _ = apply_pnp(model, trajectory, attention_layers="")
    second, _ = apply_pnp(first, other, feature_layers="")
    watch = Watch()
    ksampler(watch.on(second), start, positive, negative)
    assert watch.counters.source_calls == 3 + 2


@pytest.mark.parametrize("sampler, passes", [("heun", 3), ("dpmpp_2m", 3), ("dpm_2", None), ("euler_ancestral", 3), ("uni_pc", None)])
def test_samplers_run_and_the_source_runs_once_per_noise_level(model, trajectory, positive, negative, start, sampler, passes):
    edited, _ = apply_pnp(model, trajectory)
    watch = Watch()
    out = ksampler(watch.on(edited), start, positive, negative, sampler=sampler)
    assert torch.isfinite(out).all()
    visited = {sigma for sigma in watch.sigmas if sigma > float(trajectory.sigmas[1]) * 1.001}
    assert watch.counters.source_calls == len(visited) > 0
    assert passes in (None, len(visited))  # dpm_2 and uni_pc make schedules of their own
    assert torch.equal(ksampler(edited, start, positive, negative, sampler=sampler), out)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("cfg", [1.0, 7.0])
def test_one_source_serves_a_batch(model, trajectory, positive, negative, start, batch, cfg):
    edited, _ = apply_pnp(model, trajectory)
    one = ksampler(edited, start, positive, negative, cfg=cfg)
    many = ksampler(edited, start.repeat(batch, 1, 1, 1), positive, negative, cfg=cfg)
    for row in many:
        assert relative(row[None], one) < 1e-4


def test_as_many_sources_as_latents_are_matched_one_to_one(model, positive, negative):
    two = tiny_trajectory(model, batch=2)
    edited, _ = apply_pnp(model, two)
    both = ksampler(edited, start_latent(two, model)["samples"], positive, negative)
    for row in (0, 1):
        single = type(two).for_model(model, two.sigmas, two.latents[:, row : row + 1], two.conditioning)
        alone, _ = apply_pnp(model, single)
        assert relative(both[row : row + 1], ksampler(alone, start_latent(single, model)["samples"], positive, negative)) < 1e-4


def test_split_conditioning_calls_equal_joint_ones(model, trajectory, positive, negative, start, monkeypatch):
    edited, _ = apply_pnp(model, trajectory)
    joint = ksampler(edited, start, positive, negative)
    rows = []
    unet = model.model.diffusion_model
    handle = unet.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    no_free_memory(monkeypatch)
    split = ksampler(edited, start, positive, negative)
    handle.remove()
    assert set(rows) == {1}, "the host should have split the calls"
    assert relative(split, joint) < 1e-4


def test_longer_prompts_on_either_side(model, trajectory, positive, negative, start):
    long = tiny_cond(tokens=154, seed=9)
    edited, _ = apply_pnp(model, trajectory, conditioning=long)
    assert torch.isfinite(ksampler(edited, start, positive, negative)).all()
    edited, _ = apply_pnp(model, trajectory)
    assert torch.isfinite(ksampler(edited, start, long, negative)).all()


def test_odd_and_oblong_sizes(model, positive, negative):
    path = tiny_trajectory(model, size=(35, 21))
    edited, _ = apply_pnp(model, path)
    out = ksampler(edited, start_latent(path, model)["samples"], positive, negative)
    assert out.shape == (1, 4, 35, 21) and torch.isfinite(out).all()


@pytest.mark.parametrize("where", ["source", "target"])
def test_cancel_leaves_nothing_behind(model, trajectory, positive, negative, start, where):
    import comfy.model_management
    import comfy.patcher_extension

    plain = ksampler(model, start, positive, negative, disable_noise=True)
    edited, _ = apply_pnp(model, trajectory)
    fresh = ksampler(edited, start, positive, negative)
    watch, calls = Watch(), []

    def interrupt(executor, x, t, context, y, control, transformer_options, **kwargs):
        calls.append(transformer_options["cond_or_uncond"])
        if (len(calls[-1]) == 1) == (where == "source") and len(calls) > 2:
            raise comfy.model_management.InterruptProcessingException()
        return executor(x, t, context, y, control, transformer_options, **kwargs)

    cancelled = watch.on(edited)
    cancelled.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "interrupt", interrupt)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        ksampler(cancelled, start, positive, negative)
    (state,) = watch.states
    assert all(len(run.store) == 0 and not run.branches for run in state.sources.values()) and not state._calls
    assert not any(module._forward_hooks for module in model.model.modules())
    assert model.model.current_patcher is None
    assert torch.equal(ksampler(edited, start, positive, negative), fresh)
    assert torch.equal(ksampler(model, start, positive, negative, disable_noise=True), plain)


def test_nothing_of_a_run_stays_on_the_model(model, trajectory, positive, negative, start):
    import gc
    import weakref

    edited, _ = apply_pnp(model, trajectory)
    watch = Watch()
    ksampler(watch.on(edited), start, positive, negative)
    state = weakref.ref(watch.states[-1])
    assert all(len(run.store) == 0 for run in watch.states[-1].sources.values())
    watch.states.clear()
    gc.collect()
    assert state() is None
    assert "palimpsest" not in edited.model_options["transformer_options"]


def test_cleanup_callback_closes_a_run_that_was_left_open(model, trajectory):
    from types import SimpleNamespace

    from palimpsest.attention_patches.edit import RunInfo
    from palimpsest.attention_patches.run_state import RunState

    edited, _ = apply_pnp(model, trajectory)
    reference = edited.wrappers["calc_cond_batch"]["palimpsest"][0].__self__
    state = RunState(reference.edits, SimpleNamespace(model_patcher=edited, conds={}), RunInfo(trajectory.sigmas.flip(0), (1, 4, 16, 16)))
    (run,) = state.sources.values()
    run.store.put(1.0, {})
    reference._running.add(state)
    model.clone().cleanup()
    assert len(run.store) == 1, "another MODEL's run is not ours to close"
    edited.cleanup()
    assert len(run.store) == 0


def test_prompt_inactive_at_some_steps_injects_nothing_there(model, trajectory, positive, negative, start):
    import node_helpers

    early = node_helpers.conditioning_set_values(trajectory.conditioning, {"start_percent": 0.0, "end_percent": 0.3})
    edited, _ = apply_pnp(model, trajectory, conditioning=early, tau_f=1.0, tau_a=1.0)
    watch = Watch()
    out = ksampler(watch.on(edited), start, positive, negative)
    assert torch.isfinite(out).all()
    assert 0 < watch.counters.source_calls < 4


def test_two_halves_of_a_run_equal_one_run(model, positive, negative):
    path = tiny_trajectory(model, steps=6)
    edited, _ = apply_pnp(model, path, tau_f=0.67, tau_a=0.5)
    latent = start_latent(path, model)["samples"]
    whole = ksampler(edited, latent, positive, negative, steps=6)
    half = ksampler(edited, latent, positive, negative, steps=6, disable_noise=True, start_step=0, last_step=2, force_full_denoise=False)
    rest = ksampler(edited, half, positive, negative, steps=6, disable_noise=True, start_step=2, last_step=6, force_full_denoise=True)
    assert relative(rest, whole) < 1e-4


def test_outside_a_sampler_the_wrapper_passes_through(model, trajectory, positive):
    import comfy.patcher_extension as extension

    edited, _ = apply_pnp(model, trajectory)
    wrapper = edited.get_wrappers(extension.WrappersMP.CALC_COND_BATCH, "palimpsest")[0]
    assert wrapper(lambda *args: args, "model", ["conds"], "x", "timestep", {}) == ("model", ["conds"], "x", "timestep", {})


def test_custom_sampler_with_its_own_schedule_interpolates(model, trajectory, positive, negative, start):
    sigmas = schedule(model, 5, "karras")
    edited, _ = apply_pnp(model, trajectory)
    assert torch.isfinite(custom_advanced(edited, start, positive, negative, sigmas)).all()


def test_features_follow_random_starts(model, trajectory, positive, negative):
    """Structure can be injected into a picture that starts from ordinary noise."""
    edited, _ = apply_pnp(model, trajectory)
    empty = torch.zeros(1, 4, 16, 16)
    out = ksampler(edited, empty, positive, negative)
    assert relative(out, ksampler(model, empty, positive, negative)) > 0.01


@pytest.mark.parametrize("device", ["auto", "gpu", "cpu"])
def test_bank_device_does_not_change_the_picture_and_is_logged_once(model, trajectory, positive, negative, start, device, caplog):
    edited, _ = apply_pnp(model, trajectory, bank_device=device)
    reference, _ = apply_pnp(model, trajectory)
    with caplog.at_level("INFO", logger="palimpsest"):
        out = ksampler(edited, start, positive, negative)
    assert sum("reference features" in line for line in caplog.messages) == 1
    assert torch.equal(out, ksampler(reference, start, positive, negative))


def test_the_example_of_the_readme_runs(root, model, trajectory, positive, negative, start):
    """The page a newcomer extends from must be true."""
    import re
    from dataclasses import dataclass

    from palimpsest.attention_patches.blocks import Point
    from palimpsest.attention_patches.edit import Edit
    from palimpsest.attention_patches.reference_pass import add_edit
    from palimpsest.attention_patches.source import Source

    page = (root / "attention_patches" / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    names = dict(dataclass=dataclass, Point=Point, Edit=Edit, add_edit=add_edit, Source=Source, model=model, trajectory=trajectory, conditioning=trajectory.conditioning)
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102  our own page, not input
    out = ksampler(names["edited"], start, positive, negative)
    assert torch.isfinite(out).all() and relative(out, ksampler(model, start, positive, negative, disable_noise=True)) > 1e-4
    for module in (root / "attention_patches").glob("*.py"):
        assert f"`{module.name}`" in page or module.name == "__init__.py", f"the README does not name {module.name}"
