"""The mini family's image and text towers in the host's own classes."""

import pytest
import torch

from palimpsest.mini import checkpoint, storage, towers
from palimpsest.nodes.mini_towers import MiniTowers
from palimpsest.tests.helpers.towers import write_random_towers


def pictures(count=3):
    return torch.rand(count, 128, 128, 3, generator=torch.Generator().manual_seed(0))


def test_what_is_trained_is_what_the_host_computes(tmp_path):
    path = write_random_towers(tmp_path)
    state = storage.read_weights(path)[0]
    net = towers.Towers().eval()
    net.load_state_dict({(name if name in ("text_projection.weight", "logit_scale") else f"vision.{name}"): value for name, value in state.items()})
    with torch.inference_mode():
        # the host rounds to whole brightness steps first
        steps = (pictures() * 255).round() / 255
        expected = net.image_features(steps.movedim(-1, 1))
        found = towers.load_clip_vision(tmp_path).encode_image(steps)["image_embeds"]
    assert found.shape == (3, 128) and float((found - expected).norm() / expected.norm()) < 1e-4


def test_gradients_reach_everything():
    torch.manual_seed(0)
    net = towers.Towers()
    features = net.image_features(pictures().movedim(-1, 1)), net.text_features(torch.randn(3, 77, 128))
    (sum(feature.square().sum() for feature in features) * net.logit_scale).backward()
    assert all(parameter.grad is not None and bool(parameter.grad.abs().max() > 0) for parameter in net.parameters())


def test_the_file_stays_below_four_megabytes():
    assert sum(2 * value.numel() for value in towers.file_state(towers.Towers().state_dict()).values()) < 4e6


def test_the_node_gives_a_clip_vision_for_stock_nodes(tmp_path, monkeypatch):
    import nodes

    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path)
    write_random_towers(tmp_path)
    with torch.inference_mode():
        (clip_vision,) = MiniTowers.execute().args
        (output,) = nodes.CLIPVisionEncode().encode(clip_vision, pictures(1), "center")
    assert output["image_embeds"].shape == (1, 128)
    assert MiniTowers.fingerprint_inputs() and "towers" not in checkpoint.names()
    (tmp_path / towers.FILE).unlink()
    assert MiniTowers.fingerprint_inputs() == ""
    with pytest.raises(ValueError, match="towers.safetensors are missing"):
        MiniTowers.execute()


def test_other_weights_are_one_sentence(tmp_path):
    path = write_random_towers(tmp_path)
    for change in ({"visual_projection.weight": torch.ones(3, 3)}, {"visual_projection.weight": None}, {"vision_model.other": torch.ones(3)}):
        state = {**storage.read_weights(path)[0], **change}
        storage.write_weights(tmp_path / "changed" / towers.FILE, {name: value for name, value in state.items() if value is not None}, {})
        with pytest.raises(ValueError, match="towers.safetensors") as refused:
            towers.load_clip_vision(tmp_path / "changed")
        assert str(refused.value).endswith(".") and "\n" not in str(refused.value)
