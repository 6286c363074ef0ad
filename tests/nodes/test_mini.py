"""Mini Checkpoint and Mini Scene: schema, wiring, and the stock nodes on the mini model."""
import logging

import numpy as np
import pytest
import torch

from palimpsest.mini import autoencoder, checkpoint, nets, scenes, storage, tokens
from palimpsest.inversion.report import psnr
from palimpsest.mini.parse import parse
from palimpsest.nodes.mini import MiniCheckpoint, MiniLora, MiniScene
from palimpsest.tests.helpers.host_nodes import lora
from palimpsest.tests.helpers.sampling import custom_advanced, ksampler, schedule

CAPTION = "a large red circle with blue dots on the left and a star in the top right on a beige background, flat drawing"


def widgets(node, **changed):
    return {item.id: item.default for item in node.define_schema().inputs} | changed


def draw(**changed):
    """(image, masks, caption, edited image, edited caption) of Mini Scene."""
    return MiniScene.execute(**widgets(MiniScene, **changed)).args


# -- Mini Scene -----------------------------------------------------------------------------------------------------------

def test_ids_and_order_of_inputs_are_for_ever():
    assert [i.id for i in MiniScene.define_schema().inputs] == ["seed", "objects", "caption", "edit", "edit_value", "edit_object", "name_all"]
    assert [o.id for o in MiniScene.define_schema().outputs] == ["image", "masks", "source_caption", "edited_image", "edited_caption"]
    assert [o.id for o in MiniCheckpoint.define_schema().outputs] == ["model", "clip", "vae"]
    assert (MiniScene.define_schema().node_id, MiniCheckpoint.define_schema().node_id) == ("PalimpsestMiniScene", "PalimpsestMiniCheckpoint")


@pytest.mark.parametrize("objects", ["1", "2"])
def test_a_seed_gives_its_scene(objects):
    image, masks, text, twin, twin_text = draw(seed=7, objects=objects)
    scene = scenes.sample_scene(7, int(objects))
    assert image.shape == (1, 128, 128, 3) and image.dtype == torch.float32
    assert np.array_equal(image[0].numpy(), scenes.render(scene))
    assert masks.shape == (int(objects), 128, 128) and np.array_equal(masks.numpy(), scenes.masks(scene))
    assert torch.equal(image, twin) and text == twin_text
    named, whole = parse(text)
    assert len(named) == int(objects) and whole == {"background": scene.background, "style": scene.style}
    assert all(getattr(o, a) == v for o, n in zip(scene.objects, named) for a, v in n.items())


def test_a_caption_of_your_own_is_drawn_and_said_again():
    image, masks, text, *_ = draw(caption=CAPTION, seed=3)
    assert len(masks) == 2
    assert parse(text) == parse(CAPTION)
    assert not torch.equal(image, draw(caption=CAPTION, seed=4)[0]), "the seed draws the rest"


@pytest.mark.parametrize("edit, value", [("color", "green"), ("color2", "pink"), ("pattern", "striped"), ("background", "black"), ("style", "outline"),
                                         ("shape", "square"), ("size", "small"), ("color", "auto"), ("background", "auto"), ("pattern", "auto")])
