"""`dev.py train` end to end, for seconds, into a temporary folder."""
import json

import pytest
import torch

from palimpsest.mini import checkpoint, optim, storage, train, train_autoencoder, train_text_to_image
from palimpsest.mini.autoencoder import Autoencoder


@pytest.fixture
def small(tmp_path, monkeypatch):
    """State and weights below tmp_path, few scenes, small batches."""
    monkeypatch.setattr(train, "ROOT", tmp_path)
    monkeypatch.setattr(train, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setattr(train_autoencoder, "POOL", 16)
    monkeypatch.setattr(train_autoencoder, "BATCH", 4)
    monkeypatch.setattr(train_text_to_image, "BATCH", 2)
    # held-out pictures as well: 256 of them take longer than the training
    drawn = train_autoencoder.pictures
    monkeypatch.setattr(train_autoencoder, "pictures", lambda first, count: drawn(first, min(count, 16)))
    latents = train_text_to_image.precompute
    monkeypatch.setattr(train_text_to_image, "precompute", lambda folder, net: latents(folder, net, 16))
    # six steps however slow the machine
    began = {}
    monkeypatch.setattr(optim.Trainer, "progress", property(lambda trainer: (trainer.step - began.setdefault(id(trainer), trainer.step)) / 5))
    return tmp_path


def run(*argv):
    assert train.main([*argv, "--device", "cpu"]) == 0


def test_autoencoder_then_text_to_image_then_on_from_where_they_stopped(small):
    weights = small / "weights"
    run("autoencoder", "--minutes", "1")
    tensors, metadata = storage.read_weights(weights / "autoencoder.safetensors")
    Autoencoder().load_state_dict(tensors)
    assert metadata["recipe"] == "autoencoder" and int(metadata["steps"]) > 0 and float(metadata["psnr_db"]) > 0

    run("text_to_image", "--minutes", "1")
    tensors, metadata = storage.read_weights(weights / "text_to_image.safetensors")
    assert int(metadata["steps"]) > 0 and int(metadata["images"]) == 2 * int(metadata["steps"])
    assert sorted(k.split(".")[0] for k in tensors)[0] == "model" and "token_ids" in tensors
    assert (weights / "text_to_image.safetensors").stat().st_size < 19e6, "all three nets may take 20 MB"
    checkpoint.load_model(tensors)

    state = small / ".train" / "text_to_image" / "state.json"
    before = json.loads(state.read_text())["step"]
    run("text_to_image", "--minutes", "1")
    assert json.loads(state.read_text())["step"] > before
    run("text_to_image", "--minutes", "1", "--fresh", "--from-shipped", "--output", str(small / "other.safetensors"))
    assert (small / "other.safetensors").is_file()


def test_the_decoder_alone_leaves_the_latents_as_they_are(small):
    run("autoencoder", "--minutes", "1")
    before = storage.read_weights(small / "weights" / "autoencoder.safetensors")[0]
    run("autoencoder", "--minutes", "1", "--decoder-only")
    after = storage.read_weights(small / "weights" / "autoencoder.safetensors")[0]
    assert all(torch.equal(before[k], after[k]) for k in before if not k.startswith("decoder"))
    assert any(not torch.equal(before[k], after[k]) for k in before if k.startswith("decoder"))


def test_latents_are_computed_once(small, monkeypatch):
    net = Autoencoder().eval()
    first = train_text_to_image.precompute(small, net)
    monkeypatch.setattr(train_text_to_image, "pictures", lambda *a: pytest.fail("drawn again"))
    assert torch.equal(train_text_to_image.precompute(small, net), first)
    assert first.shape == (16, 4, 16, 16) and first.dtype == torch.float16


def test_zero_minutes_and_unknown_members_are_refused(small, capsys):
    for argv in (["autoencoder", "--minutes", "0"], ["nobody"]):
        with pytest.raises(SystemExit):
            train.main(argv)
    assert "--minutes must be above 0" in capsys.readouterr().err
    assert not (small / "weights").exists()
