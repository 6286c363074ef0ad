"""The recipe of the mini towers: what it writes loads through the usual paths, and its losses ask for what they should."""

import dataclasses

import pytest
import torch

from palimpsest.mini import checkpoint, optim, storage, towers, train, train_towers
from palimpsest.mini.instructions import vocabulary
from palimpsest.mini.nets import new_text_encoder
from palimpsest.mini.tokens import GrammarTokens
from palimpsest.visii import direction


@pytest.fixture(scope="module")
def tokens():
    return GrammarTokens(vocabulary())


def test_features_that_belong_together_cost_little():
    a = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor(50.0)
    assert float(train_towers.contrast(a, 3 * a, scale)) < 1e-3
    assert float(train_towers.contrast(a, a.roll(1, 0), scale)) > 5
    assert float(train_towers.contrast(a[:1].expand(8, -1), a[:1].expand(8, -1), scale)) == pytest.approx(torch.tensor(8.0).log().item())


def test_texts_are_captions_of_the_shown_side_and_instructions(tokens):
    images, triples = train_towers.draw(train_towers.TRAIN_SEED, 6)
    assert images.shape == (6, 2, 3, 128, 128) and images.dtype == torch.uint8
    assert all(not torch.equal(before, after) for before, after in images)
    sides, seeds = [0, 1, 0, 1, 0, 1], [0, 4, 8, 12, 16, 20]
    ids = train_towers.batch_texts(tokens, triples, sides, seeds)
    assert ids.shape == (12, 77)
    for row, found in enumerate(triples):
        text = train_towers.caption((found.before, found.after)[sides[row]], seeds[row], 1.0)[0]
        assert torch.equal(ids[row], tokens.encode(text)) and torch.equal(ids[6 + row], tokens.encode(found.instruction))
    assert tokens.unknown not in ids, "every word has an embedding"


def test_each_local_token_is_asked_for_the_object_on_it():
    from palimpsest.mini.scenes import masks, sample_scene

    scene = sample_scene(5, 2)
    there, silhouettes = train_towers.stands_at(scene).unflatten(1, (8, 8)), masks(scene)
    assert there.shape == (4, 8, 8) and there.dtype == torch.int8
    for row in range(8):
        for column in range(8):
            cover = [float(one[16 * row:16 * row + 16, 16 * column:16 * column + 16].mean()) for one in silhouettes]
            found = there[:, row, column].tolist()
            if max(cover) < train_towers.COVERED:
                assert found == [train_towers.NOTHING] * 4
            else:
                obj = scene.objects[cover.index(max(cover))]
                assert [names[number] for number, names in zip(found, train_towers.ASKED.values())] == [obj.shape, obj.color, obj.pattern, obj.size]
    assert 4 <= int((there[0] != train_towers.NOTHING).sum()) <= 40
    assert (train_towers.stands_at(dataclasses.replace(scene, objects=())) == train_towers.NOTHING).all()


def test_answers_are_judged_where_something_stands():
    answers = train_towers.Answers(3)
    there = torch.full((1, 4, 64), train_towers.NOTHING, dtype=torch.int8)
    there[0, :, 7] = torch.tensor([3, 6, 1, 0])
    torch.nn.init.zeros_(answers.read.weight)
    torch.nn.init.zeros_(answers.read.bias)
    tokens = torch.zeros(1, 64, 3)
    tokens[0, 7, 0] = 1.0
    unsure = float(answers.loss(tokens, there).detach())
    assert unsure == pytest.approx(sum(torch.tensor(float(n)).log().item() for n in answers.sizes))
    with torch.no_grad():
        answers.read.bias[0] = 20.0
        for place in (1, 2 + 3, 6 + 6, 14 + 1, 18 + 0):
            answers.read.weight[place, 0] = 60.0
    assert float(answers.loss(tokens, there).detach()) < 1e-3


def test_a_training_goes_on_from_the_file(tokens):
    torch.manual_seed(0)
    net = towers.Towers()
    net.answers = train_towers.Answers(128)
    again = towers.Towers()
    missing, unexpected = again.load_state_dict(towers.from_file(towers.file_state(net.state_dict())), strict=False)
    assert not unexpected and all("position_ids" in name for name in missing)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in again.state_dict().items())


def test_no_seed_of_a_score_or_another_training():
    from palimpsest.devtools import scoring
    from palimpsest.mini import samples, train_controlnet, train_instruct_pix2pix, train_seecoder, train_text_to_image

    own = range(train_towers.TRAIN_SEED, train_towers.TRAIN_SEED + train_towers.POOL)
    others = [train_text_to_image, train_seecoder, train_controlnet, train_instruct_pix2pix]
    assert all(other.TRAIN_SEED + 1_000_000 <= own.start for other in others) and own.stop < scoring.HELD_OUT
    assert train_towers.HELD_OUT >= max(scoring.VALIDATION, samples.FIRST_SEED) + 1_000_000


@pytest.fixture
def small(tmp_path, monkeypatch, tokens):
    monkeypatch.setattr(train, "ROOT", tmp_path)
    monkeypatch.setattr(train, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path / "weights")
    for name, value in (("POOL", 12), ("BATCH", 4), ("TESTED", 8)):
        monkeypatch.setattr(train_towers, name, value)
    began = {}
    monkeypatch.setattr(optim.Trainer, "progress", property(lambda trainer: (trainer.step - began.setdefault(id(trainer), trainer.step)) / 20))
    torch.manual_seed(0)
    state = {checkpoint.TEXT_PREFIX + name: value for name, value in new_text_encoder(tokens.unknown + 1).state_dict().items()}
    storage.write_weights(tmp_path / "weights" / "instruct_pix2pix.safetensors", {**state, "token_ids": torch.tensor(tokens.ids, dtype=torch.int32)}, {})
    return tmp_path


def test_the_towers_are_trained_and_load(small):
    assert train.main(["towers", "--minutes", "1", "--device", "cpu"]) == 0
    path = small / "weights" / towers.FILE
    state, metadata = storage.read_weights(path)
    assert metadata["recipe"] == "towers" and int(metadata["steps"]) == 21 and 0 <= float(metadata["caption_nearest"]) <= 1
    assert {"instruction_nearest", "direction_similarity", "direction_similarity_of_others", "final_loss"} <= metadata.keys()
    assert path.stat().st_size < 4e6
    assert towers.load_clip_vision(small / "weights").encode_image(torch.rand(1, 128, 128, 3))["image_embeds"].shape == (1, 128)
    projection, reason = direction.read_projection(str(path))
    assert torch.equal(projection, state["text_projection.weight"]) and reason == ""


def test_an_edit_model_of_other_words_is_refused(small):
    path = small / "weights" / "instruct_pix2pix.safetensors"
    state = storage.read_weights(path)[0]
    storage.write_weights(path, {**state, "token_ids": state["token_ids"][:-1]}, {})
    with pytest.raises(ValueError, match="trained with other words"):
        train.main(["towers", "--minutes", "1", "--device", "cpu"])
    path.unlink()
    with pytest.raises(ValueError, match="instruct_pix2pix.safetensors are missing"):
        train.main(["towers", "--minutes", "1", "--device", "cpu"])
