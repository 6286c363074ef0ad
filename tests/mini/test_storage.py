"""Weights files: fp16 with metadata, whole or not at all; every kind of damage is one sentence."""
import pickle

import pytest
import torch

from palimpsest.mini import checkpoint, storage


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "weights" / "member.safetensors"
    storage.write_weights(path, {"a": torch.linspace(-3, 3, 1000), "ids": torch.arange(5, dtype=torch.int32)}, {"recipe": "test", "steps": 7})
    return path


def test_what_is_written_is_read(file):
    tensors, metadata = storage.read_weights(file)
    assert tensors["a"].dtype == torch.float32 and torch.allclose(tensors["a"], torch.linspace(-3, 3, 1000), atol=2e-3)
    assert tensors["ids"].dtype == torch.int32 and tensors["ids"].tolist() == list(range(5))
    assert metadata == {"recipe": "test", "steps": "7"}


def one_sentence(failed) -> None:
    text = str(failed.value)
    assert "member.safetensors" in text and "\n" not in text and text.endswith(".") and "dev.py train" in text


def test_missing(tmp_path):
    with pytest.raises(ValueError, match="missing") as failed:
        storage.read_weights(tmp_path / "member.safetensors")
    one_sentence(failed)


@pytest.mark.parametrize("keep", [0, 4, 60, 1500])
def test_truncated(file, keep):
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="no readable safetensors") as failed:
        storage.read_weights(file)
    one_sentence(failed)


class Alarm:
    def __reduce__(self):
        return pytest.fail, ("the pickle was executed",)


@pytest.mark.parametrize("write", [lambda path: path.write_bytes(pickle.dumps({"a": Alarm()})), lambda path: torch.save({"a": Alarm()}, path)])
def test_a_pickle_where_safetensors_belong_is_not_opened(file, write):
    write(file)
    with pytest.raises(ValueError, match="no readable safetensors") as failed:
        storage.read_weights(file)
    one_sentence(failed)


def test_a_failed_write_leaves_the_old_file_and_nothing_half_written(file, monkeypatch):
    before = file.read_bytes()

    def crash(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(storage, "save_file", crash)
    with pytest.raises(OSError):
        storage.write_weights(file, {"a": torch.zeros(3)}, {})
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.glob("*.safetensors")] == [file.name]


def test_a_file_of_another_kind_is_not_opened(tmp_path):
    path = tmp_path / "member.safetensors.pt"
    torch.save({"a": Alarm()}, path)
    with pytest.raises(ValueError, match="is none") as failed:
        storage.read_weights(path)
    one_sentence(failed)


def test_a_member_that_is_not_there_is_named_with_those_that_are(file, monkeypatch):
    monkeypatch.setattr(checkpoint, "WEIGHTS", file.parent)
    for name in ("none", "../member"):
        with pytest.raises(ValueError, match=f"no mini model called {name}: choose one of member."):
            checkpoint.load(name)


@pytest.mark.parametrize("damaged", ["text_to_image", "autoencoder"])
def test_a_safetensors_file_of_something_else_is_one_sentence(tmp_path, monkeypatch, damaged):
    """Regression: a wrong file ended in a bare KeyError, or in a list of all missing keys."""
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path)
    for name in ("text_to_image", "autoencoder"):
        if name == damaged or not (storage.Path(storage.__file__).parent / "weights" / f"{name}.safetensors").is_file():
            storage.write_weights(tmp_path / f"{name}.safetensors", {"unrelated": torch.zeros(2)}, {})
        else:
            real = storage.Path(storage.__file__).parent / "weights" / f"{name}.safetensors"
            (tmp_path / real.name).write_bytes(real.read_bytes())
    with pytest.raises(ValueError, match=r"\.safetensors holds other weights") as failed:
        checkpoint.load("text_to_image")
    assert "\n" not in str(failed.value)
