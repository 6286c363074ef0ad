"""The UNet with two attention sets: mixing, single flows, the originals' own numbers, diffusers' modules."""

import pytest
import torch
from safetensors.torch import load_file

from palimpsest.tests.helpers.models import randomise
from palimpsest.tests.helpers.versatile import common_names, context, diffusers_unet, image_shapes, relative, set_mix, single, tiny
from palimpsest.versatile_diffusion import keys
from palimpsest.versatile_diffusion.dual import BRANCH, MIX, Mix, PairedTransformer, find, place
from palimpsest.versatile_diffusion.model import unet_config

RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def latent():
    return torch.randn(2, 4, 16, 24, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def contexts():
    return context(77, 1, rows=2), context(257, 2, rows=2)


TIME = torch.tensor([7.0, 640.0])


@torch.inference_mode()
def run(model, latent, main, ratio=1.0, image=None, **options):
    return model.model.diffusion_model(latent, TIME[:len(latent)], context=main, vd_ratio=ratio, vd_image=image, transformer_options=options)


@pytest.fixture(scope="module")
def pair():
    import comfy.ops

    pair = PairedTransformer(32, 8, 4, depth=1, context_dim=64, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    randomise(pair, 4)
    return pair.requires_grad_(False)


@pytest.mark.parametrize("place", ["first", "mid", "last"])
def test_blocks_mix_as_the_original_does(oracles, monkeypatch, pair, place):
    """The original's block input, the results of its two branches, and what it made of them at ratio 0.25."""
    stored = load_file(oracles / "vd" / "dual_blocks.safetensors")
    calls = []

    def branch(self, which, x, context, transformer_options):
        calls.append((which, x, context))
        return stored[f"{place}.{which}_branch"]

    monkeypatch.setattr(PairedTransformer, "branch", branch)
    x, text, image = stored[f"{place}.in"], context(77, rows=2), context(257, rows=2)
    out = pair(x, text, {MIX: Mix(0.25, image)})
    assert [call[0] for call in calls] == ["text", "image"] and all(call[1] is x for call in calls), "both see the block's input"
    assert calls[0][2] is text and calls[1][2] is image
    assert relative(out, stored[f"{place}.out_r0.25"]) < 1e-5
    assert relative(stored[f"{place}.text_branch"], stored[f"{place}.image_branch"]) > 0.01


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_block_is_the_weighted_sum_of_two_transformers(pair, ratio):
    import comfy.ops
    from comfy.ldm.modules.attention import SpatialTransformer

    alone = {}
    for which in ("text", "image"):
        layer = SpatialTransformer(32, 8, 4, depth=1, context_dim=64, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
        own = {key.removeprefix("image."): value for key, value in pair.state_dict().items() if key.startswith("image.") == (which == "image")}
        layer.load_state_dict(own)
        alone[which] = layer.requires_grad_(False)
    x, text, image = torch.randn(2, 32, 5, 7, generator=torch.Generator().manual_seed(0)), context(77, 1, rows=2), context(257, 2, rows=2)
    expected = ratio * alone["text"](x, text, {}) + (1 - ratio) * alone["image"](x, image, {})
    out = pair(x, text, {MIX: Mix(ratio, image)})
    assert torch.equal(out, expected) if ratio in (0, 1) else relative(out, expected) < 1e-6


def test_a_text_is_read_without_a_mix_and_a_blend_needs_two_contexts(pair):
    x, text = torch.randn(1, 32, 4, 4), context(77)
    assert torch.equal(pair(x, text, {}), pair(x, text, {MIX: Mix(1.0)}))
    with pytest.raises(ValueError, match="needs two contexts"):
        pair(x, text, {MIX: Mix(0.5)})


@pytest.mark.parametrize("ratio, which", [(0.0, "image"), (1.0, "text")])
def test_a_single_flow_is_the_plain_model_bit_for_bit_and_the_other_set_is_not_run(model, latent, contexts, ratio, which):
    own = contexts[("text", "image").index(which)]
    ran = []
    layers = [layer for layer in model.model.diffusion_model.modules() if isinstance(layer, PairedTransformer)]
    assert len(layers) == 16
    # both sets have a group norm of their own
    hooks = [part.norm.register_forward_hook(lambda *_, name=name: ran.append(name)) for layer in layers for name, part in (("text", layer), ("image", layer.image))]
    try:
        out = run(model, latent, own, ratio)
    finally:
        for hook in hooks:
            hook.remove()
    assert ran == [which] * 16
    with torch.inference_mode():
        plain = single(model, which).model.diffusion_model(latent, TIME, context=own)
    assert torch.equal(out, plain)


@pytest.mark.parametrize("sets, which", [(("text",), "text"), (("image",), "image")])
def test_a_model_of_one_set_is_the_plain_model(model, latent, contexts, sets, which):
    alone = tiny(sets=sets)
    placed = {place(name, sets): value for name, value in common_names(model).items()}
    alone.model.diffusion_model.load_state_dict({key: value for key, value in placed.items() if key is not None})
    own = contexts[("text", "image").index(which)]
    assert torch.equal(run(alone, latent, own, float(which == "text")), run(model, latent, own, float(which == "text")))
    assert len(alone.model.diffusion_model.state_dict()) == len(single(model, which).model.diffusion_model.state_dict())


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("tokens", [(77, 257), (77, 514), (154, 257)], ids=["one picture", "two pictures", "long text"])
def test_equal_to_diffusers_modules(model, latent, ratio, tokens):
    """Non-square latents, one row per latent."""
    text, image = (context(count, i, rows=2) for i, count in enumerate(tokens))
    unet = diffusers_unet(model)
    set_mix(unet, ratio, tokens)
    with torch.inference_mode():
        expected = unet(latent, TIME, torch.cat([text, image], 1)).sample
    main = image if ratio == 0 else text
    out = run(model, latent, main, ratio, image if 0 < ratio < 1 else None)
    assert relative(out, expected) < 1e-5
    if ratio == 0.5:
        # not the blend of outputs
        apart = (run(model, latent, text, 1.0) + run(model, latent, image, 0.0)) / 2
        assert relative(out, apart) > 0.01


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("tokens", [(77, 257), (1, 1)], ids=["full length", "one token"])
def test_zero_contexts_are_those_of_diffusers(model, latent, ratio, tokens):
    """The published negative of a picture; both sides at zero, and a text beside a picture of zeros."""
    unet = diffusers_unet(model)
    set_mix(unet, ratio, tokens)
    zeros = [torch.zeros(2, count, 64) for count in tokens]
    for text, image in ((zeros[0], zeros[1]), (context(tokens[0], 5, rows=2), zeros[1])):
        with torch.inference_mode():
            expected = unet(latent, TIME, torch.cat([text, image], 1)).sample
        assert relative(run(model, latent, image if ratio == 0 else text, ratio, image if 0 < ratio < 1 else None), expected) < 1e-5


def test_zero_contexts_of_any_length_are_the_same(model, latent):
    ones = [run(model, latent, torch.zeros(2, count, 64), 0.0) for count in (1, 77, 257)]
    assert all(relative(one, ones[0]) < 1e-6 for one in ones[1:])


def test_patches_see_which_set_runs_and_the_callers_options_stay(model, latent, contexts):
    seen = []

    def patch(n, context, value, extra_options):
        seen.append((extra_options["block"], extra_options["transformer_index"], extra_options[BRANCH], context.shape[1]))
        return n, context, value

    options = {"patches": {"attn2_patch": [patch]}}
    before = dict(options)
    run(model, latent, contexts[0], 0.5, contexts[1], **options)
    assert options == before
    assert [entry[2] for entry in seen] == ["text", "image"] * 16 and {entry[3] for entry in seen} == {77, 257}
    assert [entry[1] for entry in seen[::2]] == [entry[1] for entry in seen[1::2]] == list(range(16)), "the index counts pairs"


def test_rows_that_another_pack_multiplied_get_their_image_context(model, latent, contexts):
    text, image = contexts
    four = run(model, torch.cat([latent, latent])[:2], text[:1].expand(2, -1, -1), 0.5, image[:1])
    assert torch.equal(four, run(model, latent, text[:1].expand(2, -1, -1), 0.5, image[:1].expand(2, -1, -1)))
    with pytest.raises(ValueError, match="3 rows"):
        run(model, latent, text, 0.5, torch.cat([image, image[:1]]))


def test_every_tensor_of_the_files_has_its_place():
    """At full size: 1102 tensors for both sets, 686 for one; none of the text diffuser's own."""
    shapes = image_shapes()
    everything = [keys.Name(part, key) for part in keys.PARTS for key in shapes]
    both = [key for key in (place(name) for name in everything) if key is not None]
    assert len(both) == len(set(both)) == 1102
    assert all(find(key) in everything and place(find(key)) == key for key in both)
    for part in keys.PARTS:
        assert {place(name, (part,)) for name in everything} - {None} == set(shapes)


def test_the_full_size_model_has_these_tensors():
    import comfy.ops

    from palimpsest.versatile_diffusion.dual import DualUNet

    config = {**unet_config(), "num_heads": 8, "num_head_channels": -1}
    with torch.device("meta"):
        unet = DualUNet(**config, dtype=torch.float16, device=torch.device("meta"), operations=comfy.ops.disable_weight_init)
    shapes = image_shapes()
    expected = {place(keys.Name(part, key)): shape for part in keys.PARTS for key, shape in shapes.items()}
    expected.pop(None)
    assert {key: value.shape for key, value in unet.state_dict().items()} == expected
    assert sum(value.numel() for value in unet.parameters()) == 1_126_760_324
