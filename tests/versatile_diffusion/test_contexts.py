"""Contexts from the host's CLIP towers: the original's numbers, masks, several pictures, wrong towers."""

import pytest
import torch
from safetensors.torch import load_file

from palimpsest.tests.helpers.versatile import TOWER, clip_vision, context, picture, relative, text_clip, text_encoder, vision_network
from palimpsest.versatile_diffusion import contexts
from palimpsest.versatile_diffusion.contexts import (
    check_tower, dual_conditioning, empty_picture, encode_pictures, encode_pixels, fit_mask, flow_of, image_conditioning, picture_contexts, squashed, token_weights,
)

LIMIT = 1e-5


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    return clip_vision(tmp_path_factory.mktemp("tower"))


@torch.inference_mode()
def test_text_contexts_are_the_originals(oracles):
    stored, weights = (load_file(oracles / "vd" / f"clip_text_{kind}.safetensors") for kind in ("io", "weights"))
    encoder = text_encoder()
    assert not encoder.transformer.load_state_dict(weights, strict=False).missing_keys
    out, pooled = encoder([row.tolist() for row in stored["input_ids"]])
    assert relative(out, stored["context"]) < LIMIT and relative(pooled, stored["text_embeds"]) < LIMIT
    # the norm of the unprojected row would be another
    assert relative(stored["last_hidden_state"], stored["context"]) > 0.1


@torch.inference_mode()
def test_picture_contexts_are_the_originals(oracles):
    stored, weights = (load_file(oracles / "vd" / f"clip_vision_{kind}.safetensors") for kind in ("io", "weights"))
    network = vision_network()
    network.load_state_dict(weights)
    plain = encode_pixels(network, stored["pixel_values"])
    assert relative(plain, stored["context"]) < LIMIT
    first = stored["image_embeds"] / stored["image_embeds"].norm(dim=-1, keepdim=True)
    assert relative(plain[:, 0], first) < LIMIT
    read = token_weights(stored["mask"][:, 0], TOWER["patch_size"])
    assert relative(read, stored["token_weights"]) < LIMIT
    assert relative(encode_pixels(network, stored["pixel_values"], read), stored["context_masked"]) < LIMIT
    assert relative(stored["context_masked"], stored["context"]) > 0.05


@pytest.fixture(scope="module")
def clip():
    return text_clip()


def encoded(clip, text, **options):
    return clip.encode_from_tokens(clip.tokenize(text), return_pooled=True, **options)


@torch.inference_mode()
def test_clip_text_encode_gives_contexts_with_weights_and_long_prompts(clip):
    import nodes

    (plain, extra), = nodes.CLIPTextEncode().encode(clip, "a red circle")[0]
    end = 4  # start, three words, end
    assert plain.shape == (1, 77, 64) and abs(float(plain[0, end].norm()) - 1) < 1e-5
    assert extra["pooled_output"].shape == (1, 64)
    stressed = encoded(clip, "a (red:1.5) circle")[0]
    empty = encoded(clip, "")[0]
    assert torch.allclose(stressed[0, 2], empty[0, 2] + 1.5 * (plain[0, 2] - empty[0, 2]), atol=1e-5), "weights act on contexts"
    assert torch.allclose(stressed[0, 1], plain[0, 1], atol=1e-6)
    words = " ".join(["star"] * 100)
    long = encoded(clip, words)[0]
    assert long.shape == (1, 154, 64)
    assert torch.allclose(long[:, :77], encoded(clip, " ".join(["star"] * 75))[0], atol=1e-5), "each chunk is divided by its own norm"


@torch.inference_mode()
def test_the_last_layer_and_the_projected_norm_stay(clip, caplog):
    plain = encoded(clip, "a star")[0]
    skipping = clip.clone()
    skipping.clip_layer(-2)
    with caplog.at_level("WARNING", logger="palimpsest"):
        assert torch.equal(encoded(skipping, "a star")[0], plain)
    assert any("last layer" in line for line in caplog.messages)
    assert torch.equal(clip.encode_from_tokens(clip.tokenize("a star"), return_pooled="unprojected")[0], plain)
    assert torch.equal(encoded(clip, "a star")[0], plain), "nothing stays behind"


