"""Contexts in files: round trips, arrays that users bring, damage."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from palimpsest.tests.helpers.versatile import context, dual
from palimpsest.versatile_diffusion.contexts import image_conditioning, picture_contexts
from palimpsest.versatile_diffusion.storage import describe, load_context, save_context


def refusal(message, path, flow="auto"):
    with pytest.raises(ValueError, match=message) as error:
        load_context(str(path), flow)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


@pytest.mark.parametrize("conditioning", [
    [[context(77, width=768), {"pooled_output": torch.zeros(1, 768)}]], image_conditioning([context(257, 1), context(257, 2)]), dual(0.3), dual(0.0, 154),
], ids=["text", "two pictures", "dual", "dual at 0"])
def test_round_trips(tmp_path, conditioning):
    path = str(tmp_path / "a" / "x.context.safetensors")
    save_context(conditioning, path)
    (tokens, options), = load_context(path)
    before = conditioning[0]
    assert torch.equal(tokens, before[0])
    assert options["versatile_flow"] == before[1].get("versatile_flow", "text")
    for key in ("versatile_ratio", "versatile_pictures"):
        assert options.get(key) == before[1].get(key)
    if "versatile_image" in before[1]:
        assert torch.equal(options["versatile_image"], before[1]["versatile_image"])
    assert not [file for file in (tmp_path / "a").iterdir() if file.suffix == ".tmp"]


@pytest.mark.parametrize("shape", [(257, 768), (1, 257, 768), (3, 257, 768)])
@pytest.mark.parametrize("suffix", [".safetensors", ".npy"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_arrays_of_ones_own(tmp_path, shape, suffix, dtype):
    array, path = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype), tmp_path / f"brain{suffix}"
    if suffix == ".npy":
        np.save(path, array.numpy())
    else:
        save_file({"anything": array}, str(path))
    (tokens, options), = load_context(str(path), "image")
    assert torch.equal(tokens, array.reshape(-1, 257, 768).float()) and options["versatile_flow"] == "image"
    assert len(picture_contexts([[tokens, options]], "context")) == 1
    assert load_context(str(path), "text")[0][1]["versatile_flow"] == "text"
    refusal("does not say whether", path)


def test_the_flow_can_be_overruled(tmp_path):
    path = str(tmp_path / "x.safetensors")
    save_context(image_conditioning([context(257)]), path)
    assert load_context(path, "text")[0][1]["versatile_flow"] == "text"


def test_a_dual_file_gives_the_half_that_is_asked_for(tmp_path):
    """Regression: flow "image" gave the text's tokens as a picture."""
    path, (words, options) = str(tmp_path / "x.safetensors"), dual(0.3)[0]
    save_context(dual(0.3), path)
    (tokens, own), = load_context(path, "image")
    assert torch.equal(tokens, options["versatile_image"]) and own == {"versatile_flow": "image", "versatile_pictures": (257,)}
    (tokens, own), = load_context(path, "text")
    assert torch.equal(tokens, words) and own == {"versatile_flow": "text"}


@pytest.mark.parametrize("wrong", [torch.zeros(257, 64), torch.full((1, 257, 64), float("inf"))], ids=["one dimension less", "not finite"])
def test_the_picture_of_a_dual_file_is_checked(tmp_path, wrong):
    """Regression: only the text's tokens were, and a broken picture failed in the sampler."""
    path = tmp_path / "x.safetensors"
    metadata = {"format": "palimpsest_versatile_context", "flow": "dual", "ratio": "0.3"}
    save_file({"context": context(77), "image": wrong}, str(path), metadata=metadata)
    refusal("is damaged.*its picture is not finite numbers", path)
    assert load_context(str(path), "text")[0][0].shape == (1, 77, 64)


def test_what_is_no_context(tmp_path):
    many = tmp_path / "many.safetensors"
    save_file({"a": torch.zeros(2, 2), "b": torch.zeros(2, 2)}, str(many))
    refusal("holds 2 tensors", many, "image")
    for array in (torch.zeros(768), torch.full((2, 3), float("nan"))):
        save_file({"a": array}, str(many))
        refusal("no context of finite numbers", many, "image")
    (tmp_path / "x.pt").write_bytes(b"x")
    refusal(r"\.safetensors or \.npy", tmp_path / "x.pt", "image")
    objects = tmp_path / "objects.npy"
    np.save(objects, np.array([{}], dtype=object), allow_pickle=True)
    refusal("cannot be read", objects, "image")
    refusal("cannot be read", tmp_path / "gone.npy", "image")


def test_damage(tmp_path):
    path = tmp_path / "x.safetensors"
    save_context(dual(0.3), str(path))
    content = path.read_bytes()
    path.write_bytes(content[:200])
    refusal("cannot be read", path)
    path.write_bytes(content)
    tensors = load_file(str(path))
    metadata = {"format": "palimpsest_versatile_context", "flow": "dual", "ratio": "0.3"}
    save_file({"context": tensors["context"]}, str(path), metadata=metadata)
    refusal("is damaged", path)
    save_file(tensors, str(path), metadata={**metadata, "ratio": "half"})
    refusal("is damaged", path)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match="could not be written"):
        save_context(dual(0.3), str(tmp_path / "file" / "x.safetensors"))


def test_a_line_for_people():
    assert describe(dual(0.3)).startswith("dual context: 1 row of 77 tokens, 64 values each, mean norm ") and "257 tokens, ratio 0.3" in describe(dual(0.3))
    assert "2 pictures read together" in describe(image_conditioning([context(257, 1), context(257, 2)]))
