"""Recipes of the mini SeeCoder and ControlNet: what they write loads through the usual paths and has learned something."""

import numpy as np
import pytest
import torch

from palimpsest.mini import checkpoint, optim, storage, train, train_autoencoder, train_controlnet, train_seecoder, train_text_to_image
from palimpsest.mini.autoencoder import Autoencoder
from palimpsest.mini.scenes import masks, outline, sample_scene
from palimpsest.seecoder import loader
from palimpsest.tests.helpers.seecoder import random_picture, relative


def test_the_official_layout_carries_the_same_network():
    torch.manual_seed(0)
    net = train_seecoder.new_seecoder().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    picture = random_picture(128, 128)
    model = loader.from_state(train_seecoder.official_names(net), "mini.safetensors")
    assert model.sizes == train_seecoder.MINI
    with torch.inference_mode():
        assert relative(model.encode(picture), net(picture.movedim(-1, 1))) < 1e-5


def test_the_file_stays_below_four_megabytes():
    state = train_seecoder.official_names(train_seecoder.new_seecoder())
    assert sum(2 * tensor.numel() for tensor in state.values()) < 4e6


def test_the_controlnet_stays_below_nine_megabytes_and_starts_neutral():
    from palimpsest.mini.nets import new_unet

    torch.manual_seed(0)
    unet = new_unet()
    net = train_controlnet.new_controlnet(unet)
    assert sum(2 * p.numel() for p in net.parameters()) < 9e6
    assert torch.equal(net.input_blocks[1][0].in_layers[2].weight, unet.input_blocks[1][0].in_layers[2].weight), "a copy of the UNet's encoder"
    found = net(x=torch.randn(1, 4, 16, 16), hint=torch.rand(1, 3, 128, 128), timesteps=torch.tensor([500.0]), context=torch.randn(1, 77, 128))
    assert all(part.abs().max() == 0 for parts in found.values() for part in parts)


def test_labels_say_what_the_scenes_are():
    images, shares, labels = train_seecoder.draw(train_seecoder.TRAIN_SEED, 12)
    assert images.shape == (12, 3, 128, 128) and shares.shape == (12, 2, 16, 16)
    for i in range(12):
        scene = sample_scene(train_seecoder.TRAIN_SEED + i)
        for name, words in train_text_to_image.OF_SCENE.items():
            assert words[labels[name][i]] == getattr(scene, name)
        for j, obj in enumerate(scene.objects):
            assert all(words[labels[name][i, j]] == getattr(obj, name) for name, words in train_seecoder.OF_OBJECT.items())
            y, x = np.unravel_index(int(shares[i, j].argmax()), (16, 16))
            assert abs(8 * x + 4 - obj.cx) < obj.radius and abs(8 * y + 4 - obj.cy) < obj.radius
        if len(scene.objects) == 1:
            assert shares[i, 1].max() == 0


def test_the_reading_loss_is_small_for_right_answers_only():
    _, shares, labels = train_seecoder.draw(train_seecoder.TRAIN_SEED, 6)
    best, which = shares.max(1)
    tables = train_seecoder.OF_OBJECT | train_text_to_image.OF_SCENE
    parts = [torch.where(best > 0.4, 20.0, -20.0)[..., None]]
    rows = torch.arange(6)[:, None, None].expand_as(which)
    for name, words in tables.items():
        number = labels[name][rows, which] if name in train_seecoder.OF_OBJECT else labels[name][:, None, None].expand_as(which)
        parts.append(20.0 * torch.nn.functional.one_hot(number, len(words)))
    right = torch.cat(parts, -1)
    assert train_seecoder.reading_loss(right, shares, labels) < 1e-3
    assert train_seecoder.reading_loss(-right, shares, labels) > 10


