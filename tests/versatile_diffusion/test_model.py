"""The host's sampling stack on the dual model: what conditioning means, and what other nodes do to it."""

import pytest
import torch

from palimpsest.tests.helpers.host_nodes import free_u, lora, pag
from palimpsest.tests.helpers.models import controlled, tiny_controlnet, tiny_sd15
from palimpsest.tests.helpers.sampling import custom_advanced, ksampler, latent_noise, no_free_memory, schedule
from palimpsest.tests.helpers.versatile import context, diffusers_unet, dual, relative, set_mix, single, tiny
from palimpsest.versatile_diffusion.contexts import image_conditioning
from palimpsest.versatile_diffusion.model import VersatileDiffusion, check_model, looks_raw

EMPTY = torch.zeros(1, 4, 16, 16)


@pytest.fixture(scope="module")
def model():
    return tiny()


def text(tokens=77, seed=0):
    return [[context(tokens, seed), {}]]


def image(tokens=257, seed=100):
    return image_conditioning([context(tokens, seed)])


def zeros(tokens=257):
    return image_conditioning([torch.zeros(1, tokens, 64)])


class Calls:
    """Batches that reach the UNet: rows, tokens of each context, share of the text."""

    def __init__(self, model):
        self.model, self.seen = model.clone(), []
        self.model.set_model_unet_function_wrapper(self._wrapper)

    def _wrapper(self, apply_model, args):
        c = args["c"]
        extra = c.get("vd_image")
        self.seen.append((args["input"].shape[0], c["c_crossattn"].shape[1], None if extra is None else extra.shape[1], c["vd_ratio"]))
        return apply_model(args["input"], args["timestep"], **c)


@pytest.mark.parametrize("ratio, part", [(0.0, "image"), (1.0, "text")])
def test_ratio_0_and_1_are_the_single_flows_of_the_plain_host_bit_for_bit(model, ratio, part):
    both = ksampler(model, EMPTY, dual(ratio), dual(ratio, seed=5))
    positive, negative = (text(seed=0), text(seed=5)) if part == "text" else (image(seed=100), image(seed=105))
    alone = ksampler(model, EMPTY, positive, negative)
    plain = ksampler(single(model, part), EMPTY, [[positive[0][0], {}]], [[negative[0][0], {}]])
    assert torch.equal(both, alone) and torch.equal(alone, plain)


