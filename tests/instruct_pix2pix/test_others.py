"""The image scale with other nodes on the same MODEL: guidances, ControlNet, LoRA, attention replacements, areas, masks, edits of this pack."""

import pytest
import torch

from palimpsest.attention_patches.pnp import apply_pnp
from palimpsest.inversion.trajectory import start_latent
from palimpsest.instruct_pix2pix.guidance import add_image_guidance
from palimpsest.tests.helpers import host_nodes
from palimpsest.tests.helpers.instruct_pix2pix import Calls, edit_cond, explicit, picture_latent, relative, tiny_edit
from palimpsest.tests.helpers.models import controlled, tiny_controlnet, tiny_trajectory
from palimpsest.tests.helpers.sampling import OneByOne, custom_advanced, ksampler, latent_noise, no_free_memory, schedule


def rescale(model):
    return host_nodes.run_node("nodes_model_advanced", "RescaleCFG", model, 0.7)


class Around:
    """Notes the guided prediction before and after the guidances that a node adds."""

    def __init__(self, model, node):
        self.before, self.after = [], []
        clone = model.clone()
        clone.set_model_sampler_post_cfg_function(self._note(self.before))
        self.model = node(clone)
        self.model.set_model_sampler_post_cfg_function(self._note(self.after))

    @staticmethod
    def _note(kept):
        return lambda args: kept.append(args["denoised"].double()) or args["denoised"]

    def increments(self):
        return [after - before for before, after in zip(self.before, self.after)]


@pytest.fixture(scope="module")
def perturbed():
    """An edit model whose middle self-attention, which PAG perturbs, matters for its prediction."""
    model = tiny_edit()
    with torch.no_grad():
        for name, weight in model.model.diffusion_model.middle_block.named_parameters():
            if name.endswith(("attn1.to_out.0.weight", "1.proj_out.weight")):
                weight.mul_(30)
    return model


def each_level(model, positive, negative, cfg=4.0):
    """One step from the same latents at each of three noise levels."""
    for sigma in schedule(model, 4)[1:4]:
        custom_advanced(model, torch.zeros(1, 4, 16, 16), positive, negative, torch.stack([sigma, 0 * sigma]), cfg=cfg, noise=latent_noise(1, 4, 16, 16, seed=6))


@pytest.mark.parametrize("pag_first", [True, False])
@pytest.mark.parametrize("separate", ["off", "on"])
def test_pags_increment_is_that_of_unshifted_predictions(perturbed, positive, negative, pag_first, separate):
    """Regression: PAG compares the step's prediction with one more; shifted against unshifted it pushed along the picture as well."""
    plain, guided = (Around(perturbed, host_nodes.pag) for _ in range(2))
    if not pag_first:
        guided = Around(add_image_guidance(perturbed, 1.5, separate=separate), host_nodes.pag)
    each_level(plain.model, positive, negative)
    each_level(add_image_guidance(guided.model, 1.5, separate=separate) if pag_first else guided.model, positive, negative)
    assert len(plain.after) == len(guided.after) == 3
    for ours, theirs in zip(guided.increments(), plain.increments()):
        assert float(theirs.norm()) > 0.1 and relative(ours, theirs) <= 1e-5
    assert all(relative(ours, theirs) > 1e-3 for ours, theirs in zip(guided.before, plain.before)), "the picture's guidance is there"


def test_pags_increment_survives_context_windows(perturbed):
    """Windows copy the lists, so a list is known by its entries there."""
    pytest.importorskip("comfy.context_windows")
    picture = picture_latent(1)
    positive, negative = edit_cond(picture, seed=1), edit_cond(picture, seed=2)
    noise, sigmas = latent_noise(2, 4, 16, 16, seed=6), schedule(perturbed, 4)[1:3]
    found = []
    for patched in (perturbed, add_image_guidance(perturbed, 1.5)):
        around = Around(patched, host_nodes.pag)
        around.model.model_options["context_handler"] = OneByOne()
        custom_advanced(around.model, torch.zeros(2, 4, 16, 16), positive, negative, torch.tensor([float(sigmas[0]), 0.0]), noise=noise)
        found.append(around)
    assert relative(found[1].increments()[0], found[0].increments()[0]) <= 1e-5
    assert relative(found[1].before[0], found[0].before[0]) > 1e-3


