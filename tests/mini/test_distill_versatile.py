"""The first part of the mini Versatile Diffusion's training: what the pupil is shown, what it is to give, and what learns."""
import pytest
import torch

from palimpsest.mini import checkpoint, distill_versatile as recipe, optim, storage, train, train_versatile
from palimpsest.mini.tokens import GrammarTokens
from palimpsest.mini.versatile import is_image_set
from palimpsest.tests.helpers.sampling import latent_noise
from palimpsest.tests.helpers.versatile import context
from palimpsest.tests.helpers.versatile_mini import base_networks, write_random_family


@pytest.fixture(scope="module")
def taught():
    """(UNet with both sets, its lesson)."""
    net = train_versatile.new_unet(train_versatile.start_from(base_networks()[0].state_dict()), recipe.is_taught)
    return net, recipe.Lesson(net)


def hidden_of(taught):
    net, lesson = taught
    words = context(77, 1, 128, rows=2)
    return lesson.run(net, latent_noise(2, 4, 16, 16), torch.tensor([900.0, 300.0]), words), words


@torch.inference_mode()
def test_what_the_teacher_gives_is_what_its_block_adds_in_the_unet(taught):
    net, lesson = taught
    added, hooks = [], []
    for pair in lesson.pairs:
        hooks.append(pair.register_forward_hook(lambda module, args, out: added.append(out - args[0])))
    hidden, words = hidden_of(taught)
    for hook in hooks:
        hook.remove()
    assert len(hidden) == len(added) == 16 and lesson.kept is None
    for given, expected in zip(lesson.taught(hidden, words), added):
        assert torch.allclose(given.reshape(expected.shape), expected, atol=1e-4 * float(expected.abs().max()))


def test_a_copy_that_reads_the_same_words_has_nothing_to_learn(taught):
    _, lesson = taught
    hidden, words = hidden_of(taught)
    wanted = lesson.taught(hidden, words)
    assert float(lesson.errors(hidden, words, wanted).max().detach()) == 0
    errors = lesson.errors(hidden, context(65, 3, 128, rows=2), wanted)
    assert errors.shape == (16,) and float(errors.min().detach()) > 0
    errors.sum().backward()
    missing = [name for name, p in taught[0].named_parameters() if (p.grad is not None) != recipe.is_taught(name)]
    assert not missing, "all that is taught has a gradient, nothing else"


def test_what_comes_before_the_cross_attention_is_not_taught(taught):
    names = {name for name, p in taught[0].named_parameters() if p.requires_grad}
    assert names and all(is_image_set(name) for name in names)
    assert not [name for name in names if any(part in name for part in ("norm1", "attn1", "proj_in", ".image.norm."))]


def test_rows_drive_the_unet_with_another_caption_half_of_the_time():
    g, apart, others = torch.Generator().manual_seed(0), 0, 0
    for _ in range(100):
        seen, told, drawn = recipe.draw_rows(g, 64, 16_000)
        assert ((drawn == seen) | (drawn == told)).all()
        apart += int((told != seen).sum())
        others += int(((told != seen) & (drawn == told)).sum())
    assert apart / 6400 == pytest.approx(recipe.APART, abs=0.03) and others / apart == pytest.approx(0.5, abs=0.03)


def test_a_full_caption_names_what_is_seen():
    tokens = GrammarTokens()
    rows = recipe.full_tokens(tokens, [3, 3, 4], torch.Generator().manual_seed(0))
    assert rows.shape == (3, 77) and not torch.equal(rows[0], rows[2])
    assert (rows != tokens.encode("")).sum(1).min() >= 6, "many words each"


def test_the_second_part_goes_on_from_the_first(tmp_path, monkeypatch, capsys):
    weights = tmp_path / "weights"
    write_random_family(weights)
    monkeypatch.setattr(train, "ROOT", tmp_path)
    for module in (checkpoint, train):
        monkeypatch.setattr(module, "WEIGHTS", weights)
    for module in (recipe, train_versatile):
        for name, value in (("POOL", 6), ("BATCH", 4), ("WARMUP", 1)):
            monkeypatch.setattr(module, name, value)
    began = {}
    monkeypatch.setattr(optim.Trainer, "progress", property(lambda trainer: (trainer.step - began.setdefault(id(trainer), trainer.step)) / 2))
    assert train.main(["versatile_distilled", "--minutes", "1", "--device", "cpu"]) == 0
    state, metadata = storage.read_weights(tmp_path / ".train" / "versatile_distilled" / "distilled.safetensors")
    assert metadata["recipe"] == "versatile_distilled" and all(is_image_set(k) for k in state)
    factor = float(metadata["token_factor"])
    base = storage.read_weights(weights / "text_to_image.safetensors")[0]
    for key, value in state.items():
        start = base[key.replace(".image.", ".")].float() * (factor if key.endswith(train_versatile.READERS) else 1)
        if recipe.is_taught(key) and value.ndim > 1:
            assert not torch.allclose(value.float(), start, rtol=1e-3, atol=1e-6), key
        elif not recipe.is_taught(key):
            assert torch.allclose(value.float(), start, rtol=1e-3, atol=1e-6), key
    begun = {}
    new_unet = train_versatile.new_unet
    monkeypatch.setattr(train_versatile, "new_unet", lambda given: begun.update({k: v.clone() for k, v in given.items()}) or new_unet(given))
    assert train.main(["versatile", "--minutes", "1", "--device", "cpu"]) == 0
    assert "distilled.safetensors" in capsys.readouterr().out
    for key, value in state.items():
        own = begun[key[len(checkpoint.UNET_PREFIX):]] * (factor if key.endswith(train_versatile.READERS) else 1)
        assert torch.allclose(own, value.float(), rtol=1e-3, atol=1e-5), key