@torch.inference_mode()
def test_pictures_agree_with_the_hosts_own_encoder(vision):
    """Class row and all rows, through the host's encode_image on a square picture."""
    image = squashed(picture(512, 512))
    ours = encode_pictures(vision, image)
    host = vision.encode_image(image, crop=False)
    projected = vision.model.visual_projection(vision.model.vision_model.post_layernorm(host["last_hidden_state"])).float()
    assert relative(ours, projected / host["image_embeds"].norm(dim=-1)[:, None, None]) < 1e-5
    assert ours.shape == (1, 257, 64) and ours.dtype == torch.float32 and abs(float(ours[0, 0].norm()) - 1) < 1e-5


@torch.inference_mode()
def test_squash_sees_the_whole_picture_and_centre_the_middle(vision):
    image = picture(300, 600)
    changed = image.clone()
    changed[:, :, :100] = 1 - changed[:, :, :100]
    assert torch.equal(encode_pictures(vision, image, crop="centre"), encode_pictures(vision, changed, crop="centre"))
    assert relative(encode_pictures(vision, changed), encode_pictures(vision, image)) > 1e-3
    assert squashed(image).shape == (1, 512, 512, 3)


@torch.inference_mode()
def test_a_batch_is_its_pictures_and_grey_and_transparent_ones_are_fine(vision):
    image = picture(96, 128, batch=2)
    both = encode_pictures(vision, image)
    assert torch.equal(both[1:], encode_pictures(vision, image[1:]))
    grey = image[:1, :, :, :1]
    assert torch.equal(encode_pictures(vision, grey), encode_pictures(vision, grey.expand(-1, -1, -1, 3)))
    clear = torch.cat([image[:1], torch.ones_like(image[:1, :, :, :1])], -1)
    assert torch.equal(encode_pictures(vision, clear), both[:1])


@torch.inference_mode()
def test_masks(vision):
    image = picture(200, 200)
    plain = encode_pictures(vision, image)
    mask = torch.zeros(1, 50, 50)
    mask[:, :, :25] = 1
    masked = encode_pictures(vision, image, mask)
    assert relative(masked, plain) > 0.05
    grid = masked[:, 1:].reshape(16, 16, 64)
    assert float(grid[:, 10:].abs().max()) < 1e-4 < float(grid[:, :6].abs().max()), "nothing of the masked side is left"
    hidden = image.clone()
    hidden[:, :, 120:] = 0.5
    inside = encode_pictures(vision, hidden, mask)[:, 1:].reshape(16, 16, 64)[:, :7]
    assert relative(inside, grid[:, :7]) < 1e-4, "what the mask hides does not speak"
    for all_ones in (torch.ones(1, 50, 50), torch.ones(1, 17, 311)):
        assert torch.equal(encode_pictures(vision, image, all_ones), plain)
    with pytest.raises(ValueError, match="mask is empty"):
        encode_pictures(vision, image, torch.zeros(1, 50, 50))
    with pytest.raises(ValueError, match="2 masks for 1 pictures"):
        encode_pictures(vision, image, mask.expand(2, -1, -1))


def test_masks_follow_the_crop():
    mask = torch.zeros(1, 100, 200)
    mask[:, :, 100:] = 1
    squash, centre = (fit_mask(mask, (100, 200), 224, crop) for crop in contexts.CROPS)
    assert squash.shape == centre.shape == (1, 224, 224)
    assert float(squash[0, :, :108].max()) == 0 and float(squash[0, :, 116:].min()) == 1
    assert float(centre[0, :, :108].max()) == 0 and float(centre[0, :, 116:].min()) == 1
    mask[:, :, 160:] = 0  # beyond the middle square
    assert torch.equal(fit_mask(mask, (100, 200), 224, "centre"), centre) and not torch.equal(fit_mask(mask, (100, 200), 224, "squash"), squash)
    small = torch.nn.functional.interpolate(mask[:, None], size=(50, 100))[:, 0]
    assert relative(fit_mask(small, (100, 200), 224, "centre"), centre) < 0.1


