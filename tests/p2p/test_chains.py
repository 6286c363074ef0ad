"""A source generated beside the run, among other nodes: it is what the source prompt would give in the same chain.

A local blend with an empty mask gives the source's picture, so that is compared with an ordinary run of the source prompt.
"""

import pytest
import torch

from palimpsest.p2p.apply import Settings, apply_p2p, split_prompts
from palimpsest.p2p.blend import LocalBlend
from palimpsest.p2p.local import add_blend
from palimpsest.tests.helpers import host_nodes
from palimpsest.tests.helpers.models import controlled, tiny_controlnet
from palimpsest.tests.helpers.sampling import Watch, ksampler

SOURCE, SWAP, REFINE = "a cat on a red sofa", "a dog on a red sofa", "a fluffy cat on a red sofa"
ZERO = torch.zeros(1, 4, 16, 16)


def relative(a, b):
    return float((a - b).norm() / b.norm())


def nowhere(found):
    """The controller's model with a blend that lets nothing change."""
    return add_blend(found.model, "", "", "", (0.3, 0.3), 0.0, True, torch.zeros(1, 64, 64))[0]


def test_the_source_gets_the_prompts_controlnet(model, clip, negative):
    """Regression: guidance pushed the source away from a ControlNet that only its negative had."""
    found, net = apply_p2p(model, clip, SOURCE, SWAP, Settings()), tiny_controlnet()
    control = controlled(negative, net)
    expected = ksampler(model, ZERO, controlled(found.source, net), control)
    assert relative(ksampler(nowhere(found), ZERO, controlled(found.positive, net), control), expected) < 1e-5
    assert relative(ksampler(model, ZERO, found.source, control), expected) > 1e-3


def test_a_connected_source_brings_its_own(model, clip, negative):
    net = tiny_controlnet()
    plain = clip.encode_from_tokens_scheduled(clip.tokenize(SOURCE))
    found = apply_p2p(model, clip, SOURCE, SWAP, Settings(), source_conditioning=plain)
    expected = ksampler(model, ZERO, plain, negative)
    assert relative(ksampler(nowhere(found), ZERO, controlled(found.positive, net), negative), expected) < 1e-5


def inpainting(patched, positive, negative, seed=1):
    import comfy.sample

    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1.0
    picture = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    noise = comfy.sample.prepare_noise(picture, seed)
    with torch.inference_mode():
        return comfy.sample.sample(patched, noise, 4, 4.0, "euler", "normal", positive, negative, picture, noise_mask=mask, seed=seed, disable_pbar=True)


@pytest.mark.parametrize("differential", [False, True])
def test_the_source_is_in_painted_too(model, clip, negative, differential):
    """Regression: outside the mask the source went its own way."""
    model = host_nodes.differential_diffusion(model) if differential else model
    found = apply_p2p(model, clip, SOURCE, SWAP, Settings())
    expected = inpainting(model, found.source, negative)
    assert relative(inpainting(nowhere(found), found.positive, negative), expected) < 1e-5
    assert relative(inpainting(found.model, found.positive, negative), expected) > 1e-4


def test_perturbed_calls_do_not_overwrite_the_sources_features(model, clip, negative):
    """Regression: PAG calls the model again within the source's prediction, with its attention disturbed."""
    def features(patched):
        found, seen = apply_p2p(patched, clip, SOURCE, SWAP, Settings()), {}
        watch = Watch()
        watched = watch.on(found.model)

        def note(args):
            for state in watch.states[-1:]:
                (run,) = state.sources.values()
                stored = run.store.get(float(args["sigma"][0]), None)
                seen.update({(float(args["sigma"][0]), key): value.tensor.clone() for key, value in (stored or {}).items()})
            return args["denoised"]

        watched.set_model_sampler_post_cfg_function(note)
        ksampler(watched, ZERO, found.positive, negative)
        return seen

    plain, perturbed = features(model), features(host_nodes.pag(model))
    first = max(sigma for sigma, _ in plain)
    compared = [key for sigma, key in plain if sigma == first]
    assert len(compared) > 10 and all(relative(perturbed[(first, key)], plain[(first, key)]) < 1e-5 for key in compared)


def test_an_idle_controller_costs_nothing(model, clip, negative):
    """Regression: the source of a chained controller whose prompt is not connected was run at every step."""
    first = apply_p2p(model, clip, "a bird on a chair", "a fish on a chair", Settings())
    blended = add_blend(first.model, "", "", "", (0.3, 0.3), 0.0, True, torch.zeros(1, 64, 64))[0]
    second = apply_p2p(blended, clip, SOURCE, SWAP, Settings())
    alone = apply_p2p(model, clip, SOURCE, SWAP, Settings())
    watch = Watch()
    out = ksampler(watch.on(second.model), ZERO, second.positive, negative)
    assert torch.equal(out, ksampler(alone.model, ZERO, alone.positive, negative)), "and its blend does not paste its source"
    assert all(len(state.sources) == 1 for state in watch.states)


