"""The recipe of the mini Versatile Diffusion: what learns, what the pupil is shown and is to give, and that its file loads as a model of both flows."""

import json

import pytest
import torch

from palimpsest.mini import checkpoint, nets, optim, storage, towers, train, train_versatile as recipe
from palimpsest.mini.tokens import GrammarTokens
from palimpsest.mini.versatile import is_image_set
from palimpsest.tests.helpers.sampling import ksampler, latent_noise
from palimpsest.tests.helpers.towers import write_random_towers
from palimpsest.tests.helpers.versatile import context
from palimpsest.tests.helpers.versatile_mini import base_networks, write_random_family
from palimpsest.versatile_diffusion import contexts
from palimpsest.versatile_diffusion.model import unet_config


@pytest.fixture(scope="module")
def networks():
    return base_networks()


def blocks(unet):
    """Place, width, heads and width of a head of every spatial transformer."""
    from comfy.ldm.modules.attention import SpatialTransformer

    return {name: (m.in_channels, m.transformer_blocks[0].n_heads, m.transformer_blocks[0].d_head, m.use_linear, len(m.transformer_blocks))
            for name, m in unet.named_modules() if isinstance(m, SpatialTransformer)}


def test_the_set_for_pictures_starts_as_a_copy_and_learns_alone(networks):
    unet, _ = networks
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    net = recipe.new_unet(recipe.start_from(unet.state_dict()))
    state = net.state_dict()
    assert all(torch.equal(state[k], v) for k, v in before.items())
    twins = [k for k in state if k not in before]
    assert len(twins) == 16 * 26 and all(is_image_set(k) and torch.equal(state[k], before[k.replace(".image.", ".")]) for k in twins)
    assert {k for k, p in net.named_parameters() if p.requires_grad} == {k for k in twins if recipe.is_taught(k)}
    # copies, not views: training must not reach the set for texts
    with torch.no_grad():
        for name in twins:
            dict(net.named_parameters())[name].add_(1)
    assert all(torch.equal(net.state_dict()[k], v) for k, v in before.items())