@pytest.mark.parametrize("changes, said, found", [
    ({}, None, "projected to 64"), ({"image_size": 336}, 64, None), ({"model_type": "siglip_vision_model"}, 64, "CLIPVisionModelProjection"),
    ({"image_size": 336, "projection_dim": 768}, None, "577 tokens"),
])
def test_other_towers_are_refused(tmp_path, changes, said, found):
    tower = clip_vision(tmp_path, said, **changes)
    if found is None:
        check_tower(tower)
        return
    with pytest.raises(ValueError, match=rf"ViT-L/14, 224 px.*{found}") as error:
        encode_pictures(tower, picture(32, 32))
    assert "\n" not in str(error.value)


def test_empty_pictures_are_8_bit():
    black, grey = empty_picture("black"), empty_picture("grey")
    assert float(black.max()) == 0 and torch.equal((grey * 255).round(), torch.full_like(grey, 127))


def test_several_pictures_are_one_context_behind_each_other():
    one, two = context(257, 1), context(257, 2, rows=2)
    (tokens, options), = image_conditioning([one, two])
    assert tokens.shape == (2, 514, 64) and torch.equal(tokens[1, :257], one[0]) and torch.equal(tokens[:, 257:], two)
    assert [part.shape[1] for part in picture_contexts([[tokens, options]], "context")] == [257, 257]
    with pytest.raises(ValueError, match="do not fit"):
        image_conditioning([two, context(257, rows=3)])
    with pytest.raises(ValueError, match="do not fit"):
        image_conditioning([one, context(257, width=32)])


def test_a_stock_node_may_have_added_tokens():
    (tokens, options), = image_conditioning([context(257)])
    longer = [[torch.cat([tokens, tokens], 1), options]]
    assert [part.shape[1] for part in picture_contexts(longer, "context")] == [514]


def test_contexts_in_the_wrong_input_are_refused():
    words, shown = [[context(77), {}]], image_conditioning([context(257)])
    with pytest.raises(ValueError, match="text input got a context of the image flow"):
        dual_conditioning(shown, shown, 0.5)
    with pytest.raises(ValueError, match="image input is a text context"):
        dual_conditioning(words, words, 0.5)
    with pytest.raises(ValueError, match="image input is a dual context"):
        dual_conditioning(words, dual_conditioning(words, shown, 0.5), 0.5)
    with pytest.raises(ValueError, match="2 pieces"):
        dual_conditioning(words, shown + shown, 0.5)
    with pytest.raises(ValueError, match="32 values per token and the picture 64"):
        dual_conditioning([[context(77, width=32), {}]], shown, 0.5)
    with pytest.raises(ValueError, match="empty conditioning"):
        flow_of([], "text input")
    with pytest.raises(ValueError, match="a mix"):
        flow_of(words + shown, "text input")


def test_a_dual_context_keeps_what_hangs_on_the_text():
    words = [[context(77, seed), {"area": (8, 8, 0, 0), "strength": 0.5}] for seed in (1, 2)]
    out = dual_conditioning(words, image_conditioning([context(257)]), 0.3)
    assert len(out) == 2 and all(options["area"] == (8, 8, 0, 0) and options["versatile_ratio"] == 0.3 for _, options in out)
    assert "versatile_flow" not in words[0][1], "the given conditioning is not written to"


def test_what_hangs_on_the_picture_is_dropped_and_the_page_says_so(root):
    """Regression: areas, masks, ranges, hooks and ControlNets of the image input went without a word."""
    (tokens, options), = image_conditioning([context(257)])
    out = dual_conditioning([[context(77), {}]], [[tokens, {**options, "area": (8, 8, 0, 0), "control": object()}]], 0.3)
    assert set(out[0][1]) == {"versatile_flow", "versatile_image", "versatile_ratio"}
    page = (root / "web" / "docs" / "PalimpsestVersatileDualContext.md").read_text()
    rows = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("| ")}
    assert "areas, masks, ranges, hooks and ControlNets on it are dropped" in rows["image"] and "dropped" in rows["negative_image"]
