"""The P2P edit through the host's stock samplers: the textbook map edit, neutrality, rows, batches, other nodes."""


from types import SimpleNamespace

import pytest
import torch


from palimpsest.attention_patches.blocks import Point, unet_layers
from palimpsest.attention_patches.edit import Chunk, SourceRows
from palimpsest.attention_patches.pnp import apply_pnp
from palimpsest.attention_patches.reference_pass import edits_of
from palimpsest.p2p.apply import Settings, apply_p2p
from palimpsest.p2p.edit import P2PRun, repeated, small_self_points, step_of
from palimpsest.tests.helpers.models import controlled, tiny_cond, tiny_controlnet, tiny_sd2, tiny_sdxl
from palimpsest.tests.helpers.prompts import WordClip
from palimpsest.tests.helpers.sampling import Watch, ksampler, latent_noise, no_free_memory

SOURCE, SWAP, REFINE = "a cat on a red sofa", "a dog on a red sofa", "a fluffy cat on a red sofa"
NOISE = latent_noise(1, 4, 16, 16, seed=9)


def relative(a, b):
    return float((a - b).norm() / b.norm())


def generate(model, found, negative, latent=None, **rest):
    """A run from pure noise with the controller's model and positive."""
    return ksampler(found.model if model is None else model, torch.zeros(1, 4, 16, 16) if latent is None else latent, found.positive, negative, **rest)


# ---- the rewrite against the textbook, in float64


