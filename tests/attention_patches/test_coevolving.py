"""A source that is generated beside the run: it equals an ordinary generation of its own."""

from dataclasses import dataclass

import pytest
import torch

from palimpsest.attention_patches.blocks import Point
from palimpsest.attention_patches.edit import Edit
from palimpsest.attention_patches.reference_pass import add_edit
from palimpsest.attention_patches.samplers import Solver, sampler_name, solver_of
from palimpsest.attention_patches.source import CoevolvingSource, Source, conditioning_key
from palimpsest.tests.helpers.models import tiny_cond
from palimpsest.tests.helpers.sampling import Watch, ksampler

ZERO = torch.zeros(1, 4, 16, 16)


@dataclass(frozen=True, eq=False)
class Look(Edit):
    """Wants features of the middle block above a noise level, changes nothing."""

    floor: float = 0.0

    def points(self, sigma):
        return frozenset({Point("attn1", "middle", 0)}) if sigma > self.floor else frozenset()


def looking(model, cond, floor=0.0):
    return add_edit(model, Look(source=CoevolvingSource(None, (("source", cond),)), floor=floor))


@pytest.mark.parametrize("cfg", [1.0, 5.0])
@pytest.mark.parametrize("sampler", ["euler", "ddim", "heun", "dpmpp_2m"])
def test_the_source_is_the_euler_run_of_its_prompt_bit_for_bit(model, positive, negative, cfg, sampler):
    """Whatever sampler the user's run has, as long as it visits the schedule's noise levels only."""
    source, path = tiny_cond(seed=11), {}
    plain = model.clone()
    plain.set_model_sampler_post_cfg_function(lambda args: path.setdefault(float(args["sigma"][0]), args["input"].clone()) is None or args["denoised"])
    ksampler(plain, ZERO, source, negative, cfg=cfg, steps=5)

    visited = {}
    watched = looking(model, source)
    watch = Watch()
    watched = watch.on(watched)

    def note(args):
        # the source's own prediction passes here as well, without a state of ours
        for state in watch.states[-1:]:
            (run,) = state.sources.values()
            visited.update({sigma: x for sigma, (_, x, _) in run._path.items()})
        return args["denoised"]

    watched.set_model_sampler_post_cfg_function(note)
    out = ksampler(watched, ZERO, positive, negative, cfg=cfg, steps=5, sampler=sampler)
    assert torch.equal(out, ksampler(model, ZERO, positive, negative, cfg=cfg, steps=5, sampler=sampler)), "looking changes nothing"
    shared = sorted(set(path) & set(visited), reverse=True)
    assert len(shared) == 5
    for sigma in shared:
        assert torch.equal(visited[sigma], path[sigma]), f"sigma {sigma}"


def test_the_source_is_taken_along_to_late_windows_and_dropped_after_the_last(model, positive, negative):
    import comfy.samplers

    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 4)

    @dataclass(frozen=True, eq=False)
    class Late(Look):
        def points(self, sigma):
            return super().points(sigma) if abs(sigma / float(sigmas[2]) - 1) < 1e-3 else frozenset()

    edited = add_edit(model, Late(source=CoevolvingSource(None, (("source", positive),))))
    watch, calls = Watch(), []

    def note(args):
        calls.extend(state.counters.source_calls for state in watch.states[-1:])
        return args["denoised"]

    edited = watch.on(edited)
    edited.set_model_sampler_post_cfg_function(note)
    ksampler(edited, ZERO, positive, negative)
    assert calls[-1] == 3


def test_equal_conditioning_of_two_nodes_is_one_source():
    first, again, other = tiny_cond(seed=1), tiny_cond(seed=1), tiny_cond(seed=2)
    assert first[0][0] is not again[0][0]
    assert conditioning_key(first) == conditioning_key(again) != conditioning_key(other)
    pooled = tiny_cond(seed=1, pooled=8)
    assert conditioning_key(pooled) != conditioning_key(first)
    control = [[first[0][0], {"control": object()}]]
    assert conditioning_key(control) != conditioning_key(first)
    path = object()
    assert Source(path, (("source", first),)).key == Source(path, (("source", again),)).key != Source(object(), (("source", first),)).key
    assert CoevolvingSource(None, (("source", first),)).key == CoevolvingSource(None, (("source", again),)).key