@torch.inference_mode()
def test_rescale_cfg_rescales_what_both_scales_give(model, positive, negative, start):
    """The rule of RescaleCFG, applied by hand to the shifted predictions."""
    guided, seen = add_image_guidance(rescale(model), 1.5), []

    def note(args):
        seen.append((args["input"], float(args["sigma"][0]), args["denoised"]))
        return args["denoised"]

    guided.set_model_sampler_post_cfg_function(note)
    ksampler(guided, start, positive, negative, cfg=6.0)
    picture, prompts = positive[0][1]["concat_latent_image"], [(cond[0][0], None) for cond in (positive, negative)]
    for x, sigma, denoised in seen:
        image = explicit(model, x, sigma, *prompts, 1.5, 0.0, picture)
        full = explicit(model, x, sigma, *prompts, 1.5, 1.0, picture)
        # as velocities: v = (x / (s^2 + 1) - x0) sqrt(s^2 + 1) / s
        v_image, v_full = ((x / (sigma**2 + 1) - x0) * (sigma**2 + 1) ** 0.5 / sigma for x0 in (image, full))
        v = v_image + 6.0 * (v_full - v_image)
        v = 0.7 * v * v_full.std((1, 2, 3), keepdim=True) / v.std((1, 2, 3), keepdim=True) + 0.3 * v
        assert relative(denoised, x / (sigma**2 + 1) - v * sigma / (sigma**2 + 1) ** 0.5) <= 1e-5


PATCHES = {"rescale": rescale, "pag": host_nodes.pag, "sag": host_nodes.sag, "lora": host_nodes.lora, "differential": host_nodes.differential_diffusion,
           "hyper_tile": host_nodes.hyper_tile}


@pytest.mark.parametrize("name", PATCHES)
def test_the_order_of_nodes_does_not_matter(model, positive, negative, start, name):
    plain = ksampler(model, start, positive, negative)
    last, first = add_image_guidance(PATCHES[name](model), 1.5), PATCHES[name](add_image_guidance(model, 1.5))
    out = ksampler(last, start, positive, negative)
    assert torch.isfinite(out).all() and torch.equal(out, ksampler(first, start, positive, negative))
    assert relative(out, ksampler(PATCHES[name](model), start, positive, negative)) > 1e-3, "the image scale takes part"
    if name not in ("differential", "hyper_tile"):  # nothing to do without a mask, and in latents this small
        assert relative(out, ksampler(add_image_guidance(model, 1.5), start, positive, negative)) > 1e-3, "the other node takes part"
    assert torch.equal(ksampler(model, start, positive, negative), plain)


@pytest.mark.parametrize("separate", ["off", "on"])
def test_sag_blurs_where_the_negative_with_the_picture_looks(model, positive, negative, start, separate, monkeypatch):
    """SAG keeps the attention of the second list it saw last: that must not be the prediction without a picture, joint or apart."""
    joint = ksampler(host_nodes.sag(add_image_guidance(model, 1.5)), start, positive, negative)
    assert relative(ksampler(host_nodes.sag(add_image_guidance(model, 1.5, separate=separate)), start, positive, negative), joint) < 1e-4


def test_lora_is_in_all_three_predictions(model, positive, negative, start):
    """As if the weights had been the model's own."""
    patched = host_nodes.lora(model)
    merged = tiny_edit()
    weights = dict(merged.model.diffusion_model.named_parameters())
    with torch.no_grad():
        for name, patches in patched.patches.items():
            weights[name.removeprefix("diffusion_model.")] += patches[0][1][1][0]
    assert relative(ksampler(add_image_guidance(patched), start, positive, negative), ksampler(add_image_guidance(merged), start, positive, negative)) < 1e-4


@pytest.mark.parametrize("batch", [1, 2])
def test_controlnet_is_in_all_three_predictions_and_one_call(model, batch):
    picture, start = picture_latent(batch), torch.zeros(batch, 4, 16, 16)
    positive, negative = edit_cond(picture, seed=1), edit_cond(picture, seed=2)
    net = tiny_controlnet()
    guided = [controlled(cond, net) for cond in (positive, negative)]
    # two calls above make two copies of the ControlNet; one node gives both prompts the same
    guided[1] = [[guided[1][0][0], {**guided[1][0][1], "control": guided[0][0][1]["control"]}]]
    calls = Calls()
    out = ksampler(calls.on(add_image_guidance(model)), start, *guided)
    assert relative(out, ksampler(add_image_guidance(model), start, positive, negative)) > 1e-3
    assert all(sorted(rows) == [0, 1, 2] for rows in calls.rows), "the same ControlNet on all three lets the host batch them"
    hint_of = guided[0][0][1]["control"]
    assert hint_of.cond_hint is None, "the host has cleaned it up"
    apart = ksampler(add_image_guidance(model, separate="on"), start, *guided)
    assert relative(apart, out) < 1e-4


