"""Names of checkpoints, and what is said when there are none."""

import pytest

from palimpsest.instruct_pix2pix import files


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """models/checkpoints of the test's own."""
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, files.FOLDER, ([str(tmp_path)], folder_paths.supported_pt_extensions))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def test_an_empty_folder_says_what_belongs_there(folder):
    assert files.choices() == [files.NONE_FOUND]
    for name, words in ((files.NONE_FOUND, "no checkpoint yet: put instruct-pix2pix-00-22000.safetensors"), ("gone.ckpt", "no checkpoint gone.ckpt in models/checkpoints")):
        with pytest.raises(ValueError, match=words) as error:
            files.find(name)
        assert str(error.value).endswith(".")
    assert files.stamp("gone.ckpt") == files.stamp(None) == ""


def test_files_are_found_below_and_their_stamp_follows_them(folder):
    (folder / "edit").mkdir()
    file = folder / "edit" / "mine.safetensors"
    file.write_bytes(b"1")
    assert [name.replace("\\", "/") for name in files.choices()] == ["edit/mine.safetensors"] and files.find("edit/mine.safetensors") == str(file)
    before = files.stamp("edit/mine.safetensors")
    file.write_bytes(b"22")
    assert before and files.stamp("edit/mine.safetensors") != before


def test_a_name_cannot_lead_out_of_the_folder(folder):
    (folder.parent / "secret.safetensors").write_bytes(b"1")
    with pytest.raises(ValueError, match="There is no checkpoint"):
        files.find("../secret.safetensors")
