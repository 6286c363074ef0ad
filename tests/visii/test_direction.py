"""The direction of an edit, from the host's CLIP_VISION and a file's text projection."""

import pickle

import folder_paths
import pytest
import torch
from safetensors.torch import save_file

from palimpsest.mini import towers
from palimpsest.tests.helpers.towers import write_random_towers
from palimpsest.visii import direction

MATRIX = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """models/text_encoders of the test's own; the pack's towers have random weights."""
    (tmp_path / "models").mkdir()
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {"text_encoders": ([str(tmp_path / "models")], {".safetensors", ".pt", ".bin"})})
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    name = next(iter(direction.SHIPPED))
    monkeypatch.setattr(direction, "SHIPPED", {name: write_random_towers(tmp_path / "shipped")})
    return tmp_path / "models"


@pytest.fixture
def vision(folder):
    with torch.inference_mode():
        return towers.load_clip_vision(folder.parent / "shipped")


def pictures(count=2, seed=0, size=128):
    return torch.rand(count, size, size, 3, generator=torch.Generator().manual_seed(seed))


def made(*args):
    with torch.inference_mode():
        return direction.make_direction(*args)


def test_the_direction_is_between_the_means_of_the_hosts_image_embeds(folder, vision):
    save_file({"text_projection.weight": MATRIX.half(), "vision_model.x": torch.ones(1)}, str(folder / "clip.safetensors"))
    before, after = pictures(), pictures(seed=1)
    found = made(vision, "clip.safetensors", before, after, 128)
    with torch.inference_mode():
        plain = vision.encode_image(after)["image_embeds"].mean(0) - vision.encode_image(before)["image_embeds"].mean(0)
    assert found.on and torch.allclose(found.vector[0], plain / plain.norm(), atol=1e-5) and torch.equal(found.projection, MATRIX.half().float())
    assert not found.vector.is_inference() and not found.projection.is_inference()


def test_the_packs_own_towers_are_offered_and_fit(folder, vision):
    name = next(iter(direction.SHIPPED))
    assert direction.choices() == ["none", name]
    assert made(vision, name, pictures(), pictures(seed=1), 128).on


@pytest.mark.parametrize("key, flip", [(key, key == direction.OPENAI) for key in direction.KEYS])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_names_of_other_files(folder, key, flip, suffix):
    path, matrix = str(folder / f"one{suffix}"), MATRIX[:64].contiguous()
    state = {key: (matrix.t() if flip else matrix).contiguous(), "other": torch.ones(2)}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    found, reason = direction.read_projection(path)
    assert torch.equal(found, matrix) and reason == ""


@pytest.mark.parametrize(
    "tensors, words",
    [
        ({"text_model.encoder.weight": torch.ones(3)}, "holds no text projection"),
        ({"text_projection.weight": torch.eye(128)}, "is the identity"),
        ({"text_projection.weight": torch.eye(128).half()}, "is the identity"),
        ({"text_projection.weight": torch.full((128, 128), float("nan"))}, "no matrix of numbers"),
        ({"text_projection.weight": torch.ones(128)}, "no matrix of numbers"),
    ],
)
def test_without_a_usable_projection_it_is_off_and_says_why(folder, vision, tensors, words):
    save_file(tensors, str(folder / "clip.safetensors"))
    found = made(vision, "clip.safetensors", pictures(), pictures(seed=1), 128)
    assert not found.on and words in found.reason


def test_missing_parts_switch_it_off(folder, vision):
    name = next(iter(direction.SHIPPED))
    for parts, words in (((None, "none"), "no CLIP_VISION and no text projection"), ((vision, "none"), "no text projection"), ((None, name), "no CLIP_VISION")):
        found = made(*parts, pictures(), pictures(seed=1), 128)
        assert not found.on and words in found.reason
    same = made(vision, name, pictures(), pictures(), 128)
    assert not same.on and "sees no difference" in same.reason


def refusal(*args):
    with pytest.raises(ValueError) as refused:
        made(*args)
    assert str(refused.value).endswith(".") and "\n" not in str(refused.value)
    return str(refused.value)


def test_parts_that_do_not_belong_together_are_refused(folder, vision):
    name = next(iter(direction.SHIPPED))
    assert "takes 128 values per token, but the model's text encoder gives 768" in refusal(vision, name, pictures(), pictures(seed=1), 768)
    save_file({"text_projection.weight": MATRIX[:64].contiguous()}, str(folder / "small.safetensors"))
    assert "leads to 64 values" in refusal(vision, "small.safetensors", pictures(), pictures(seed=1), 128)


def test_files_that_cannot_be_read_are_refused(folder, vision):
    assert "There is no file gone.safetensors" in refusal(vision, "gone.safetensors", pictures(), pictures(seed=1), 128)
    for name, data in (("bad.safetensors", b"xx"), ("bad.pt", pickle.dumps({"a": print}))):
        (folder / name).write_bytes(data)
        assert "cannot be read" in refusal(vision, name, pictures(), pictures(seed=1), 128)
