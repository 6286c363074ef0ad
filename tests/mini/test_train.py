"""`dev.py train` end to end, for seconds, into a temporary folder."""
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from palimpsest.mini import checkpoint, optim, samples, storage, train, train_autoencoder, train_text_to_image
from palimpsest.mini.autoencoder import Autoencoder


@pytest.fixture
def small(tmp_path, monkeypatch):
    """State and weights below tmp_path, few scenes, small batches."""
    monkeypatch.setattr(train, "ROOT", tmp_path)
    monkeypatch.setattr(train, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setattr(train_autoencoder, "POOL", 16)
    monkeypatch.setattr(train_autoencoder, "BATCH", 4)
    monkeypatch.setattr(train_text_to_image, "BATCH", 2)
    for name, value in (("COLUMNS", 2), ("ROWS", 1), ("STEPS", 1)):
        monkeypatch.setattr(samples, name, value)
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


def test_autoencoder_then_text_to_image_then_on_from_where_they_stopped(small, monkeypatch):
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
    assert {"seed", "learning_rate", "batch", "weighting", "device", "final_loss", "data_seed"} <= metadata.keys() and metadata["device"] == "cpu"
    assert 0 <= float(metadata["captions_followed"]) <= 1 and int(metadata["captions_attributes"]) > 0
    with Image.open(small / ".train" / "text_to_image" / "samples.png") as grid:
        assert grid.size == (256, 128)

    state = small / ".train" / "text_to_image" / "state.json"
    before = json.loads(state.read_text())["step"]
    run("text_to_image", "--minutes", "1")
    assert json.loads(state.read_text())["step"] > before
    # regression: an earlier state in .train silently took the shipped weights' place
    monkeypatch.setattr(optim.Trainer, "resume", lambda trainer: pytest.fail("resumed"))
    run("text_to_image", "--minutes", "1", "--from-shipped", "--output", str(small / "other.safetensors"))
    assert int(storage.read_weights(small / "other.safetensors")[1]["steps"]) < before + 6
    # on a slow machine there is more than one line
    assert int((state.parent / "curve.csv").read_text().split(",")[0]) <= 6, "a new run starts a new curve"


def test_the_autoencoder_from_shipped_weights_does_not_resume(small, monkeypatch):
    """Regression: an earlier state in .train silently took the shipped weights' place."""
    run("autoencoder", "--minutes", "1")
    run("autoencoder", "--minutes", "1", "--from-shipped")
    begun = int(storage.read_weights(small / "weights" / "autoencoder.safetensors")[1]["steps"])
    run("autoencoder", "--minutes", "1")
    assert int(storage.read_weights(small / "weights" / "autoencoder.safetensors")[1]["steps"]) > begun


def test_weights_are_kept_when_drawing_the_samples_fails(small, monkeypatch):
    def fails(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr(train, "draw_samples", fails)
    run("autoencoder", "--minutes", "1")
    with pytest.raises(RuntimeError, match="no memory"):
        run("text_to_image", "--minutes", "1")
    assert storage.read_weights(small / "weights" / "text_to_image.safetensors")[1]["recipe"] == "text_to_image"


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


def test_latents_that_were_half_written_are_not_read(small, monkeypatch):
    """Regression: a run stopped while it wrote its latents left a file that the next one took for whole."""
    def breaks(tensors, path):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    net = Autoencoder().eval()
    with monkeypatch.context() as broken:
        broken.setattr(train_text_to_image, "save_file", breaks)
        with pytest.raises(KeyboardInterrupt):
            train_text_to_image.precompute(small, net)
    assert train_text_to_image.precompute(small, net).shape == (16, 4, 16, 16)


def test_zero_minutes_and_unknown_members_are_refused(small, capsys):
    for argv in (["autoencoder", "--minutes", "0"], ["nobody"]):
        with pytest.raises(SystemExit):
            train.main(argv)
    assert "--minutes must be above 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main(["autoencoder", "--output", "weights.pt"])
    assert "must end in .safetensors" in capsys.readouterr().err
    assert not (small / "weights").exists()


def test_steps_cover_the_schedule_and_lean_to_the_noisy_end():
    g = torch.Generator().manual_seed(0)
    t = torch.cat([train_text_to_image.batch_steps(g, 64) for _ in range(200)])
    assert t.dtype == torch.long and t.min() >= 0 and t.max() == 999
    # P(t < 500) = 0.5^1.5
    assert (t < 500).float().mean().item() == pytest.approx(0.5**1.5, abs=0.01)


def test_muon_has_the_hidden_layers_only():
    from palimpsest.mini.nets import new_text_encoder, new_unet

    model = torch.nn.ModuleDict({"unet": new_unet(), "text": new_text_encoder(10)})
    names = train_text_to_image.muon_weights(model)
    named = dict(model.named_parameters())
    assert names < named.keys() and all(named[k].ndim >= 2 for k in names)
    assert not {"unet.input_blocks.0.0.weight", "unet.out.2.weight", "text.text_model.embeddings.token_embedding.weight"} & names
    assert {"unet.input_blocks.1.0.in_layers.2.weight", "unet.time_embed.0.weight", "text.text_model.encoder.layers.0.mlp.fc1.weight"} <= names


def test_what_captions_say_is_told_beside_them():
    from palimpsest.mini.captions import caption
    from palimpsest.mini.scenes import sample_scene
    from palimpsest.mini.tokens import GrammarTokens

    tokens, g = GrammarTokens(), torch.Generator().manual_seed(0)
    ids, said = train_text_to_image.batch_tokens(tokens, list(range(60)), g)
    assert ids.shape == (60, 77) and said.shape == (60, len(train_text_to_image.SAID))
    empty = (ids == tokens.encode("")).all(1)
    assert 0 < empty.sum() < 20 and (said[empty] == train_text_to_image.UNSAID).all()
    spoken = 0
    for row in range(60):
        scene = sample_scene(train_text_to_image.TRAIN_SEED + row)
        for value, (index, name, words) in zip(said[row].tolist(), train_text_to_image.SAID):
            if value != train_text_to_image.UNSAID:
                of = scene if index is None else scene.objects[index]
                assert words[value] == getattr(of, name)
                spoken += 1
    assert spoken > 300
    everything = caption(sample_scene(train_text_to_image.TRAIN_SEED), 0, 1.0)
    assert len(everything[1][0]) >= 5, "the grammar still names what is asked about"


def test_the_text_encoder_is_asked_at_end_tokens_only():
    """The head must not be able to learn from the words themselves: only what has reached an end token counts."""
    from palimpsest.mini.tokens import GrammarTokens

    tokens, g = GrammarTokens(), torch.Generator().manual_seed(0)
    ids, said = train_text_to_image.batch_tokens(tokens, list(range(8)), g)
    states = torch.randn(8, 77, train_text_to_image.CONTEXT, requires_grad=True)
    heads = torch.nn.Linear(train_text_to_image.CONTEXT, sum(len(words) for _, _, words in train_text_to_image.SAID))
    end = tokens.compact[train_text_to_image.END]
    touched = torch.zeros(8, 77, dtype=torch.bool)
    for _ in range(30):
        loss = train_text_to_image.reading_loss(states, ids, said, end, heads, g)
        touched |= torch.autograd.grad(loss, states)[0].abs().sum(-1) > 0
    assert not touched[ids != end].any() and touched[ids == end].sum() > 60


def test_a_part_that_a_state_lacks_starts_anew(tmp_path, capsys):
    """Regression: a recipe that had gained a part could not go on from its own earlier state."""
    old = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2)})
    trainer = optim.Trainer(old, tmp_path, 10, 1e-2, seed=0)
    trainer.update(old["a"](torch.ones(1, 2)).sum(), 1)
    trainer.save()
    new = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    start = new["b"].weight.detach().clone()
    second = optim.Trainer(new, tmp_path, 10, 1e-2, seed=0)
    assert second.resume() and torch.equal(new["a"].weight, old["a"].weight) and torch.equal(new["b"].weight, start)
    assert "not in the state, so it starts anew: b.weight" in capsys.readouterr().out
    second.update((new["a"](torch.ones(1, 2)) + new["b"](torch.ones(1, 2))).sum(), 1)
    assert not torch.equal(new["b"].weight, start)