@pytest.mark.parametrize("caption", ["", CAPTION, "a circle with blue dots"])
@pytest.mark.parametrize("name_all", [True, False])
def test_edited_twins_and_their_words(edit, value, caption, name_all):
    seed = next(s for s in range(200) if scenes.sample_scene(s).objects[0].pattern == "dotted" and scenes.sample_scene(s).objects[0].color not in ("green", "pink")
                and scenes.sample_scene(s).objects[0].color2 not in ("green", "pink"))
    present, whole = parse(draw(seed=seed, caption=caption, edit=edit, edit_value="auto")[2])
    if value == (whole if edit in ("background", "style") else present[0])[edit]:
        # regression: the twin was the original, and its prompt asked for no edit
        with pytest.raises(ValueError, match=f"{edit} is {value} already"):
            draw(seed=seed, caption=caption, edit=edit, edit_value=value, name_all=name_all)
        return
    image, masks, text, twin, twin_text = draw(seed=seed, caption=caption, edit=edit, edit_value=value, name_all=name_all)
    assert image.shape == twin.shape
    (named, whole), (new_named, new_whole) = parse(text), parse(twin_text)
    pair = (whole, new_whole) if edit in ("background", "style") else (named[0], new_named[0])
    assert edit in pair[0] and edit in pair[1], "the edited attribute is always named"
    changed = {k for a, b in [(whole, new_whole), *zip(named, new_named)] for k in a if a.get(k) != b.get(k)}
    assert changed <= {edit, *(("color2",) if edit == "pattern" else ())}
    assert pair[0][edit] != pair[1][edit] and value in ("auto", pair[1][edit])
    assert not torch.equal(image, twin)


@pytest.mark.parametrize("changed, sentence", [
    ({"caption": "a purple elephant"}, "does not understand 'elephant'"),
    ({"edit": "color", "edit_value": "striped"}, "'striped' is no color"),
    ({"edit": "color", "edit_value": "blue", "caption": CAPTION}, "already has blue"),
    ({"edit": "color", "edit_value": "red", "caption": "a red circle"}, "Object 1's color is red already"),
    ({"edit": "background", "edit_value": "beige", "caption": "a star on a beige background"}, "The scene's background is beige already"),
    ({"edit": "taste"}, "no taste to edit"),
    ({"edit": "color2", "caption": "a plain red circle"}, "no second color"),
    ({"edit": "shape", "edit_object": 2, "caption": "a red circle"}, "set edit_object to 1"),
    ({"caption": "a large star in the center and a large box in the center"}, "do not fit"),
])
def test_what_cannot_be_is_one_sentence(changed, sentence):
    with pytest.raises(ValueError, match=sentence) as failed:
        draw(**changed)
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize("node", [MiniScene, MiniCheckpoint])
def test_the_host_takes_the_schema(node):
    """Regression: an output with the id of an input made the host refuse the whole pack."""
    schema = node.GET_SCHEMA()
    assert not {i.id for i in schema.inputs} & {o.id for o in schema.outputs}
    assert all(item.tooltip for item in (*schema.inputs, *schema.outputs))


# -- Mini Checkpoint ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The shipped weights, or random ones of the same shapes where none are shipped yet."""
    if {"text_to_image", "autoencoder"} <= {file.stem for file in checkpoint.WEIGHTS.glob("*.safetensors")}:
        return checkpoint.WEIGHTS
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    grammar = tokens.GrammarTokens()
    state = {checkpoint.UNET_PREFIX + k: v for k, v in nets.new_unet().state_dict().items()}
    state |= {checkpoint.TEXT_PREFIX + k: v for k, v in nets.new_text_encoder(grammar.unknown + 1).state_dict().items()}
    # an untrained UNet says zero
    state = {k: v + 0.02 * torch.randn(v.shape) for k, v in state.items()} | {"token_ids": torch.tensor(grammar.ids, dtype=torch.int32)}
    storage.write_weights(folder / "text_to_image.safetensors", state, {"recipe": "random"})
    storage.write_weights(folder / "autoencoder.safetensors", autoencoder.Autoencoder().state_dict(), {"recipe": "random"})
    return folder


