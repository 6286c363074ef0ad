"""The SeeCoder nodes: schema, wiring, and the host's sampler with what they give."""

import pytest
import torch
from safetensors.torch import save_file

from palimpsest.nodes.seecoder import SeeCoderCompare, SeeCoderEncode, SeeCoderLoader
from palimpsest.seecoder import files, loader
from palimpsest.tests.helpers.models import controlled, tiny_cond, tiny_controlnet, tiny_sd15, tiny_sdxl
from palimpsest.tests.helpers.sampling import ksampler
from palimpsest.tests.helpers.seecoder import empty_folders, random_picture, random_state, relative, small

WIDE = small(width=768, decoder_layers=1, query_layers=3, decoder_hidden=64, query_hidden=64)


@pytest.fixture(scope="module")
def seecoder():
    return loader.from_state(random_state(WIDE), "wide.safetensors")


@pytest.fixture(scope="module")
def model():
    return tiny_sd15(channel_mult=(1, 1, 1, 1))


@pytest.fixture(scope="module")
def noise():
    return torch.zeros(1, 4, 16, 16)


def defaults(node):
    return {item.id: item.default for item in node.define_schema().inputs if getattr(item, "default", None) is not None and not item.optional}


@torch.inference_mode()
def encode(seecoder, image, **changed):
    return SeeCoderEncode.execute(seecoder=seecoder, image=image, **{**defaults(SeeCoderEncode), **changed}).args