class Projections:
    """An attention with random projections, in float64, and what is below it: plain softmax attention."""

    def __init__(self, heads, query_width, text_width, inner, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.heads = heads
        self.q, self.k, self.v = (torch.randn(inner, width, generator=generator, dtype=torch.float64) / width**0.5 for width in (query_width, text_width, text_width))

    def to_q(self, x):
        return x @ self.q.T

    def to_k(self, x):
        return x @ self.k.T

    def to_v(self, x):
        return x @ self.v.T

    def maps(self, q, k):
        q, k = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k))
        return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1)

    def apply(self, maps, v):
        return (maps @ v.unflatten(-1, (self.heads, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)

    def plain(self, q, k, v):
        return self.apply(self.maps(q, k), v)

    below = plain


@pytest.mark.parametrize("own_chunk", [0, 1])
@pytest.mark.parametrize("mapped, kept", [(True, False), (True, True), (False, True)])
@pytest.mark.parametrize("times", [1, 2])
def test_the_rewrite_equals_the_edit_of_the_map_in_float64(own_chunk, mapped, kept, times):
    """A_source (P V) + A_own (diag(o) V), with contexts that the host repeats, for two latents in two chunks."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    batch, tokens, width, text, source_tokens, target_tokens = 2, 9, 8, 6, 5, 7
    attention = Projections(2, width, text, 8)
    n, n_source = random(2 * batch, tokens, width), random(batch, tokens, width)
    context, source_context = random(2 * batch, target_tokens, text), random(batch, source_tokens, text)
    mapping = random(1, source_tokens, target_tokens).abs() if mapped else None
    keep = random(1, target_tokens) if kept else None
    chunks = [Chunk("negative", None, True), Chunk("positive", "mine", True)]
    chunks = chunks if own_chunk else chunks[::-1]
    rows = SourceRows(
        get=None, of=lambda branch, i: n_source, stored=None, context=lambda branch: source_context, chunks=tuple(chunks), batch=batch, sigma=1.0, size=(3, 3),
    )
    run = P2PRun(edit=SimpleNamespace(mark="mine", plans=()), levels=torch.tensor([1.0, 0.0]))
    run._steps[0] = (mapping, keep)
    point = Point("attn2", "input", 1)

    calls = context.repeat(1, times, 1)
    q, k, v = run.attention(point, n, calls, calls, rows)
    projected = attention.to_q(q), attention.to_k(k), attention.to_v(v)
    ours = run.attend(point, *projected, rows, attention) if run.replaces(point, 1.0) else attention.plain(*projected)

    for i, chunk in enumerate(chunks):
        there = slice(i * batch, (i + 1) * batch)
        own = attention.maps(attention.to_q(n[there]), attention.to_k(context[there]))
        edited = own
        if chunk.mark == "mine":
            source = attention.maps(attention.to_q(n_source), attention.to_k(source_context))
            edited = (source @ mapping[:, None] if mapped else 0) + (own * keep[:, None, None] if kept else 0)
        expected = attention.apply(edited, attention.to_v(context[there]))
        assert relative(ours[there], expected) < 1e-10


def test_a_step_without_edit_is_left_alone():
    run = P2PRun(edit=SimpleNamespace(mark="mine", plans=()), levels=torch.tensor([1.0, 0.0]))
    run._steps[0] = (None, None)
    rows = SourceRows(None, None, None, None, (Chunk("positive", "mine", True),), 1, 1.0, (2, 2))
    tensors = [torch.randn(1, 4, 3) for _ in range(3)]
    assert all(a is b for a, b in zip(run.attention(Point("attn2", "input", 1), *tensors, rows), tensors))
    assert not run.replaces(Point("attn2", "input", 1), 1.0) and run.edits_words(1.0) is False


# ---- steps and layers


def test_calls_between_two_noise_levels_belong_to_the_step_that_starts_above():
    levels = torch.tensor([10.0, 5.0, 2.0, 0.0])
    assert [step_of(sigma, levels) for sigma in (12.0, 10.0, 9.9999, 7.0, 5.0, 4.0, 2.0, 0.5, 0.0)] == [0, 0, 0, 0, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("latent, share, side, expected", [
    ((64, 64), 0.25, (16, 16), {"input": [7, 8], "middle": [0], "output": [3, 4, 5]}),
    ((64, 64), 0.5, (32, 32), {"input": [4, 5, 7, 8], "middle": [0], "output": [3, 4, 5, 6, 7, 8]}),
    ((16, 16), 0.25, (8, 8), {"input": [4, 5, 7, 8], "middle": [0], "output": [3, 4, 5, 6, 7, 8]}),
    ((64, 64), 0.0, (8, 8), {"middle": [0]}),
    ((64, 96), 0.25, (16, 24), {"input": [7, 8], "middle": [0], "output": [3, 4, 5]}),
    ((35, 37), 0.25, (9, 10), {"input": [7, 8], "middle": [0], "output": [3, 4, 5]}),
])
def test_small_self_attentions(model, latent, share, side, expected):
    points, limit = small_self_points(unet_layers(model), latent, share)
    assert limit == side
    assert points == {Point("attn1", part, number) for part, numbers in expected.items() for number in numbers}


def test_sizes_follow_the_halvings(model):
    layers = unet_layers(model)
    assert layers.size(("input", 1), (35, 37)) == (35, 37) and layers.size(("input", 7), (35, 37)) == (9, 10)
    assert layers.size(("middle", 0), (35, 37)) == (5, 5) and layers.size(("output", 9), (35, 37)) == (35, 37) and layers.size(("output", 3), (35, 37)) == (9, 10)


def test_repeating_keys_and_values_does_not_change_attention():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 4, generator=generator, dtype=torch.float64) for n in (3, 5, 5))
    plain = torch.softmax(q @ k.mT, -1) @ v
    again = torch.softmax(q @ repeated(k, 15).mT, -1) @ repeated(v, 15)
    assert relative(again, plain) < 1e-12
    with pytest.raises(Exception, match="do not fit"):
        repeated(k, 12)


# ---- whole runs


def test_an_edit_changes_the_picture_and_keeps_more_of_the_source_than_the_prompt_alone(model, clip, negative):
    found = apply_p2p(model, clip, SOURCE, SWAP, Settings(cross=(0.0, 1.0), self_window=(0.0, 1.0)))
    plain_source = ksampler(model, torch.zeros(1, 4, 16, 16), found.source, negative, steps=6)
    plain_edit = ksampler(model, torch.zeros(1, 4, 16, 16), found.positive, negative, steps=6)
    edited = generate(None, found, negative, steps=6)
    assert relative(edited, plain_edit) > 1e-3
    assert torch.equal(generate(None, found, negative, steps=6), edited), "queued twice"
    assert torch.equal(ksampler(model, torch.zeros(1, 4, 16, 16), found.source, negative, steps=6), plain_source), "the plain model is as it was"


@pytest.mark.parametrize("prompt, settings", [
    (SOURCE, Settings()),
    (SWAP, Settings(cross=(0.0, 0.0), self_window=(0.0, 0.0))),
    (SWAP, Settings(cross=(0.5, 0.5), self_window=(0.3, 0.3))),
])
@pytest.mark.parametrize("cfg", [1.0, 7.0])
def test_neutral_settings_install_nothing_and_say_so(model, clip, negative, prompt, settings, cfg):
    found = apply_p2p(model, clip, SOURCE, prompt, settings)
    assert found.model is model and edits_of(found.model) == () and "nothing is installed" in found.report
    plain = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
    assert torch.equal(generate(None, found, negative, cfg=cfg), ksampler(model, torch.zeros(1, 4, 16, 16), plain, negative, cfg=cfg))


@pytest.mark.parametrize("cfg, expected", [(4.0, [4, 4, 2, 2]), (1.0, [2, 2, 1, 1])])
def test_rows_of_a_co_evolving_source(model, clip, negative, cfg, expected):
    """Source and edit with both branches until the last edited step, then the plain run's rows."""
    found = apply_p2p(model, clip, SOURCE, SWAP, Settings(cross=(0.0, 0.4), self_window=(0.0, 0.5)))
    assert unet_rows(found.model, lambda watched: ksampler(watched, torch.zeros(1, 4, 16, 16), found.positive, negative, steps=4, cfg=cfg)) == expected


def test_rows_with_a_trajectory(model, clip, negative, trajectory, start):
    found = apply_p2p(model, clip, SOURCE, SWAP, Settings(cross=(0.0, 0.4), self_window=(0.0, 0.5)), trajectory=trajectory)
    assert unet_rows(found.model, lambda watched: ksampler(watched, start, found.positive, negative, steps=4)) == [3, 3, 2, 2]


def test_pnp_and_p2p_share_one_source_pass(model, clip, negative, trajectory, start):
    """Two nodes encode the same source prompt: equal tokens are one source."""
    injected, _ = apply_pnp(model, trajectory, tau_f=0.5, tau_a=0.5)
    found = apply_p2p(injected, clip, SOURCE, SWAP, Settings(cross=(0.0, 0.4), self_window=(0.0, 0.5)), trajectory=trajectory)
    assert unet_rows(found.model, lambda watched: ksampler(watched, start, found.positive, negative, steps=4)) == [3, 3, 2, 2]


def unet_rows(model, run):
    """Rows that went through the UNet at each of the run's noise levels, in order."""
    import comfy.patcher_extension

    rows: dict[float, int] = {}

    def count(executor, x, *args, **kwargs):
        sigma = float(kwargs.get("transformer_options", args[4] if len(args) > 4 else {})["sigmas"][0])
        rows[sigma] = rows.get(sigma, 0) + x.shape[0]
        return executor(x, *args, **kwargs)

    watched = model.clone()
    watched.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "count", count)
    run(watched)
    return [rows[sigma] for sigma in sorted(rows, reverse=True)]


@pytest.mark.parametrize("prompt", [SWAP, REFINE])
@pytest.mark.parametrize("batch", [2, 3])
def test_batches_equal_single_runs(model, clip, negative, trajectory, start, prompt, batch):
    found = apply_p2p(model, clip, SOURCE, prompt, Settings(), trajectory=trajectory)
    one = ksampler(found.model, start, found.positive, negative, cfg=7.0)
    many = ksampler(found.model, start.repeat(batch, 1, 1, 1), found.positive, negative, cfg=7.0)
    for row in many:
        assert relative(row[None], one) < 1e-4


def test_a_batch_of_edit_prompts_equals_one_edit_each(model, clip, negative, trajectory, start):
    prompts = [SWAP, REFINE, SOURCE]
    together = apply_p2p(model, clip, SOURCE, "\n---\n".join(prompts), Settings(), trajectory=trajectory)
    many = ksampler(together.model, start.repeat(3, 1, 1, 1), together.positive, negative, cfg=7.0)
    for prompt, row in zip(prompts, many):
        alone = apply_p2p(model, clip, SOURCE, prompt, Settings(), trajectory=trajectory)
        assert relative(row[None], ksampler(alone.model, start, alone.positive, negative, cfg=7.0, disable_noise=True)) < 1e-4
    with pytest.raises(ValueError, match="holds 3 edit prompts, but the sampler got 2 latents"):
        ksampler(together.model, start.repeat(2, 1, 1, 1), together.positive, negative)


@pytest.mark.parametrize("prompt", [SWAP, REFINE])
def test_split_calls_long_negatives_and_low_memory_agree(model, clip, negative, trajectory, start, prompt, monkeypatch):
    found = apply_p2p(model, clip, SOURCE, prompt, Settings(), trajectory=trajectory)
    joint = ksampler(found.model, start, found.positive, negative)
    long = [[negative[0][0].repeat(1, 2, 1), {}]]
    assert relative(ksampler(found.model, start, found.positive, long), joint) < 1e-4, "keys repeated to the common length"
    no_free_memory(monkeypatch)
    assert relative(ksampler(found.model, start, found.positive, negative), joint) < 1e-4


def test_a_prompt_of_two_chunks(model, clip, negative, trajectory, start):
    long = "very " * 80
    found = apply_p2p(model, clip, long + SOURCE, long + SWAP, Settings(), trajectory=trajectory)
    out = ksampler(found.model, start, found.positive, negative)
    plain = ksampler(model, start, clip.encode_from_tokens_scheduled(clip.tokenize(long + SWAP)), negative, disable_noise=True)
    assert found.positive[0][0].shape[1] == 154 and torch.isfinite(out).all() and relative(out, plain) > 1e-4


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "dpm_2", "uni_pc", "lms"])
def test_other_deterministic_samplers_run(model, clip, negative, sampler):
    found = apply_p2p(model, clip, SOURCE, REFINE, Settings())
    out = generate(None, found, negative, sampler=sampler)
    assert torch.isfinite(out).all() and torch.equal(out, generate(None, found, negative, sampler=sampler))


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_sde", "lcm", "ddpm"])
def test_noisy_samplers_are_refused_without_a_trajectory_and_allowed_with_one(model, clip, negative, trajectory, start, sampler):
    with pytest.raises(ValueError, match=f"{sampler} adds noise at every step") as error:
        generate(None, apply_p2p(model, clip, SOURCE, SWAP, Settings()), negative, sampler=sampler)
    assert "\n" not in str(error.value)
    found = apply_p2p(model, clip, SOURCE, SWAP, Settings(), trajectory=trajectory)
    assert torch.isfinite(ksampler(found.model, start, found.positive, negative, sampler=sampler)).all()


