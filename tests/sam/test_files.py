"""Where SAM files are looked for."""

import os

import folder_paths
import pytest

from palimpsest.sam import files
from palimpsest.tests.helpers.sam import empty_folder


@pytest.fixture
def models(tmp_path, monkeypatch):
    empty_folder(monkeypatch, tmp_path)
    return tmp_path


def put(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"sam")
    return path


def test_an_empty_list_explains_itself(models):
    assert files.choices() == [files.NONE_FOUND]
    with pytest.raises(ValueError, match=r"sam_vit_b_01ec64.pth \(375 MB\).*2.6 GB.*models/sams and reload") as error:
        files.find(files.NONE_FOUND)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="There is no file gone.pth in models/sams: put"):
        files.find("gone.pth")


def test_subfolders_are_searched_and_other_files_left_out(models):
    for name in ("b.pth", "big/a.safetensors", "c.txt"):
        put(models / "sams" / name)
    assert [name.replace("\\", "/") for name in files.choices()] == ["b.pth", "big/a.safetensors"]
    assert files.find("b.pth") == str(models / "sams" / "b.pth")


def test_the_list_follows_the_folder(models):
    put(models / "sams" / "a.pth")
    assert files.choices() == ["a.pth"]
    put(models / "sams" / "b.pth")
    os.utime(models / "sams", (1, 1))  # file systems with coarse time stamps would hide the change from the host's cache
    assert files.choices() == ["a.pth", "b.pth"]


def test_folders_of_extra_model_paths_and_of_other_packs_count(models, tmp_path):
    put(tmp_path / "elsewhere" / "x.pth")
    put(models / "sams" / "y.pth")
    folder_paths.add_model_folder_path("sams", str(tmp_path / "elsewhere"), is_default=True)
    files.register()
    files.register()
    assert files.choices() == ["x.pth", "y.pth"] and len(folder_paths.get_folder_paths("sams")) == 2


def test_the_stamp_follows_the_file(models):
    path = put(models / "sams" / "a.pth")
    before = files.stamp("a.pth")
    os.utime(path, (1, 1))
    assert before and files.stamp("a.pth") not in ("", before)
    assert files.stamp("gone.pth") == files.stamp(None) == files.stamp(files.NONE_FOUND) == ""