def test_ratios_between_differ_from_both_ends_and_from_each_other(model):
    out = [ksampler(model, EMPTY, dual(ratio), dual(ratio, seed=5)) for ratio in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert all(relative(a, b) > 1e-3 for i, a in enumerate(out) for b in out[:i])


def test_a_ratio_outside_is_an_end(model):
    assert torch.equal(ksampler(model, EMPTY, dual(1.5), dual(1.5, seed=5)), ksampler(model, EMPTY, dual(1.0), dual(1.0, seed=5)))


@pytest.mark.parametrize("tokens", [(77, 257), (154, 514), (231, 1)], ids=["equal", "twice", "too far for one batch"])
def test_positive_and_negative_of_unequal_length(model, monkeypatch, tokens):
    positive, negative = dual(0.5), dual(0.5, *tokens, seed=5)
    calls = Calls(model)
    together = ksampler(calls.model, EMPTY, positive, negative, steps=2)
    assert {rows for rows, *_ in calls.seen} == {2 if tokens[1] != 1 else 1}
    no_free_memory(monkeypatch)
    apart = ksampler(model, EMPTY, positive, negative, steps=2)
    assert relative(together, apart) < 1e-4


def test_ratios_are_kept_apart_in_a_batch(model):
    calls = Calls(model)
    ksampler(calls.model, EMPTY, dual(0.5), dual(0.25, seed=5), steps=1)
    assert sorted(calls.seen) == [(1, 77, 257, 0.25), (1, 77, 257, 0.5)]
    calls = Calls(model)
    ksampler(calls.model, EMPTY, dual(0.0), zeros(), steps=1)
    assert calls.seen == [(2, 257, None, 0.0)], "a picture alone runs with its negative, without a second context"


def test_a_text_may_be_the_negative_of_a_picture(model):
    calls = Calls(model)
    out = ksampler(calls.model, EMPTY, image(), text(), steps=1)
    assert torch.isfinite(out).all() and sorted(call[3] for call in calls.seen) == [0.0, 1.0]


def test_one_context_per_latent(model):
    noise = latent_noise(2, 4, 16, 16)
    pictures = [context(257, seed) for seed in (1, 2)]
    both = ksampler(model, noise, image_conditioning([torch.cat(pictures)]), zeros(), steps=2)
    for i, one in enumerate(pictures):
        same = ksampler(model, noise, image_conditioning([one]), zeros(), steps=2)
        assert relative(both[i], same[i]) < 1e-4
    assert relative(both[0], ksampler(model, noise, image_conditioning([pictures[1]]), zeros(), steps=2)[0]) > 1e-3


def test_timestep_ranges_switch_the_flow(model):
    ranged = run_range(dual(0.5), 0.0, 0.5) + run_range(image(), 0.5, 1.0)
    calls = Calls(model)
    out = ksampler(calls.model, EMPTY, ranged, zeros(), steps=4)
    assert {call[3] for call in calls.seen} == {0.0, 0.5} and torch.isfinite(out).all()
    assert [call[3] for call in calls.seen if call[0] == 2] == [0.0] * 2, "the second half runs in one batch"


def run_range(conditioning, start, end):
    import nodes

    return nodes.ConditioningSetTimestepRange().set_range(conditioning, start, end)[0]


def test_areas_and_masks(model):
    import nodes

    latent = torch.zeros(1, 4, 24, 32)
    left, right = (nodes.ConditioningSetArea().append(dual(0.5, seed=seed), 128, 192, x, 0, 1.0)[0] for seed, x in ((1, 0), (2, 128)))
    plain = ksampler(model, latent, dual(0.5), dual(0.5, seed=5), steps=2)
    out = ksampler(model, latent, left + right, dual(0.5, seed=5), steps=2)
    assert torch.isfinite(out).all() and relative(out, plain) > 1e-3
    # each half follows its own context
    swapped = ksampler(model, latent, left + nodes.ConditioningSetArea().append(dual(0.5, seed=3), 128, 192, 128, 0, 1.0)[0], dual(0.5, seed=5), steps=1)
    first = ksampler(model, latent, left + right, dual(0.5, seed=5), steps=1)
    assert relative(swapped[..., :16], first[..., :16]) < 1e-3 < relative(swapped[..., 16:], first[..., 16:])


def test_in_painting_keeps_what_the_mask_keeps(model):
    latent = latent_noise(1, 4, 16, 16)
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., 64:] = 1
    out = ksampler(model, {"samples": latent, "noise_mask": mask}, dual(0.5), dual(0.5, seed=5), steps=2)
    assert relative(out[..., :8], latent[..., :8]) < 1e-6 and relative(out[..., 8:], latent[..., 8:]) > 0.1


def test_other_nodes_work_on_it_and_leave_it_as_it_was():
    model = tiny(multipliers=(1, 2, 4, 4))  # FreeU knows its layers by their widths
    positive, negative = dual(0.5), dual(0.5, seed=5)
    plain = ksampler(model, EMPTY, positive, negative, steps=2)
    for other in (free_u, pag, lora):
        out = ksampler(other(model), EMPTY, positive, negative, steps=2)
        assert torch.isfinite(out).all() and relative(out, plain) > 1e-5, other.__name__
    assert torch.equal(ksampler(model, EMPTY, positive, negative, steps=2), plain)


def test_a_lora_for_stable_diffusion_reaches_the_text_set(model):
    """Names of the kohya and of the diffusers kind; the other set has names of its own."""
    import comfy.lora

    names = comfy.lora.model_lora_keys_unet(model.model, {})
    assert names["lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"] == "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    assert names["lora_unet_input_blocks_1_1_image_transformer_blocks_0_attn2_to_k"] == "diffusion_model.input_blocks.1.1.image.transformer_blocks.0.attn2.to_k.weight"