def test_another_positive_is_refused_before_sampling(model, clip, negative):
    found = apply_p2p(model, clip, SOURCE, SWAP, Settings())
    watch = Watch()
    with pytest.raises(ValueError, match="does not come from the P2P Controller"):
        ksampler(watch.on(found.model), torch.zeros(1, 4, 16, 16), tiny_cond(seed=1), negative)
    joined = [[torch.cat([found.positive[0][0], negative[0][0]], 1), found.positive[0][1]]]
    with pytest.raises(ValueError, match="has 154 text tokens, but the edit prompt has 77"):
        ksampler(watch.on(found.model), torch.zeros(1, 4, 16, 16), joined, negative)
    assert watch.calls == []


def test_control_and_areas_keep_the_mark(model, clip, negative, trajectory, start):
    import nodes

    found = apply_p2p(model, clip, SOURCE, SWAP, Settings(), trajectory=trajectory)
    edited = ksampler(found.model, start, found.positive, negative)
    control = controlled(found.positive, tiny_controlnet())
    assert relative(ksampler(found.model, start, control, negative), edited) > 1e-4
    area = nodes.ConditioningSetArea().append(found.positive, 64, 128, 0, 0, 1.0)[0]
    both = nodes.ConditioningCombine().combine(found.positive, area)[0]
    assert torch.isfinite(ksampler(found.model, start, both, negative)).all()