def test_every_sampler_of_the_host_is_known():
    import comfy.samplers

    kinds = {name: solver_of(comfy.samplers.sampler_object(name)) for name in comfy.samplers.SAMPLER_NAMES}
    assert {name for name, kind in kinds.items() if kind is Solver.EULER} == {"euler", "ddim"}
    for name in ("euler_ancestral", "dpmpp_sde", "dpmpp_3m_sde_gpu", "lcm", "ddpm", "er_sde", "seeds_2", "sa_solver", "res_multistep_ancestral"):
        if name in kinds:
            assert kinds[name] is Solver.STOCHASTIC, name
    assert not {name for name, kind in kinds.items() if kind is Solver.UNKNOWN}
    assert {name for name, kind in kinds.items() if kind is Solver.OTHER_GUIDANCE} <= {"euler_cfg_pp", "dpmpp_2m_cfg_pp", "res_multistep_cfg_pp", "gradient_estimation_cfg_pp"}
    assert solver_of(comfy.samplers.ksampler("dpm_adaptive", {"eta": 0.5})) is Solver.STOCHASTIC
    churned = comfy.samplers.ksampler("euler", {"s_churn": 0.5})
    assert solver_of(churned) is Solver.STOCHASTIC and sampler_name(churned) == "euler"


def test_an_unknown_sampler_runs_with_one_warning(model, positive, negative, caplog):
    import comfy.samplers

    from palimpsest.tests.helpers.sampling import custom_advanced, schedule

    def mine(denoiser, x, sigmas, extra_args=None, callback=None, disable=None):
        for now, then in zip(sigmas[:-1], sigmas[1:]):
            denoised = denoiser(x, now * x.new_ones([x.shape[0]]), **(extra_args or {}))
            x = x + (x - denoised) / now * (then - now)
        return x

    with caplog.at_level("WARNING", logger="palimpsest"):
        custom_advanced(looking(model, tiny_cond(seed=4)), ZERO, positive, negative, schedule(model, 3), sampler=comfy.samplers.KSAMPLER(mine), noise=torch.randn(1, 4, 16, 16))
    assert sum("sampler mine is not known" in line for line in caplog.messages) == 1


def test_other_guiders_generate_the_source_their_own_way(model, positive, negative):
    """DualCFG has two guidance scales and three prompts; the source stands for its positive."""
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG

    middle, source, sigmas = tiny_cond(seed=5), tiny_cond(seed=6), comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 3)

    def run(patched, prompt):
        guider = Guider_DualCFG(patched)
        guider.set_conds(prompt, middle, negative)
        guider.set_cfg(4.0, 2.0)
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        path = []

        def euler(denoiser, x, levels, extra_args=None, callback=None, disable=None):
            for now, then in zip(levels[:-1], levels[1:]):
                path.append(x.clone())
                denoised = denoiser(x, now * x.new_ones([1]), **(extra_args or {}))
                x = x + (x - denoised) / now * (then - now)
            return x

        with torch.inference_mode():
            guider.sample(noise, torch.zeros_like(noise), comfy.samplers.KSAMPLER(euler), sigmas, disable_pbar=True)
        return path

    expected = run(model, source)
    watch, visited = Watch(), {}
    watched = watch.on(looking(model, source))

    def note(args):
        for state in watch.states[-1:]:
            (one,) = state.sources.values()
            visited.update({sigma: x for sigma, (_, x, _) in one._path.items()})
        return args["denoised"]

    watched.set_model_sampler_post_cfg_function(note)
    run(watched, positive)
    for sigma, x in zip(sigmas[:-1], expected):
        if float(sigma) in visited:
            assert torch.equal(visited[float(sigma)], x)
    assert len(visited) >= 2