@pytest.fixture(scope="module")
def mini(weights):
    """(model, clip, vae) through the node."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "WEIGHTS", weights)
        return MiniCheckpoint.execute("text_to_image").args


@torch.inference_mode()
def encode(clip, text):
    import nodes

    return nodes.CLIPTextEncode().encode(clip, text)[0]


@pytest.fixture(scope="module")
def prompts(mini):
    return encode(mini[1], CAPTION), encode(mini[1], "")


@torch.inference_mode()
def empty_latent(size=128, batch=1):
    import nodes

    return nodes.EmptyLatentImage().generate(size, size, batch)[0]


def test_the_parts_are_the_hosts_own_classes(mini):
    import comfy.model_patcher
    import comfy.sd
    import comfy.supported_models

    model, clip, vae = mini
    assert isinstance(model, comfy.model_patcher.ModelPatcher) and isinstance(clip, comfy.sd.CLIP) and isinstance(vae, comfy.sd.VAE)
    assert isinstance(model.model.model_config, comfy.supported_models.SD15)


def test_clip_text_encode_gives_the_training_forward(mini, weights):
    """The host's CLIP on the blown-up table and our compact table in training see the same words alike."""
    state = storage.read_weights(weights / "text_to_image.safetensors")[0]
    grammar = tokens.GrammarTokens()
    assert state["token_ids"].tolist() == grammar.ids
    encoder = nets.new_text_encoder(grammar.unknown + 1)
    encoder.load_state_dict({k[len(checkpoint.TEXT_PREFIX):]: v for k, v in state.items() if k.startswith(checkpoint.TEXT_PREFIX)})
    for text in (CAPTION, "", "a purple elephant"):
        [[states, extra]] = encode(mini[1], text)
        with torch.inference_mode():
            expected = nets.text_states(encoder, grammar.encode(text)[None])
        assert states.shape == (1, 77, nets.CONTEXT)
        assert torch.allclose(states, expected, atol=2e-3), text


def test_unknown_words_are_one_warning_that_names_them(mini, caplog):
    with caplog.at_level(logging.WARNING):
        encode(mini[1], "a purple elephant")
    ours = [r.getMessage() for r in caplog.records if "mini checkpoint" in r.getMessage()]
    assert len(ours) == 1 and "elephant" in ours[0] and "purple" not in ours[0]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        encode(mini[1], CAPTION)
        encode(mini[1], "")
    assert not [r for r in caplog.records if "mini checkpoint" in r.getMessage()]