def test_a_neutral_controller_in_a_chain_is_the_plain_prompt(model, clip, negative):
    """Regression: its unmarked prompt was refused as a stranger's by the edit before it."""
    first = apply_p2p(model, clip, SOURCE, SWAP, Settings())
    second = apply_p2p(first.model, clip, SOURCE, SOURCE, Settings())
    assert torch.equal(ksampler(second.model, ZERO, second.positive, negative), ksampler(model, ZERO, second.source, negative))


def test_edit_prompts_of_one_batch_are_edits_of_one_picture(model, clip, negative):
    """Without a trajectory too, where the sampler would give each latent other noise."""
    together = apply_p2p(model, clip, SOURCE, f"{SWAP}\n---\n{REFINE}\n---\n", Settings())
    many = ksampler(together.model, ZERO.repeat(2, 1, 1, 1), together.positive, negative)
    for prompt, row in zip((SWAP, REFINE), many):
        alone = apply_p2p(model, clip, SOURCE, prompt, Settings())
        # the host draws the noise of a batch row by row
        assert relative(row[None], ksampler(alone.model, ZERO, alone.positive, negative)) < 1e-4
    assert split_prompts("a\n---\n\n---\n") == ["a"] and split_prompts("---") == [""]


def test_the_source_prompt_among_the_edit_prompts_keeps_its_own_attention(model, clip, negative, trajectory, start):
    """Regression: its rows got the source's self-attention, which differs from their own when the paths do."""
    settings = Settings(cross=(0.0, 0.0), self_window=(0.0, 1.0))
    together = apply_p2p(model, clip, SOURCE, f"{SWAP}\n---\n{SOURCE}", settings, trajectory=trajectory)
    row = ksampler(together.model, start.repeat(2, 1, 1, 1), together.positive, negative)[1:]
    plain = ksampler(model, start, together.source, negative, disable_noise=True)
    assert relative(row, plain) < 1e-5


def test_another_schedule_is_said_once(model, clip, negative, trajectory, start, caplog):
    found = apply_p2p(model, clip, SOURCE, SWAP, Settings(), trajectory=trajectory)
    with caplog.at_level("INFO", logger="palimpsest"):
        ksampler(found.model, start, found.positive, negative, steps=trajectory.steps)
        assert not any("is interpolated" in line for line in caplog.messages)
        ksampler(found.model, start, found.positive, negative, steps=trajectory.steps + 3)
    assert sum("is interpolated" in line for line in caplog.messages) == 1


def test_a_second_sampler_is_warned_of(model, clip, negative, caplog):
    found = apply_p2p(model, clip, SOURCE, SWAP, Settings())
    with caplog.at_level("WARNING", logger="palimpsest"):
        half = ksampler(found.model, ZERO, found.positive, negative, last_step=2)
        assert not any("goes on from a half-done latent" in line for line in caplog.messages)
        ksampler(found.model, half, found.positive, negative, start_step=2, disable_noise=True)
    assert sum("goes on from a half-done latent" in line for line in caplog.messages) == 1


def test_no_small_self_attention_is_an_error(model, clip, negative):
    found = apply_p2p(model, clip, SOURCE, SWAP, Settings(self_share=0.0))
    large = torch.zeros(1, 4, 80, 80)  # the smallest map is 10 x 10
    with pytest.raises(ValueError, match="the smallest map of this model at this size is 10 x 10: raise self_limit to 0.125"):
        ksampler(found.model, large, found.positive, negative)
    closed = apply_p2p(model, clip, SOURCE, SWAP, Settings(self_share=0.0, self_window=(0.0, 0.0)))
    assert torch.isfinite(ksampler(closed.model, large, closed.positive, negative, steps=1)).all()


def test_masks_and_areas_that_a_blend_cannot_take_are_refused_before_sampling(model, clip, negative):
    import nodes

    found, watch = apply_p2p(model, clip, SOURCE, SWAP, Settings()), Watch()
    three = add_blend(found.model, "", "", "", (0.3, 0.3), 0.0, True, torch.zeros(3, 64, 64))[0]
    with pytest.raises(ValueError, match="got 3 masks, but the sampler got 1 latents"):
        ksampler(watch.on(three), ZERO, found.positive, negative)
    words = add_blend(found.model, "dog", "cat", "", (0.3, 0.3), 0.0, True)[0]
    area = nodes.ConditioningSetArea().append(found.positive, 64, 128, 0, 0, 1.0)[0]
    with pytest.raises(ValueError, match="limited to an area"):
        ksampler(watch.on(words), ZERO, area, negative)
    assert watch.calls == []


def test_word_maps_are_summed_over_steps_without_keeping_them(model, clip, negative):
    found, watch = apply_p2p(model, clip, SOURCE, SWAP, Settings()), Watch()
    ksampler(watch.on(add_blend(found.model, "dog", "cat", "", (0.3, 0.3), 0.0, True)[0]), ZERO, found.positive, negative)
    (run,) = [edit for edit in watch.states[-1].edits if isinstance(getattr(edit, "blend", None), LocalBlend)]
    assert {tensor.shape[-1] for tensor in run._sums.values()} == {2} and len(run._seen) == 4 * len(run._sums)
