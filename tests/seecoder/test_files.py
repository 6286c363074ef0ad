"""Where files are looked for."""

import folder_paths
import pytest

from palimpsest.seecoder import files
from palimpsest.tests.helpers.seecoder import empty_folders


@pytest.fixture
def models(tmp_path, monkeypatch):
    """An empty models folder, and a registry without our names."""
    empty_folders(monkeypatch, tmp_path)
    monkeypatch.setattr(files, "EMBEDDING_BYTES", 3)
    return tmp_path


def put(path, content=b"encoder"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_an_empty_list_explains_itself(models):
    assert files.choices() == [files.NONE_FOUND]
    with pytest.raises(ValueError, match="seecoder-v1-0.safetensors.*1.2 GB each.*models/seecoder and reload") as error:
        files.find(files.NONE_FOUND)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no file gone.safetensors in models/seecoder or models/seecoders"):
        files.find("gone.safetensors")


def test_both_folders_and_subfolders_are_searched(models):
    put(models / "seecoder" / "b.safetensors")
    put(models / "seecoders" / "a.pth")
    put(models / "seecoders" / "anime" / "c.safetensors")
    put(models / "seecoders" / "notes.txt")
    names = files.choices()
    assert [name.replace("\\", "/") for name in names] == ["a.pth", "anime/c.safetensors", "b.safetensors"]
    assert files.find("b.safetensors") == str(models / "seecoder" / "b.safetensors")
    assert files.find("a.pth") == str(models / "seecoders" / "a.pth")


def test_the_list_follows_the_folder(models):
    put(models / "seecoder" / "a.safetensors")
    assert files.choices() == ["a.safetensors"]
    import os

    put(models / "seecoder" / "b.safetensors")
    os.utime(models / "seecoder", (1, 1))  # file systems with coarse time stamps would hide the change from the host's cache
    assert files.choices() == ["a.safetensors", "b.safetensors"]


def test_folders_named_by_extra_model_paths_count(models, tmp_path):
    """extra_model_paths.yaml is read before custom nodes; its entries must neither be lost nor be the only ones."""
    elsewhere = tmp_path / "elsewhere"
    put(elsewhere / "x.safetensors")
    put(models / "seecoder" / "y.safetensors")
    folder_paths.add_model_folder_path("seecoder", str(elsewhere), is_default=True)
    files.register()
    files.register()
    assert files.choices() == ["x.safetensors", "y.safetensors"]
    assert len(folder_paths.get_folder_paths("seecoder")) == 2


def test_the_shipped_one_comes_last(models, monkeypatch):
    own = models / "own.safetensors"
    put(own)
    monkeypatch.setattr(files, "SHIPPED", {"mini": own, "not made yet": models / "missing"})
    put(models / "seecoder" / "z.safetensors")
    assert files.choices() == ["z.safetensors", "mini"] and files.find("mini") == str(own)
    with pytest.raises(ValueError, match="not part of this version"):
        files.find("not made yet")


def test_beside_the_shipped_one_the_list_still_says_where_files_belong(models, monkeypatch):
    put(models / "own.safetensors")
    monkeypatch.setattr(files, "SHIPPED", {"mini": models / "own.safetensors"})
    assert files.choices() == [files.NONE_FOUND, "mini"]


def test_the_negative_embedding_is_not_offered_as_an_encoder(models):
    """Regression: anime_ug.pth came first in the loader's list and was its default."""
    put(models / "seecoder" / "anime_ug.pth", b"n")
    put(models / "seecoder" / "seecoder-anime-v1-0.safetensors")
    assert files.choices() == ["seecoder-anime-v1-0.safetensors"] and files.embeddings() == ["anime_ug.pth"]