@pytest.mark.parametrize("size, batch", [(128, 1), (128, 3), (192, 1)])
def test_ksampler_and_vae_decode(mini, prompts, size, batch):
    import nodes

    samples = ksampler(mini[0], empty_latent(size, batch), *prompts, steps=3)
    assert samples.shape == (batch, 4, size // 8, size // 8) and torch.isfinite(samples).all()
    assert torch.equal(samples, ksampler(mini[0], empty_latent(size, batch), *prompts, steps=3)), "the same seed, the same picture"
    with torch.inference_mode():
        picture = nodes.VAEDecode().decode(mini[2], {"samples": samples})[0]
    assert picture.shape == (batch, size, size, 3) and 0 <= picture.min() and picture.max() <= 1


def test_the_three_samplers_agree(mini, prompts):
    model, start = mini[0], empty_latent()
    noise = torch.randn(1, 4, 16, 16, generator=torch.manual_seed(1))
    plain = ksampler(model, start, *prompts, steps=4, seed=1)
    advanced = ksampler(model, start, *prompts, steps=4, seed=1, disable_noise=False, start_step=0, last_step=4, force_full_denoise=True)
    custom = custom_advanced(model, start, *prompts, schedule(model, 4), noise=noise)
    assert torch.equal(plain, advanced)
    # SamplerCustomAdvanced returns before the KSampler's own move to the CPU; the numbers are the same
    assert torch.equal(plain, custom.cpu())


def test_vae_encode_and_decode_stock(mini, weights):
    import nodes

    image = draw(seed=11)[0]
    with torch.inference_mode():
        latent = nodes.VAEEncode().encode(mini[2], image)[0]["samples"]
        back = nodes.VAEDecode().decode(mini[2], {"samples": latent})[0]
    assert latent.shape == (1, 4, 16, 16) and back.shape == image.shape
    if weights == checkpoint.WEIGHTS:
        assert psnr(image, back, peak=1.0) > 22
        assert 2 < latent.std() < 11, "the scale of Stable Diffusion's latents"


def test_vae_decode_tiled(mini):
    import nodes

    with torch.inference_mode():
        latent = {"samples": torch.randn(1, 4, 24, 32, generator=torch.manual_seed(0))}
        tiled = nodes.VAEDecodeTiled().decode(mini[2], latent, tile_size=128, overlap=32)[0]
    assert tiled.shape == (1, 192, 256, 3)


def test_a_latent_of_the_wrong_channel_count_is_refused(mini):
    with torch.inference_mode(), pytest.raises(ValueError, match="4 channels, but this one has 16"):
        mini[2].decode(torch.zeros(1, 16, 16, 16))


def test_weight_patches_change_the_picture_and_come_off_again(mini, prompts):
    model = mini[0]
    plain = ksampler(model, empty_latent(), *prompts, steps=2)
    patched = ksampler(lora(model), empty_latent(), *prompts, steps=2)
    assert not torch.equal(plain, patched)
    assert torch.equal(plain, ksampler(model, empty_latent(), *prompts, steps=2))


def test_lora_loaders_names_reach_the_mini_layers(mini):
    """LoRA files name layers as SD1.5 does; the host maps those names from the model's config."""
    import comfy.lora

    keys = comfy.lora.model_lora_keys_unet(mini[0].model, {})
    assert any("down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q" in key for key in keys)


def test_set_latent_noise_mask_keeps_the_rest(mini, prompts):
    import nodes

    image, masks, *_ = draw(seed=12, objects="1")
    with torch.inference_mode():
        latent = nodes.VAEEncode().encode(mini[2], image)[0]
        masked = nodes.SetLatentNoiseMask().set_mask(latent, masks)[0]
    samples = ksampler(mini[0], masked, *prompts, steps=3)
    outside = torch.nn.functional.max_pool2d(masks[None], 8, 8)[0, 0] == 0
    difference = (samples - latent["samples"])[0].abs().amax(0)
    assert difference[outside].max() < 1e-4 and difference[~outside].max() > 1e-2


def test_loading_twice_shares_nothing(weights, mini, monkeypatch):
    monkeypatch.setattr(checkpoint, "WEIGHTS", weights)
    other = MiniCheckpoint.execute("text_to_image").args
    assert other[0].model is not mini[0].model


def test_new_weights_are_a_new_fingerprint(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path)
    empty = MiniCheckpoint.fingerprint_inputs("text_to_image")
    (tmp_path / "text_to_image.safetensors").write_bytes(b"1")
    assert MiniCheckpoint.fingerprint_inputs("text_to_image") != empty


def test_missing_weights_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path)
    with pytest.raises(ValueError, match="text_to_image.safetensors are missing"):
        MiniCheckpoint.execute("text_to_image")


# -- Mini LoRA ------------------------------------------------------------------------------------------------------------

def test_the_lora_changes_a_clone_and_strength_nothing_leaves_the_model():
    assert [i.id for i in MiniLora.define_schema().inputs] == ["model", "strength"] and MiniLora.define_schema().node_id == "PalimpsestMiniLora"
    model, _, _ = checkpoint.load("text_to_image")
    assert MiniLora.execute(model, 0.0).args[0] is model
    (changed,) = MiniLora.execute(model, 1.0).args
    assert changed is not model and len(changed.patches) > 50 and not model.patches
    noise, prompt = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), [[torch.randn(1, 77, 128, generator=torch.Generator().manual_seed(1)), {}]]
    plain, other, again = (ksampler(m, noise, prompt, prompt, steps=2, cfg=1.0) for m in (model, changed, model))
    assert torch.equal(plain, again) and not torch.equal(plain, other)


def test_the_lora_refuses_other_models():
    from palimpsest.tests.helpers.models import tiny_sdxl

    with pytest.raises(ValueError, match="connect Mini Checkpoint"):
        MiniLora.execute(tiny_sdxl(), 1.0)