def test_a_replacement_of_another_node_stays_in_effect(model, clip, negative, trajectory, start):
    """The slot holds one replacement per block: ours takes along what is there (IP-Adapter sits there)."""
    from comfy.ldm.modules.attention import optimized_attention

    seen = []

    def replacement(q, k, v, extra_options):
        seen.append(q.shape[0])
        return optimized_attention(q, k, v, extra_options["n_heads"]) + 0.1

    patched = model.clone()
    patched.set_model_attn2_replace(replacement, "output", 4)
    found = apply_p2p(patched, clip, SOURCE, REFINE, Settings(), trajectory=trajectory)
    out = ksampler(found.model, start, found.positive, negative)
    without = apply_p2p(model, clip, SOURCE, REFINE, Settings(), trajectory=trajectory)
    assert seen.count(2) == 4, "each of four steps of the user's call"
    assert relative(out, ksampler(without.model, start, without.positive, negative)) > 1e-4


def test_state_is_gone_after_a_run_and_after_cancel(model, clip, negative):
    import comfy.model_management as mm

    found = apply_p2p(model, clip, SOURCE, REFINE, Settings())
    before = generate(None, found, negative)
    watch, watched = Watch(), None

    def stop(args):
        raise mm.InterruptProcessingException()

    watched = watch.on(found.model)
    watched.set_model_sampler_post_cfg_function(stop)
    with pytest.raises(mm.InterruptProcessingException):
        generate(watched, found, negative)
    assert all(len(run.store) == 0 and not run._path for state in watch.states for run in state.sources.values())
    assert torch.equal(generate(None, found, negative), before)


