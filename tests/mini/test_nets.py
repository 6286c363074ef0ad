"""Shapes of the UNet and the text encoder, and the training-time forward against the host's own."""
import pytest
import torch

from palimpsest.mini import nets


def test_the_unet_has_sd15s_layout():
    unet = nets.new_unet()
    assert (len(unet.input_blocks), len(unet.output_blocks)) == (12, 12)
    attention = [i for i, block in enumerate(unet.input_blocks) if any("SpatialTransformer" in type(layer).__name__ for layer in block)]
    assert attention == [1, 2, 4, 5, 7, 8]
    attention = [i for i, block in enumerate(unet.output_blocks) if any("SpatialTransformer" in type(layer).__name__ for layer in block)]
    assert attention == [3, 4, 5, 6, 7, 8, 9, 10, 11]
    heads = {layer.heads for layer in unet.modules() if type(layer).__name__ == "CrossAttention"}
    assert heads == {8}, "the host's SD15 class forces eight heads"


def test_an_untrained_unet_says_zero_and_has_no_empty_weights():
    """Regression: the host's layers are not initialised, they expect a checkpoint."""
    unet = nets.new_unet()
    assert all(torch.isfinite(p).all() and p.abs().max() < 10 for p in unet.parameters())
    with torch.inference_mode():
        out = unet(torch.randn(2, 4, 16, 16), torch.tensor([3.0, 900.0]), context=torch.randn(2, 77, nets.CONTEXT))
    assert out.shape == (2, 4, 16, 16) and out.abs().max() == 0


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return nets.new_text_encoder(100)


def test_text_states_are_the_encoders_own_forward(encoder):
    ids = torch.randint(0, 100, (3, 77), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = encoder(ids)[0]
        assert torch.allclose(nets.text_states(encoder, ids), expected, atol=2e-5)


def test_text_states_have_gradients_everywhere(encoder):
    nets.text_states(encoder, torch.arange(77)[None] % 100).square().sum().backward()
    missing = [name for name, p in encoder.named_parameters() if p.grad is None]
    assert all("text_projection" in name for name in missing)


@pytest.mark.parametrize("tokens, keys", [(64, 64), (64, 77), (4, 77)])
def test_the_attention_for_training_is_the_hosts(tokens, keys):
    from comfy.ldm.modules.attention import attention_pytorch

    q, k, v = (torch.randn(2, n, 32, generator=torch.Generator().manual_seed(n + i)) for i, n in enumerate((tokens, keys, keys)))
    expected = attention_pytorch(q, k, v, 8)
    assert torch.allclose(nets.attention_for_training(attention_pytorch, q, k, v, 8), expected, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        ours = nets.attention_for_training(attention_pytorch, q, k, v, 8)
    assert ours.dtype == torch.bfloat16 and ours.shape == expected.shape
    assert (ours.float() - expected).abs().max() < 0.03, "bf16 rounding, no more"


@pytest.mark.parametrize("capability, dtype", [("AVX512", torch.bfloat16), ("AVX2", torch.float32)])
def test_a_processor_without_bf16_products_trains_in_fp32(monkeypatch, capability, dtype):
    """Regression: without AVX-512 a convolution in bf16 took 30 times as long, and a training stood still."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    with nets.mixed_precision("cpu"):
        assert torch.nn.Linear(4, 4)(torch.ones(1, 4)).dtype == dtype


def test_the_attention_for_training_takes_the_hosts_mask():
    from comfy.ldm.modules.attention import attention_pytorch

    q = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.full((5, 5), -1e9).triu_(1)
    ours = nets.attention_for_training(attention_pytorch, q, q, q, 4, mask=mask)
    assert torch.allclose(ours, attention_pytorch(q, q, q, 4, mask=mask), atol=1e-5)
    assert not torch.allclose(ours, attention_pytorch(q, q, q, 4), atol=1e-2)
