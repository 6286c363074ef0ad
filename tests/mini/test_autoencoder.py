"""The autoencoder's contract with the host's VAE, and the quality of the shipped one."""
import pytest
import torch

from palimpsest.mini.autoencoder import SCALE, Autoencoder
from palimpsest.mini.checkpoint import WEIGHTS
from palimpsest.mini.storage import read_weights
from palimpsest.mini.train_autoencoder import mean_psnr, pictures


@pytest.mark.parametrize("height, width", [(128, 128), (64, 192), (8, 8), (136, 72)])
def test_latents_are_an_eighth_with_four_channels(height, width):
    net = Autoencoder().eval()
    with torch.inference_mode():
        latents = net.encode(torch.zeros(2, 3, height, width))
        assert latents.shape == (2, 4, height // 8, width // 8)
        assert net.decode(latents).shape == (2, 3, height, width)


def test_the_statistics_normalise_and_undo_each_other():
    net = Autoencoder().eval()
    x = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        plain, decoded = net.encode(x), net.decode(net.encode(x))
        net.mean.copy_(torch.tensor([1.0, -2, 0.5, 0]))
        net.std.copy_(torch.tensor([0.5, 2, 1, 3]))
        shifted = net.encode(x)
        assert torch.allclose(shifted * net.std[None, :, None, None] * SCALE + net.mean[None, :, None, None], plain * SCALE, atol=1e-5)
        assert torch.allclose(net.decode(shifted), decoded, atol=1e-4)


def test_it_runs_on_the_hosts_layers_with_the_same_keys():
    import comfy.ops

    own, host = Autoencoder(), Autoencoder(comfy.ops.manual_cast)
    host.load_state_dict(own.state_dict())
    x = torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.allclose(own.encode(x), host.encode(x), atol=1e-5)


def test_the_shipped_one_keeps_pictures():
    file = WEIGHTS / "autoencoder.safetensors"
    if not file.is_file():
        pytest.skip("mini/weights/autoencoder.safetensors is not there (python dev.py train autoencoder)")
    net = Autoencoder()
    weights, metadata = read_weights(file)
    net.load_state_dict(weights)
    held_out = pictures(60_000_000, 12)
    assert mean_psnr(net.eval(), held_out) > 27
    with torch.inference_mode():
        latents = net.encode(held_out.float() / 127.5 - 1) * SCALE
    assert 0.7 < latents.std() < 1.3 and latents.mean().abs() < 0.3, "latents at the scale of Stable Diffusion's"
    assert metadata["recipe"].startswith("autoencoder")