def test_a_weight_patch_on_one_set_changes_its_flow_only(model):
    positive = {"text": text(), "image": image()}
    plain = {part: ksampler(model, EMPTY, positive[part], zeros() if part == "image" else text(seed=5), steps=1) for part in positive}
    for part, infix in (("text", ""), ("image", "image.")):
        key = f"diffusion_model.middle_block.1.{infix}proj_out.weight"
        patched = model.clone()
        assert patched.add_patches({key: ("diff", (torch.full((32, 32, 1, 1), 0.2),))}, 1.0) == [key]
        for other in positive:
            out = ksampler(patched, EMPTY, positive[other], zeros() if other == "image" else text(seed=5), steps=1)
            assert torch.equal(out, plain[other]) is (other != part)


def test_controlnet(model):
    """It reads the main tensor, or ordinary SD 1.x tokens under the host's own key."""
    net = tiny_controlnet(width=32, context_dim=64)
    negative = dual(0.5, seed=5)
    steered = tiny(multipliers=(1, 2, 4, 4))
    plain = ksampler(steered, EMPTY, dual(0.5), negative, steps=2)
    out = ksampler(steered, EMPTY, controlled(dual(0.5), net), negative, steps=2)
    assert torch.isfinite(out).all() and relative(out, plain) > 1e-4
    words = torch.randn(1, 77, 64, generator=torch.Generator().manual_seed(1)) * 20
    for_net = [[tokens, {**options, "cross_attn_controlnet": words}] for tokens, options in controlled(dual(0.5), net)]
    assert relative(ksampler(steered, EMPTY, for_net, negative, steps=2), out) > 1e-5


def test_stock_conditioning_nodes_act_on_the_words(model):
    import nodes

    longer = nodes.ConditioningConcat().concat(dual(0.5), text(seed=9))[0]
    calls = Calls(model)
    ksampler(calls.model, EMPTY, longer, dual(0.5, seed=5), steps=1)
    assert calls.seen == [(2, 154, 257, 0.5)]
    assert longer[0][1]["versatile_flow"] == "dual"