@pytest.mark.parametrize("make, clip_of", [(tiny_sd2, lambda: WordClip(1024)), (tiny_sdxl, lambda: WordClip(2048, pooled=1280))])
@pytest.mark.parametrize("prompt", [SWAP, REFINE])
def test_other_families(make, clip_of, prompt):
    model, clip = make(), clip_of()
    found = apply_p2p(model, clip, SOURCE, prompt, Settings())
    negative = tiny_cond(seed=2, dim=clip.width, pooled=clip.pooled)
    out = generate(None, found, negative, steps=2)
    plain = ksampler(model, torch.zeros(1, 4, 16, 16), found.positive, negative, steps=2)
    assert torch.isfinite(out).all() and relative(out, plain) > 1e-4


def test_chained_controllers_edit_their_own_prompt_only(model, clip, negative, trajectory, start):
    import nodes

    first = apply_p2p(model, clip, SOURCE, SWAP, Settings(), trajectory=trajectory)
    second = apply_p2p(first.model, clip, SOURCE, REFINE, Settings(), trajectory=trajectory)
    alone = apply_p2p(model, clip, SOURCE, REFINE, Settings(), trajectory=trajectory)
    assert torch.equal(ksampler(second.model, start, second.positive, negative), ksampler(alone.model, start, alone.positive, negative))
    both = nodes.ConditioningCombine().combine(first.positive, second.positive)[0]
    assert torch.isfinite(ksampler(second.model, start, both, negative)).all()
