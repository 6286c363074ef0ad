"""Where files and folders are looked for."""

import os

import pytest
import torch
from safetensors.torch import save_file

from palimpsest.versatile_diffusion import files, sources


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A models folder of the test's own."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    table = {key: value for key, value in folder_paths.folder_names_and_paths.items() if key != files.FOLDER}
    table["diffusers"] = ([str(tmp_path / "diffusers")], ["folder"])
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", table)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def put(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"x": torch.zeros(1)}, str(path))


def test_nothing_there_says_where_files_belong(models):
    assert files.choices() == [files.NONE_FOUND]
    for name in (files.NONE_FOUND, "gone.pth", "gone/"):
        with pytest.raises(ValueError, match="models/versatile_diffusion.*reload the page") as error:
            files.find(name)
        assert str(error.value).endswith(".")


def test_files_and_folders(models):
    put(models / "versatile_diffusion" / "b.safetensors")
    put(models / "versatile_diffusion" / "sub" / "a.pth")
    put(models / "versatile_diffusion" / "vd" / "image_unet" / "diffusion_pytorch_model.safetensors")
    put(models / "diffusers" / "shi-labs" / "versatile-diffusion" / "image_unet" / "diffusion_pytorch_model.fp16.safetensors")
    put(models / "diffusers" / "other" / "unet" / "diffusion_pytorch_model.safetensors")
    (models / "versatile_diffusion" / "notes.txt").write_text("x")
    names = files.choices()
    assert [name.replace(os.sep, "/") for name in names] == ["b.safetensors", "sub/a.pth", "shi-labs/versatile-diffusion/", "vd/"]
    for name in names:
        path = files.find(name)
        assert os.path.isdir(path) is name.endswith("/")
        stamp = files.stamp(path)
        assert stamp
        weights = path if os.path.isfile(path) else files.weights_in(os.path.join(path, "image_unet"))
        os.utime(weights, ns=(1, 1))
        assert files.stamp(path) != stamp


def test_a_folder_with_the_text_diffuser_alone_is_listed(models):
    """Regression: the tooltip of the text loader promised folders with text_unet, but only those with image_unet were listed."""
    put(models / "versatile_diffusion" / "words" / "text_unet" / "diffusion_pytorch_model.safetensors")
    put(models / "diffusers" / "sd" / "unet" / "diffusion_pytorch_model.safetensors")
    assert files.choices() == ["words/"]
    with pytest.raises(ValueError, match="The folder words holds no image diffuser: choose a file that does") as error:
        sources.recognise(files.find("words/"))
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_a_name_does_not_leave_the_folders(models):
    put(models / "secret" / "image_unet" / "model.safetensors")
    (models / "versatile_diffusion").mkdir()
    for name in ("../secret/", "../secret/image_unet/model.safetensors"):
        with pytest.raises(ValueError, match="There is no"):
            files.find(name)


def test_names_of_weights_files(tmp_path):
    assert files.weights_in(str(tmp_path)) is None
    for name in ("pytorch_model.fp16.bin", "model.safetensors", "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"):
        put(tmp_path / name)
        assert files.weights_in(str(tmp_path)) == str(tmp_path / name)