def test_it_has_the_geometry_of_the_published_model_at_its_width(networks):
    import comfy.ops
    from palimpsest.versatile_diffusion.dual import DualUNet

    published = DualUNet(**unet_config(32, nets.CONTEXT), num_heads=8, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    own = recipe.new_unet(recipe.start_from(networks[0].state_dict()))
    assert blocks(published) == blocks(own) and len(blocks(own)) == 32
    assert {k: v.shape for k, v in published.state_dict().items()} == {k: v.shape for k, v in own.state_dict().items()}


@torch.inference_mode()
def test_contexts_are_those_of_the_node(tmp_path, monkeypatch):
    write_random_towers(tmp_path)
    tower = towers.load_clip_vision(tmp_path)
    made = recipe.precompute(tmp_path, tower, 3)
    assert made.shape == (3, 65, 128) and made.dtype == torch.float16
    drawn = recipe.pictures(recipe.base.TRAIN_SEED, 3)
    expected = contexts.encode_pictures(tower, drawn.movedim(1, -1).float() / 255)
    assert torch.allclose(made.float(), expected, atol=2e-3 * float(expected.abs().max()))
    assert float((expected[0] - expected[1]).abs().max()) > 0.01, "pictures differ"
    monkeypatch.setattr(recipe, "pictures", lambda *_: pytest.fail("drawn again"))
    assert torch.equal(recipe.precompute(tmp_path, tower, 3), made)
    write_random_towers(tmp_path, seed=1)
    with pytest.raises(pytest.fail.Exception, match="drawn again"):
        recipe.precompute(tmp_path, towers.load_clip_vision(tmp_path), 3)


def test_contexts_that_were_half_written_are_not_read(tmp_path, monkeypatch):
    def breaks(tensors, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    write_random_towers(tmp_path)
    tower = towers.load_clip_vision(tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr(recipe, "save_file", breaks)
        with pytest.raises(KeyboardInterrupt):
            recipe.precompute(tmp_path, tower, 2)
    assert recipe.precompute(tmp_path, tower, 2).shape == (2, 65, 128)


def test_the_factor_on_tokens_goes_into_the_weights(networks):
    """What is trained on lengthened contexts is what the file gives on plain ones, and a missing picture stays one."""
    state = recipe.start_from(networks[0].state_dict())
    own = {k: v for k, v in state.items() if is_image_set(k)}
    trained, kept = recipe.new_unet(state), recipe.new_unet({**state, **recipe.scaled(own, 7.0)})
    changed = [k for k in own if not torch.equal(trained.state_dict()[k], kept.state_dict()[k])]
    assert len(changed) == 2 * 16 and all(".attn2.to_" in k for k in changed)
    noisy, t, tokens = latent_noise(2, 4, 16, 16), torch.tensor([100.0, 900.0]), context(65, 1, 128, rows=2)
    words = context(77, 2, 128, rows=2)
    with torch.inference_mode():
        for ratio in (0.0, 0.3):
            given = [{"context": c, "vd_ratio": 0.0} if ratio == 0 else {"context": words, "vd_image": c, "vd_ratio": ratio} for c in (7 * tokens, tokens)]
            a, b = trained(noisy, t, **given[0]), kept(noisy, t, **given[1])
            assert float((a - b).norm() / b.norm()) < 1e-4
        zeros = torch.zeros_like(tokens)
        assert torch.equal(trained(noisy, t, context=zeros, vd_ratio=0.0), kept(noisy, t, context=zeros, vd_ratio=0.0))
        assert float((trained(noisy, t, context=tokens, vd_ratio=0.0) - kept(noisy, t, context=tokens, vd_ratio=0.0)).abs().max()) > 1e-3


def test_the_factor_makes_pictures_as_long_as_texts(networks):
    short = 0.01 * torch.randn(300, 65, 128, generator=torch.Generator().manual_seed(0))
    factor = recipe.measure(networks[1], GrammarTokens(), short.half())
    # final layer norm of start values: every token has a mean square of 1
    assert factor == pytest.approx(100, rel=0.02)
    assert recipe.measure(networks[1], GrammarTokens(), short[:5].half()) == pytest.approx(100, rel=0.02)


@pytest.fixture(scope="module")
def taught():
    """(UNet with both sets, its lesson)."""
    net = recipe.new_unet(recipe.start_from(base_networks()[0].state_dict()))
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


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Random members in tmp_path/weights; seven steps of small batches."""
    write_random_family(tmp_path / "weights")
    monkeypatch.setattr(train, "ROOT", tmp_path)
    for module in (checkpoint, train):
        monkeypatch.setattr(module, "WEIGHTS", tmp_path / "weights")
    for name, value in (("POOL", 6), ("BATCH", 4), ("WARMUP", 1)):
        monkeypatch.setattr(recipe, name, value)
    began = {}
    monkeypatch.setattr(optim.Trainer, "progress", property(lambda trainer: (trainer.step - began.setdefault(id(trainer), trainer.step)) / 6))
    return tmp_path


def run(*argv):
    assert train.main(["versatile", "--minutes", "1", "--device", "cpu", *argv]) == 0


def test_what_is_trained_loads_as_a_model_of_both_flows(small):
    weights = small / "weights"
    untouched = (weights / "text_to_image.safetensors").read_bytes()
    run()
    path = weights / "versatile.safetensors"
    state, metadata = storage.read_weights(path)
    assert path.stat().st_size <= 8_000_000 and all(is_image_set(k) for k in state)
    assert metadata["recipe"] == "versatile" and int(metadata["steps"]) == 7 and float(metadata["token_factor"]) > 1
    assert {"seed", "learning_rate", "batch", "device", "final_loss", "data_seed", "scenes", "apart", "dropout"} <= metadata.keys()
    assert (weights / "text_to_image.safetensors").read_bytes() == untouched

    base, model = checkpoint.load("text_to_image")[0], checkpoint.load("versatile")[0]
    before, after = base.model.diffusion_model.state_dict(), model.model.diffusion_model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items()), "all but the set for pictures is the base's"
    factor = float(metadata["token_factor"])
    start = {k: before[k.replace(".image.", ".")] * (factor if k.endswith(recipe.READERS) else 1) for k in after if is_image_set(k)}
    stayed = {k for k, v in start.items() if torch.allclose(after[k], v, rtol=1e-3, atol=1e-6)}
    assert {k for k in start if not recipe.is_taught(k)} <= stayed
    assert not [k for k in stayed if recipe.is_taught(k) and start[k].ndim > 1], "every matrix that is taught has learned"
    words, noise = [[context(77, 1, 128), {}]], latent_noise(1, 4, 16, 16)
    assert torch.equal(*(ksampler(m, noise, words, words, steps=2, cfg=1.0) for m in (base, model)))


@pytest.mark.slow
def test_it_goes_on_where_it_stopped_and_from_its_own_file(small, monkeypatch):
    run()
    counters = small / ".train" / "versatile" / "state.json"
    before = json.loads(counters.read_text())["step"]
    run()
    assert json.loads(counters.read_text())["step"] > before
    path = small / "weights" / "versatile.safetensors"
    shipped, metadata = storage.read_weights(path)
    seen = {}

    def kept(state):
        seen.update({k: v.clone() for k, v in state.items()})
        return new_unet(state)

    new_unet = recipe.new_unet
    monkeypatch.setattr(recipe, "new_unet", kept)
    monkeypatch.setattr(optim.Trainer, "resume", lambda trainer: pytest.fail("resumed"))
    run("--from-shipped", "--output", str(small / "other.safetensors"))
    factor = float(metadata["token_factor"])
    for key, value in shipped.items():
        own = seen[key[len(checkpoint.UNET_PREFIX):]]
        assert torch.allclose(own * (factor if key.endswith(recipe.READERS) else 1), value, rtol=1e-3, atol=1e-5)


def test_the_autoencoder_and_towers_are_needed(small):
    (small / "weights" / towers.FILE).unlink()
    with pytest.raises(ValueError, match="towers.safetensors are missing"):
        run()
    write_random_towers(small / "weights")
    (small / "weights" / "autoencoder.safetensors").unlink()
    with pytest.raises(ValueError, match="autoencoder.safetensors are missing"):
        run()
