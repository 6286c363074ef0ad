"""The flat blocks of the text diffuser against the tests' own formula and diffusers' modules."""

import comfy.ops
import pytest
import torch

from palimpsest.tests.helpers.models import randomise
from palimpsest.versatile_diffusion.fc_blocks import SLOTS, FCResBlock, flat_linear

OPS = comfy.ops.disable_weight_init


def seeded(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def built(block, dtype=torch.float64):
    randomise(block, 1)
    return block.to(dtype).eval().requires_grad_(False)


def group_norm(x, weight, bias, groups=32, eps=1e-5):
    """Mean and variance over each group of neighboring values of a flat vector [B, W]."""
    parts = x.reshape(len(x), groups, -1)
    normed = (parts - parts.mean(-1, keepdim=True)) / (parts.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    return normed.reshape(x.shape) * weight + bias


@pytest.mark.parametrize("channels, outputs", [(32, 32), (64, 32)])
def test_residual_block_by_formula(channels, outputs):
    block = built(FCResBlock(channels, 40, outputs, operations=OPS))
    state, time = seeded(3, channels, SLOTS, 1), seeded(3, 40, seed=2)
    w = dict(block.named_parameters())
    silu = lambda x: x / (1 + (-x).exp())
    # channel by channel, the slots of a channel next to each other
    flat = torch.stack([state[:, c, s, 0] for c in range(channels) for s in range(SLOTS)], 1)
    h = silu(group_norm(flat, w["in_layers.0.weight"], w["in_layers.0.bias"])) @ w["in_layers.2.weight"][:, :, 0, 0].T + w["in_layers.2.bias"]
    h = h + silu(time) @ w["emb_layers.1.weight"].T + w["emb_layers.1.bias"]
    h = silu(group_norm(h, w["out_layers.0.weight"], w["out_layers.0.bias"])) @ w["out_layers.3.weight"][:, :, 0, 0].T + w["out_layers.3.bias"]
    skip = flat @ w["skip_connection.weight"][:, :, 0, 0].T + w["skip_connection.bias"] if channels != outputs else flat
    out = block(state, time)
    assert out.shape == (3, outputs, SLOTS, 1) and ("skip_connection.weight" in w) is (channels != outputs)
    expected = (skip + h).reshape(3, outputs, SLOTS, 1)
    assert float((out - expected).norm() / expected.norm()) < 1e-10


@pytest.mark.parametrize("shape, outputs, slots", [((2, 50, 1, 1), 128, SLOTS), ((2, 32, SLOTS, 1), 128, SLOTS), ((2, 32, SLOTS, 1), 50, 1)])
def test_linear_layers_by_formula(shape, outputs, slots):
    """Stem, sampler and last layer; the weight and bias have no name of their own in the files."""
    layer = built(flat_linear(OPS)(shape[1] * shape[2], outputs, slots=slots))
    assert set(layer.state_dict()) == {"weight", "bias"}
    x = seeded(*shape)
    out = layer(x)
    assert out.shape == (2, outputs // slots, slots, 1)
    for c, s in ((0, 0), (outputs // slots - 1, slots - 1), (3, slots - 1)):
        row = layer.weight[c * slots + s].reshape(shape[1:])
        torch.testing.assert_close(out[:, c, s, 0], (x * row).sum((1, 2, 3)) + layer.bias[c * slots + s])


def test_memory_order_of_the_state_does_not_matter():
    block, linear = built(FCResBlock(32, 40, 64, operations=OPS)), built(flat_linear(OPS)(128, 128))
    state, time = seeded(2, 32, SLOTS, 1), seeded(2, 40, seed=2)
    turned = state.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    assert not turned.is_contiguous()
    assert torch.equal(block(turned, time), block(state, time)) and torch.equal(linear(turned), linear(state))


def test_weights_are_cast_where_the_host_casts():
    """With the host's casting layers the weights may be of another number format than the state."""
    block = FCResBlock(32, 40, 64, operations=comfy.ops.manual_cast, dtype=torch.float16)
    randomise(block, 1)
    out = block(seeded(2, 32, SLOTS, 1, dtype=torch.float32), seeded(2, 40, seed=2, dtype=torch.float32))
    assert out.dtype == torch.float32
    linear = flat_linear(comfy.ops.manual_cast)(128, 128, dtype=torch.float16)
    randomise(linear, 1)
    assert linear(seeded(2, 32, SLOTS, 1, dtype=torch.float32)).dtype == torch.float32


@pytest.mark.parametrize("channels, outputs", [(32, 32), (96, 32)])
def test_residual_block_as_diffusers(channels, outputs):
    flat = pytest.importorskip("diffusers.pipelines.deprecated.versatile_diffusion.modeling_text_unet")
    block = built(FCResBlock(channels, 40, outputs, operations=OPS))
    theirs = flat.ResnetBlockFlat(in_channels=channels, out_channels=outputs, temb_channels=40, eps=1e-5).double().eval()
    names = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}
    theirs.load_state_dict({f"{names[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": value for key, value in block.state_dict().items()}, strict=True)
    state, time = seeded(2, channels, SLOTS, 1), seeded(2, 40, seed=2)
    torch.testing.assert_close(block(state, time), theirs(state, time), rtol=1e-10, atol=1e-10)
