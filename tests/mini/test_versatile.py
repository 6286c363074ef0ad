"""The mini Versatile Diffusion: that its two flows are the base model and the file's own set, and that its pictures come through the mini tower."""

import pytest
import torch

from palimpsest.mini import checkpoint, storage, towers
from palimpsest.nodes.mini import MiniCheckpoint
from palimpsest.nodes.mini_towers import MiniTowers
from palimpsest.nodes.versatile_context import VersatileImageContext
from palimpsest.nodes.versatile_diffusion import VersatileDualContext, VersatileEmptyImage
from palimpsest.tests.helpers.sampling import ksampler, latent_noise
from palimpsest.tests.helpers.versatile import context, dual, picture
from palimpsest.tests.helpers.versatile_mini import as_text_set, image_set, write_random_family
from palimpsest.versatile_diffusion.contexts import encode_pictures, image_conditioning
from palimpsest.versatile_diffusion.model import VersatileDiffusion

NAME = "versatile.safetensors"


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    weights = write_random_family(folder)
    storage.write_weights(folder / NAME, image_set(weights), {"recipe": "versatile"})
    return folder


@pytest.fixture
def weights(family, monkeypatch):
    monkeypatch.setattr(checkpoint, "WEIGHTS", family)
    return family


@pytest.fixture
def copied(family, tmp_path, monkeypatch):
    """The same files where a test may spoil them."""
    for file in family.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path)
    return tmp_path


def draw(model, positive, negative=None, batch=1):
    return ksampler(model, latent_noise(batch, 4, 16, 16), positive, negative or positive, steps=2, cfg=1.0 if negative is None else 3.0)


def test_it_is_a_member_with_the_bases_words(weights):
    assert checkpoint.names() == ["text_to_image", "versatile"]
    options = next(i for i in MiniCheckpoint.define_schema().inputs if i.id == "name").options
    assert list(options) == ["text_to_image", "versatile"]
    model, clip, vae = MiniCheckpoint.execute("versatile").args
    assert isinstance(model.model, VersatileDiffusion) and model.model.sets == ("text", "image")
    with torch.inference_mode():
        states, other = (one.encode_from_tokens(one.tokenize("a red star")) for one in (clip, checkpoint.load("text_to_image")[1]))
        assert torch.equal(states, other) and states.shape == (1, 77, 128)
        assert vae.decode(torch.zeros(1, 4, 16, 16)).shape == (1, 128, 128, 3)


def test_a_text_alone_is_the_base_model_to_the_bit(weights):
    """Ratio 1 through the dual context as well, whatever the picture."""
    base, model = checkpoint.load("text_to_image")[0], checkpoint.load("versatile")[0]
    prompt, empty = [[context(77, 1, 128), {}]], [[context(77, 2, 128), {}]]
    expected = draw(base, prompt, empty)
    assert torch.equal(draw(model, prompt, empty), expected)
    both = VersatileDualContext.execute(prompt, image_conditioning([context(65, 3, 128)]), 1.0, empty).args
    assert torch.equal(draw(model, *both[:2]), expected)


def test_a_picture_alone_runs_the_files_own_set(weights):
    """Equal to a plain SD1.x model of the host in which that set has taken the place of the one for texts."""
    stored, _ = storage.read_weights(weights / NAME)
    base, _ = storage.read_weights(weights / "text_to_image.safetensors")
    assert as_text_set(stored).keys() < base.keys()
    alone, model = checkpoint.load_model({**base, **as_text_set(stored)}), checkpoint.load("versatile")[0]
    tokens = context(65, 4, 128)
    assert torch.equal(draw(model, image_conditioning([tokens])), draw(alone, [[tokens, {}]]))
    assert not torch.allclose(draw(model, image_conditioning([tokens])), draw(model, [[tokens, {}]]), atol=1e-2), "the two sets differ"