def replacing(model):
    """A node in the way of IPAdapter: replaces cross-attentions and looks up 0 and 1 in a list of two."""
    clone, seen = model.clone(), []

    def replacement(q, k, v, extra_options):
        from comfy.ldm.modules.attention import optimized_attention

        weights = [1.0, 0.0]
        rows = [weights[i] for i in extra_options["cond_or_uncond"]]
        seen.append(list(extra_options["cond_or_uncond"]))
        factor = torch.tensor(rows).repeat_interleave(q.shape[0] // len(rows))[:, None, None]
        return optimized_attention(q, k, v, extra_options["n_heads"]) * (1 + 0.5 * factor)

    clone.set_model_attn2_replace(replacement, "output", 4, 0)
    return clone, seen


@pytest.mark.parametrize("order", ["ours last", "ours first"])
def test_replaced_cross_attentions_get_a_separate_call(model, positive, negative, start, order):
    if order == "ours first":
        patched, seen = replacing(add_image_guidance(model, 1.5))
    else:
        patched, seen = replacing(model)
        patched = add_image_guidance(patched, 1.5)
    out = ksampler(patched, start, positive, negative)
    assert torch.isfinite(out).all() and seen[0] == [1] and {tuple(sorted(rows)) for rows in seen} == {(1,), (0, 1)}


def test_without_a_separate_call_such_a_node_fails(model, positive, negative, start):
    """What "auto" is for: three rows, and lists of two."""
    patched, _ = replacing(model)
    with pytest.raises(IndexError):
        ksampler(add_image_guidance(patched, 1.5, separate="off"), start, positive, negative)


def test_separate_calls_give_the_same_picture(model, positive, negative, start):
    joint = ksampler(add_image_guidance(model), start, positive, negative)
    calls = Calls()
    apart = ksampler(calls.on(add_image_guidance(model, separate="on")), start, positive, negative)
    assert relative(apart, joint) < 1e-4 and calls.lists == [(False, True), (True, True)] * 4


def test_area_prompts_keep_their_areas(model, positive, negative, start, monkeypatch):
    import nodes

    area = nodes.ConditioningSetArea().append(edit_cond(positive[0][1]["concat_latent_image"], seed=3), 64, 128, 64, 0, 1.0)[0]
    prompts = nodes.ConditioningCombine().combine(positive, area)[0]
    guided = add_image_guidance(model)
    joint = ksampler(guided, start, prompts, negative)
    assert relative(joint, ksampler(guided, start, positive, negative)) > 1e-3
    no_free_memory(monkeypatch)
    assert relative(ksampler(guided, start, prompts, negative), joint) < 1e-4


def test_pictures_of_areas_stay_apart_when_the_negative_has_none(model, start):
    """Two areas, each with a picture of its own: the negative of each gets the picture of its area."""
    import nodes

    left, right = picture_latent(seed=1), picture_latent(seed=2)

    def both(seeds, pictures):
        halves = [nodes.ConditioningSetArea().append(edit_cond(p, seed=s), 64, 128, x, 0, 1.0)[0] for s, p, x in zip(seeds, pictures, (0, 64))]
        return nodes.ConditioningCombine().combine(*halves)[0]

    guided = add_image_guidance(model)
    expected = ksampler(guided, start, both((1, 2), (left, right)), both((3, 3), (left, right)))
    assert torch.equal(ksampler(guided, start, both((1, 2), (left, right)), both((3, 3), (None, None))), expected)


def test_a_noise_mask_keeps_the_rest(model, positive, negative):
    latent, mask = picture_latent(seed=8), torch.zeros(1, 1, 128, 128)
    mask[..., 64:] = 1
    out = ksampler(add_image_guidance(model), {"samples": latent, "noise_mask": mask}, positive, negative)
    assert torch.allclose(out[..., :8], latent[..., :8], atol=1e-4) and relative(out[..., 8:], latent[..., 8:]) > 0.1


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "uni_pc", "euler_cfg_pp"])
def test_other_samplers(model, positive, negative, start, sampler):
    out = ksampler(add_image_guidance(model), start, positive, negative, sampler=sampler)
    assert torch.isfinite(out).all() and relative(out, ksampler(model, start, positive, negative, sampler=sampler)) > 1e-4


def test_an_edit_of_this_pack_acts_on_all_three_predictions(model, positive, negative):
    """Plug-and-Play on an edit model, before or after: the third row is injected as the negative is."""
    trajectory = tiny_trajectory(model)
    latent = start_latent(trajectory, model)["samples"]
    before = add_image_guidance(apply_pnp(model, trajectory, attention_layers="u0-8")[0], 1.5)
    after = apply_pnp(add_image_guidance(model, 1.5), trajectory, attention_layers="u0-8")[0]
    out = ksampler(before, latent, positive, negative)
    assert torch.equal(ksampler(after, latent, positive, negative), out)
    assert relative(out, ksampler(add_image_guidance(model, 1.5), latent, positive, negative, disable_noise=True)) > 1e-3
    assert relative(out, ksampler(apply_pnp(model, trajectory, attention_layers="u0-8")[0], latent, positive, negative)) > 1e-3