@torch.inference_mode()
def test_ten_guided_ddim_steps_are_those_of_diffusers(model):
    """The stock sampler on custom sigmas against diffusers' modules and the textbook update (reference sheet, section 10)."""
    unet, scale, steps = diffusers_unet(model), 7.5, 10
    set_mix(unet, 0.5, (77, 257))
    sampling = model.get_model_object("model_sampling")
    alphas = 1 / (1 + sampling.sigmas.double() ** 2)
    times = torch.arange(1, 1000, 1000 // steps).flip(0)
    positive, negative = dual(0.5), dual(0.5, seed=5)
    tokens = torch.cat([torch.cat([entry[0][0], entry[0][1]["versatile_image"]], 1) for entry in (negative, positive)])
    start = latent_noise(1, 4, 16, 24, seed=8)
    x = start.double()
    for i, time in enumerate(times):
        eps = unet(torch.cat([x, x]).float(), time, tokens).sample.double()
        eps = eps[:1] + scale * (eps[1:] - eps[:1])
        now, after = alphas[time], alphas[times[i + 1]] if i + 1 < steps else alphas[0]
        x = after.sqrt() * (x - (1 - now).sqrt() * eps) / now.sqrt() + (1 - after).sqrt() * eps
    sigmas = torch.cat([sampling.sigmas[times], sampling.sigmas[:1]]).float()
    noise = start * (1 + sigmas[0] ** 2).sqrt() / sigmas[0]
    out = custom_advanced(model, torch.zeros_like(start), positive, negative, sigmas, cfg=scale, sampler="ddim", noise=noise)
    scaled = model.model.process_latent_in(out) / (1 + sigmas[-1] ** 2).sqrt()
    assert relative(scaled, x) < 1e-4


@torch.inference_mode()
@pytest.mark.parametrize("ratio", [0.25, 0.75])
def test_stacked_prompts_of_unequal_length_are_those_of_diffusers(model, ratio):
    """A negative of two chunks and two pictures rides in the positive's batch; diffusers' modules get each of them alone, uncut."""
    unet, scale = diffusers_unet(model), 3.0
    sides = [(dual(ratio, seed=0), (77, 257)), (dual(ratio, 154, 514, seed=5), (154, 514))]
    sigmas, start = schedule(model, 3), latent_noise(1, 4, 16, 24, seed=8)
    sampling = model.get_model_object("model_sampling")
    x = start.double() * (1 + sigmas[0].double() ** 2).sqrt()
    for now, then in zip(sigmas.double(), sigmas.double()[1:]):
        eps = []
        for ((tokens, options),), lengths in sides:
            set_mix(unet, ratio, lengths)
            scaled = (x / (1 + now**2).sqrt()).float()
            eps.append(unet(scaled, sampling.timestep(now.float()), torch.cat([tokens, options["versatile_image"]], 1)).sample.double())
        x = x + (then - now) * (eps[1] + scale * (eps[0] - eps[1]))
    calls = Calls(model)
    out = custom_advanced(calls.model, torch.zeros_like(start), sides[0][0], sides[1][0], sigmas, cfg=scale, noise=start)
    assert {call[:3] for call in calls.seen} == {(2, 154, 514)}
    assert relative(model.model.process_latent_in(out), x) < 1e-4


@pytest.mark.parametrize("latent", [torch.zeros(1, 768, 1, 1), latent_noise(1, 768, 1, 1)], ids=["empty", "of a text"])
def test_latents_of_texts_are_refused(model, latent):
    with pytest.raises(ValueError, match="works on latents of pictures.*connect Empty Latent Image") as error:
        ksampler(model, latent, dual(0.5), dual(0.5, seed=5), steps=1)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


@pytest.mark.parametrize("sets, wrong", [(("text",), "image"), (("image",), "text")])
def test_a_flow_that_is_not_loaded_is_refused(sets, wrong):
    alone = tiny(sets=sets)
    for conditioning in ({"image": image(), "text": text()}[wrong], dual(0.5)):
        with pytest.raises(ValueError, match=rf"no attention for {wrong} contexts.*flows") as error:
            ksampler(alone, EMPTY, conditioning, conditioning, steps=1)
        assert "\n" not in str(error.value) and str(error.value).endswith(".")
    assert torch.isfinite(ksampler(alone, EMPTY, dual(float(sets[0] == "text")), {"image": image(), "text": text()}[sets[0]], steps=1)).all()


def test_tokens_of_another_width_are_refused(model):
    with pytest.raises(ValueError, match="768 values per token.*takes 64"):
        ksampler(model, EMPTY, [[torch.zeros(1, 77, 768), {}]], text(), steps=1)
    broken = [[context(77), {"versatile_flow": "sound"}]]
    with pytest.raises(ValueError, match="names a flow"):
        ksampler(model, EMPTY, broken, text(), steps=1)


def test_raw_states_of_a_clip_are_told_once(caplog):
    wide = tiny(context=768)
    raw = [[28 * context(77, width=768), {}]]
    with caplog.at_level("WARNING", logger="palimpsest"):
        ksampler(wide, EMPTY, raw, raw, steps=1)
    assert len([line for line in caplog.messages if "ordinary CLIP" in line]) == 1
    caplog.clear()
    with caplog.at_level("WARNING", logger="palimpsest"):
        ksampler(wide, EMPTY, dual(0.5, width=768), dual(0.5, seed=5, width=768), steps=1)
        ksampler(wide, EMPTY, image_conditioning([torch.zeros(1, 257, 768)]), [[torch.zeros(1, 77, 768), {}]], steps=1)
    assert not [line for line in caplog.messages if "ordinary CLIP" in line]
    assert looks_raw(raw[0][0]) and not looks_raw(context(77, width=768))
    sister = tiny(context=768, sets=("text",))
    sister.model.prompt_free = True
    with caplog.at_level("WARNING", logger="palimpsest"):
        ksampler(sister, EMPTY, raw, raw, steps=1)
    assert not [line for line in caplog.messages if "ordinary CLIP" in line], "Prompt-Free Diffusion reads such tokens"


def test_raw_states_in_the_negative_alone_are_told_once_in_each_run(caplog):
    """Regression: they gave no warning."""
    wide, raw = tiny(context=768), [[28 * context(77, width=768), {}]]
    with caplog.at_level("WARNING", logger="palimpsest"):
        for _ in range(2):
            ksampler(wide, EMPTY, dual(0.5, width=768), raw + raw, steps=1)
    told = [line for line in caplog.messages if "ordinary CLIP" in line]
    assert len(told) == 2 and all("tokens of the negative conditioning" in line for line in told)


def test_an_ordinary_model_is_refused_where_it_is_checked(model):
    check_model(model)
    assert isinstance(model.model, VersatileDiffusion)
    with pytest.raises(ValueError, match="SD15, which cannot read"):
        check_model(tiny_sd15(channel_mult=(1, 1, 1, 1)))


def test_one_patcher_owns_both_sets(model):
    """Memory is counted, moved and cast for all of it: the equal channel widths of the tiny model leave out some skip convolutions."""
    plain = {key for key in single(model, "text").model_state_dict() if key.startswith("diffusion_model.")}
    own = {key for key in model.model_state_dict() if key.startswith("diffusion_model.")}
    assert plain < own and len(own - plain) == 416 and all(".image." in key for key in own - plain)
    assert model.model_size() > single(model, "text").model_size()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(model, dtype):
    """Weights in half formats; on a CPU the host computes in float32 or bfloat16 as it likes."""
    low = tiny(dtype=dtype)
    exact = ksampler(model, EMPTY, dual(0.5), dual(0.5, seed=5), steps=2, cfg=1.0)
    out = ksampler(low, EMPTY, dual(0.5), dual(0.5, seed=5), steps=2, cfg=1.0)
    assert 1e-5 < relative(out, exact) < 0.1


def test_edits_of_attention_work_on_one_flow_and_refuse_two(model):
    """PnP, P2P and MRSA know one attention per layer; inversion knows none, and works on both."""
    from palimpsest.attention_patches.blocks import architecture_name, unet_layers
    from palimpsest.attention_patches.pnp import apply_pnp
    from palimpsest.tests.helpers.models import tiny_trajectory

    assert architecture_name(model) == "SD1.x"
    with pytest.raises(ValueError, match="Versatile Diffusion with an attention for texts and one for pictures.*flows") as error:
        unet_layers(model)
    assert "\n" not in str(error.value)
    alone = tiny(sets=("image",))
    path = tiny_trajectory(alone, cond=image())
    edited = apply_pnp(alone, path)[0]
    start = torch.zeros(1, 4, 16, 16)
    out, plain = (ksampler(one, start, image(seed=3), zeros(), steps=4) for one in (edited, alone))
    assert torch.isfinite(out).all() and relative(out, plain) > 1e-3
    assert torch.equal(ksampler(alone, start, image(seed=3), zeros(), steps=4), plain)


@torch.inference_mode()
def test_inversion_of_a_blend_comes_back():
    """The pack's own inversion, its conditioning kept with both contexts."""
    from palimpsest.inversion.report import psnr
    from palimpsest.inversion.run import run_reconstruction
    from palimpsest.tests.helpers.inversions import invert, picture, smooth

    blended = smooth(tiny())
    path = invert(blended, positive=dual(0.5), iterations=5)
    assert path.conditioning[0][1]["versatile_image"].shape == (1, 257, 64)
    own, other = (psnr(picture()["samples"], run_reconstruction(blended, path, conditioning)) for conditioning in (None, image()))
    assert own > 40 and own > other + 6