def test_outlines_lie_on_the_border():
    scene = sample_scene(3, 2)
    lines, silhouettes = outline(masks(scene)), masks(scene)
    assert lines.shape == (128, 128) and set(np.unique(lines)) == {0.0, 1.0}
    assert (silhouettes.max(0)[lines > 0] > 0.5).all(), "inside the silhouettes"
    middle = scene.objects[0]
    assert lines[int(middle.cy), int(middle.cx)] == 0 and 0.005 < lines.mean() < 0.1
    edge = np.zeros((1, 128, 128), np.float32)
    edge[:, :10] = 1
    assert outline(edge)[:2].sum() == 256, "a silhouette cut off by the border is closed there"


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "ROOT", tmp_path)
    monkeypatch.setattr(train, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path / "weights")
    for module in (train_seecoder, train_controlnet):
        monkeypatch.setattr(module, "POOL", 100)
        monkeypatch.setattr(module, "BATCH", 2)
    monkeypatch.setattr(train_seecoder, "BACKBONE_BATCH", 4)
    monkeypatch.setattr(train_autoencoder, "POOL", 8)
    began = {}
    monkeypatch.setattr(optim.Trainer, "progress", property(lambda trainer: (trainer.step - began.setdefault(id(trainer), trainer.step)) / 3))
    torch.manual_seed(0)
    storage.write_weights(tmp_path / "weights" / "autoencoder.safetensors", Autoencoder().state_dict(), {})
    from palimpsest.mini.nets import new_text_encoder, new_unet
    from palimpsest.mini.tokens import GrammarTokens

    ids = GrammarTokens().ids
    state = {checkpoint.UNET_PREFIX + k: v for k, v in new_unet().state_dict().items()}
    state |= {checkpoint.TEXT_PREFIX + k: v for k, v in new_text_encoder(len(ids) + 1).state_dict().items()}
    # the UNet's last layer starts at zero and lets no gradient through
    state[checkpoint.UNET_PREFIX + "out.2.weight"] = 0.1 * torch.randn_like(state[checkpoint.UNET_PREFIX + "out.2.weight"])
    storage.write_weights(tmp_path / "weights" / "text_to_image.safetensors", {**state, "token_ids": torch.tensor(ids, dtype=torch.int32)}, {})
    return tmp_path


def test_the_seecoder_is_trained_in_two_parts(small):
    assert train.main(["seecoder_backbone", "--minutes", "1", "--device", "cpu"]) == 0
    backbone, _ = storage.read_weights(small / ".train" / "seecoder_backbone" / "backbone.safetensors")
    assert train.main(["seecoder", "--minutes", "1", "--device", "cpu"]) == 0
    file = small / "weights" / "seecoder.safetensors"
    state, metadata = storage.read_weights(file)
    assert metadata["recipe"] == "seecoder" and int(metadata["steps"]) > 0
    for name, tensor in backbone.items():
        assert torch.equal(tensor, state[f"ctx.image.imencoder.{name}"]), "the backbone is frozen in the second part"
    assert loader.load(str(file)).encode(random_picture(128, 128)).shape == (1, 148, 128)
    assert "seecoder" not in checkpoint.names() and "text_to_image" in checkpoint.names()


def test_the_controlnet_is_the_hosts(small):
    import comfy.controlnet

    assert train.main(["controlnet", "--minutes", "1", "--device", "cpu"]) == 0
    net = checkpoint.load_controlnet()
    assert isinstance(net, comfy.controlnet.ControlNet)
    assert any(parameter.abs().max() > 0 for parameter in net.control_model.zero_convs.parameters()), "it has learned"
    (small / "weights" / "controlnet.safetensors").unlink()
    with pytest.raises(ValueError, match="controlnet.safetensors are missing"):
        checkpoint.load_controlnet()


def test_noise_and_weights_are_the_base_models(monkeypatch):
    """All members learn at the same noise levels; a change of one recipe must not part them."""
    assert train_seecoder.base is train_text_to_image and train_controlnet.base is train_text_to_image
    abar = train_text_to_image.schedule()
    weights = train_text_to_image.weights_at(abar)
    assert torch.isfinite(weights).all() and (weights.diff() > 0).all(), "noisier levels count more"
    noise = train_text_to_image.draw_noise((400, 4, 8, 8), torch.Generator().manual_seed(0))
    assert noise.mean((2, 3)).std() == pytest.approx((1 / 64 + train_text_to_image.OFFSET_NOISE**2) ** 0.5, rel=0.1)