def test_a_blend_depends_on_both(weights):
    model = checkpoint.load("versatile")[0]
    a, other_text, other_picture = dual(0.5, 77, 65, 0, 128), dual(0.5, 77, 65, 0, 128), dual(0.5, 77, 65, 0, 128)
    other_text[0][0] = context(77, 50, 128)
    other_picture[0][1]["versatile_image"] = context(65, 51, 128)
    drawn = [draw(model, conditioning) for conditioning in (a, other_text, other_picture)]
    assert min(float((one - drawn[0]).abs().max()) for one in drawn[1:]) > 1e-3


def test_pictures_come_through_the_mini_tower(weights):
    """From Mini Towers to the sampler, with pictures that the tower has to squash, and a mask."""
    with torch.inference_mode():
        (tower,) = MiniTowers.execute().args
        tokens = encode_pictures(tower, picture(96, 200, batch=2))
        assert tokens.shape == (2, 65, 128) and torch.allclose(tokens[:, 0].norm(dim=-1), torch.ones(2), atol=1e-5)
        mask = torch.zeros(1, 96, 200)
        mask[:, :, :100] = 1
        masked = encode_pictures(tower, picture(96, 200, batch=2), mask)
        assert masked.shape == tokens.shape and not torch.allclose(masked, tokens, atol=1e-2)
        positive = VersatileImageContext.execute(tower, picture(128, 128), "squash", 1.0, 0.2, "one each").args[0]
        negative = VersatileEmptyImage.execute("zeros", like=positive).args[0]
    model = checkpoint.load("versatile")[0]
    assert torch.isfinite(draw(model, positive, negative)).all()


def test_towers_share_nothing_with_the_hosts_class(weights):
    from comfy.clip_vision import ClipVisionModel

    tower = towers.load_clip_vision(weights)
    assert isinstance(tower, ClipVisionModel) and tower.context_width == 128 and "context_width" not in vars(tower)
    assert not hasattr(ClipVisionModel, "context_width")


def test_the_empty_picture_needs_the_positive_for_its_width(weights):
    positive = image_conditioning([context(65, 4, 128)])
    with pytest.raises(ValueError, match="has 768 values per token, but this Versatile Diffusion takes 128"):
        draw(checkpoint.load("versatile")[0], positive, VersatileEmptyImage.execute("zeros").args[0])


def test_new_weights_of_either_file_are_a_new_fingerprint(copied):
    before = MiniCheckpoint.fingerprint_inputs("versatile")
    for name in ("text_to_image", "versatile", "autoencoder"):
        with open(copied / f"{name}.safetensors", "ab") as file:
            file.write(b"\0")
        after = MiniCheckpoint.fingerprint_inputs("versatile")
        assert after != before
        before = after


def test_missing_files_are_named(copied):
    (copied / "text_to_image.safetensors").unlink()
    with pytest.raises(ValueError, match="text_to_image.safetensors are missing"):
        checkpoint.load("versatile")
    (copied / NAME).unlink()
    assert "versatile" not in checkpoint.names()


def spoiled(kind):
    def change(state):
        key = next(k for k in state if k.endswith("attn2.to_k.weight"))
        return {**state, **{"shape": {key: torch.zeros(3, 3)}, "more": {checkpoint.UNET_PREFIX + "more": torch.zeros(3)}}[kind]} if kind != "less" else {
            k: v for k, v in state.items() if k != key}

    return change


@pytest.mark.parametrize("kind", ["shape", "more", "less"])
def test_other_weights_are_one_sentence(copied, kind):
    storage.write_weights(copied / NAME, spoiled(kind)(storage.read_weights(copied / NAME)[0]), {})
    with pytest.raises(ValueError, match=r"versatile\.safetensors holds other weights") as refused:
        checkpoint.load("versatile")
    assert str(refused.value).endswith(".") and "\n" not in str(refused.value) and str(refused.value).count(". ") == 0


def test_a_damaged_file_is_one_sentence(copied):
    (copied / NAME).write_bytes((copied / NAME).read_bytes()[:1000])
    with pytest.raises(ValueError, match="versatile.safetensors are no readable"):
        checkpoint.load("versatile")