def test_ids_and_order_of_inputs_are_for_ever():
    assert [node.define_schema().node_id for node in (SeeCoderLoader, SeeCoderEncode, SeeCoderCompare)] == [
        "PalimpsestSeeCoderLoader", "PalimpsestSeeCoderEncode", "PalimpsestSeeCoderCompare"]
    assert [item.id for item in SeeCoderLoader.define_schema().inputs] == ["seecoder_name", "precision"]
    assert [item.id for item in SeeCoderEncode.define_schema().inputs] == [
        "seecoder", "image", "negative", "strength", "batch", "weights", "resize_longer_side", "anime_file", "mask", "text", "negative_text", "model"]
    assert [item.id for item in SeeCoderCompare.define_schema().inputs] == ["seecoder", "image", "resize_longer_side", "mask"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    empty_folders(monkeypatch, tmp_path)
    (tmp_path / "seecoder").mkdir()
    return tmp_path / "seecoder"


def test_the_loader_lists_loads_and_explains(folder):
    assert SeeCoderLoader.define_schema().inputs[0].options == [files.NONE_FOUND]
    assert "put seecoder-v1-0.safetensors" in SeeCoderLoader.validate_inputs(files.NONE_FOUND)
    with pytest.raises(ValueError, match="There is no SeeCoder file yet"):
        SeeCoderLoader.execute(files.NONE_FOUND, "auto")
    save_file(random_state(small(True)), str(folder / "mine.safetensors"))
    before = SeeCoderLoader.fingerprint_inputs("mine.safetensors")
    assert SeeCoderLoader.define_schema().inputs[0].default == "mine.safetensors"
    assert SeeCoderLoader.validate_inputs("mine.safetensors") is True
    model, report = SeeCoderLoader.execute("mine.safetensors", "auto").args
    assert model.width == 96 and report == "SeeCoder mine.safetensors: position-aware, 148 tokens of 96 values, computed in fp32"
    save_file(random_state(small()), str(folder / "mine.safetensors"))
    assert SeeCoderLoader.fingerprint_inputs("mine.safetensors") != before, "a file that was replaced is loaded anew"
    (folder / "mine.safetensors").unlink()
    assert SeeCoderLoader.fingerprint_inputs("mine.safetensors") == ""
    # a name that comes from another node is None until that node has run
    assert SeeCoderLoader.validate_inputs(None) is True and SeeCoderLoader.fingerprint_inputs(None) == ""


def test_positive_negative_and_report(seecoder):
    positive, negative, report = encode(seecoder, random_picture(60, 80))
    assert positive[0][0].shape == negative[0][0].shape == (1, 148, 768) and negative[0][0].abs().max() == 0
    assert "one each: needs a latent batch of 2" in encode(seecoder, random_picture(60, 80, batch=2))[2]
    assert report.splitlines()[1:] == ["1 reference of 80 x 60 px, strength 1", "positive [1, 148, 768]; negative: zeros, [1, 148, 768]"]


def test_every_input_reaches_the_conditioning(seecoder, folder):
    pictures = random_picture(60, 80, batch=2)
    plain = encode(seecoder, pictures)[0][0][0]
    assert plain.shape == (2, 148, 768)
    assert torch.equal(encode(seecoder, pictures, strength=0.5)[0][0][0], plain * 0.5)
    assert encode(seecoder, pictures, strength=0.0)[0][0][0].abs().max() == 0
    assert torch.allclose(encode(seecoder, pictures, batch="blend", weights="3, 1")[0][0][0], (3 * plain[:1] + plain[1:]) / 4, atol=1e-6)
    assert encode(seecoder, pictures, batch="concatenate")[0][0][0].shape == (1, 296, 768)
    assert relative(encode(seecoder, pictures, resize_longer_side=64)[0][0][0], plain) > 0.01
    mask = torch.zeros(1, 60, 80)
    mask[:, :30] = 1
    assert relative(encode(seecoder, pictures, mask=mask)[0][0][0], plain) > 0.01
    words = tiny_cond(seed=4)
    both = encode(seecoder, pictures, text=words)[0]
    assert both[0][0].shape == (2, 225, 768) and torch.equal(both[0][0][:, 77:], plain)
    negative = encode(seecoder, pictures, negative="text", negative_text=words)[1]
    assert torch.equal(negative[0][0][:, :77], words[0][0]) and negative[0][0].shape[1] == 148
    torch.save(torch.ones(77, 768).half(), folder / "anime_ug.pth")
    assert "anime_ug.pth" in SeeCoderEncode.define_schema().inputs[7].options
    anime = encode(seecoder, pictures, negative="anime file", anime_file="anime_ug.pth")[1][0][0]
    assert anime.shape == (1, 148, 768) and anime.sum() == 77 * 768


def test_what_cannot_work_is_refused_before_the_encoder_runs(seecoder, monkeypatch):
    monkeypatch.setattr(type(seecoder), "encode", lambda *_, **__: pytest.fail("the encoder ran"))
    picture = random_picture(40, 40)
    with pytest.raises(ValueError, match="SDXL. wants 2048 values per token, but wide.safetensors gives 768"):
        encode(seecoder, picture, model=tiny_sdxl())
    with pytest.raises(ValueError, match="2 weights for 1 reference"):
        encode(seecoder, picture, weights="1, 2")
    with pytest.raises(ValueError, match="no file is chosen"):
        encode(seecoder, picture, negative="anime file")
    with pytest.raises(ValueError, match="no negative text is connected"):
        encode(seecoder, picture, negative="text")
    with pytest.raises(ValueError, match="gives 768: encode it with the CLIP"):
        encode(seecoder, picture, text=tiny_cond(dim=1024))


def test_the_stock_sampler_takes_it(seecoder, model, noise):
    picture = random_picture(60, 80)
    positive, negative, _ = encode(seecoder, picture, model=model)
    out = ksampler(model, noise, positive, negative, cfg=2.0, sampler="ddim", scheduler="ddim_uniform")
    assert torch.isfinite(out).all()
    assert torch.equal(ksampler(model, noise, positive, negative, cfg=2.0, sampler="ddim", scheduler="ddim_uniform"), out), "queued twice"
    other = encode(seecoder, random_picture(60, 80, seed=9))[0]
    assert relative(ksampler(model, noise, other, negative, cfg=2.0, sampler="ddim", scheduler="ddim_uniform"), out) > 1e-4


def test_zero_strength_is_the_zeroed_conditioning_bit_for_bit(seecoder, model, noise):
    positive, negative, _ = encode(seecoder, random_picture(40, 40), strength=0.0)
    zeroed = [[torch.zeros(1, 148, 768), {}]]
    assert torch.equal(ksampler(model, noise, positive, negative), ksampler(model, noise, zeroed, zeroed))


def test_the_same_as_positive_switches_guidance_off(seecoder, model, noise):
    positive, negative, _ = encode(seecoder, random_picture(40, 40), negative="same as positive")
    guided = ksampler(model, noise, positive, negative, cfg=7.0)
    assert relative(guided, ksampler(model, noise, positive, negative, cfg=1.0)) < 1e-4


def test_one_picture_per_latent(seecoder, model):
    pictures = random_picture(40, 40, batch=2)
    positive, negative, _ = encode(seecoder, pictures)
    latents = torch.zeros(2, 4, 16, 16)
    both = ksampler(model, latents, positive, negative)
    swapped = ksampler(model, latents, encode(seecoder, pictures.flip(0))[0], negative)
    assert both.shape == (2, 4, 16, 16) and relative(both[:1], swapped[:1]) > 1e-4


def test_it_chains_with_areas_ranges_averages_and_controlnet(seecoder, model, noise):
    import nodes

    one, negative, _ = encode(seecoder, random_picture(40, 40))
    two = encode(seecoder, random_picture(40, 40, seed=2))[0]
    plain = ksampler(model, noise, one, negative)
    area = nodes.ConditioningSetArea().append(two, 64, 128, 0, 0, 1.0)[0]
    ranged = nodes.ConditioningSetTimestepRange().set_range(two, 0.5, 1.0)[0]
    early = nodes.ConditioningSetTimestepRange().set_range(one, 0.0, 0.5)[0]
    average = nodes.ConditioningAverage().addWeighted(one, two, 0.5)[0]
    for positive in (one + area, early + ranged, average, controlled(one, tiny_controlnet(width=32))):
        out = ksampler(model, noise, positive, negative)
        assert torch.isfinite(out).all() and relative(out, plain) > 1e-5


def test_compare_shows_a_row_per_reference(seecoder):
    with torch.inference_mode():
        sheet, report = SeeCoderCompare.execute(seecoder=seecoder, image=random_picture(64, 96, batch=2), resize_longer_side=0).args
    assert sheet.ndim == 4 and 0 <= sheet.min() and sheet.max() <= 1 and sheet.std() > 0.05
    assert report.count("reference") == 2


def test_compare_shows_transparent_pictures_and_masks(seecoder):
    picture = random_picture(64, 64, channels=4)
    mask = torch.zeros(1, 64, 64)
    mask[:, :, :32] = 1
    with torch.inference_mode():
        free, masked = (SeeCoderCompare.execute(seecoder=seecoder, image=picture, resize_longer_side=0, mask=m).args[0] for m in (None, mask))
    assert free.shape == masked.shape and not torch.equal(free, masked)
