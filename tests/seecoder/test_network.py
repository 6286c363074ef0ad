"""The network against tensors of the published code, against its own plain form, and against transformers' Swin."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from palimpsest.benchmarks._seecoder_explicit import Explicit
from palimpsest.seecoder.network import build, reading_biases
from palimpsest.seecoder.sizes import LEVELS, read_sizes, without_prefix
from palimpsest.tests.helpers.seecoder import random_picture, random_state, relative, small


def network(state):
    import comfy.ops

    plain = without_prefix(state)
    return build(plain, read_sizes(plain), comfy.ops.manual_cast)


def explicit(state, sizes):
    return Explicit(without_prefix(state), sizes.heads, sizes.depths, sizes.window)


@pytest.fixture(scope="module")
def oracle(oracles):
    folder = oracles / "seecoder" / "small"
    return network(load_file(folder / "weights.safetensors")), load_file(folder / "cases.safetensors")


@torch.inference_mode()
def test_every_part_equals_the_published_code(oracle):
    net, cases = oracle
    features = net.imencoder(cases["odd333x501.input"].movedim(-1, 1))
    maps = net.imdecoder(features)
    for level, feature, cells in zip(LEVELS, features, maps):
        assert relative(feature.permute(0, 3, 1, 2), cases[f"odd333x501.backbone.{level}"]) < 5e-6
        expected = cases[f"odd333x501.decoder.{level}"]
        assert relative(cells.transpose(1, 2).reshape(expected.shape), expected) < 5e-6


@torch.inference_mode()
@pytest.mark.parametrize("case", ["odd333x501", "p384x640"])
def test_the_tokens_equal_the_published_codes(oracle, case):
    net, cases = oracle
    assert relative(net(cases[f"{case}.input"].movedim(-1, 1)), cases[f"{case}.output"]) < 5e-6


@torch.inference_mode()
@pytest.mark.parametrize("position", [False, True])
@pytest.mark.parametrize("height, width", [(1, 1), (17, 200), (96, 160), (191, 95), (200, 200)])
def test_both_variants_equal_the_plain_form_at_odd_sizes(position, height, width):
    sizes = small(position)
    state = random_state(sizes, seed=3)
    pixels = random_picture(height, width).movedim(-1, 1)
    assert relative(network(dict(state))(pixels), explicit(state, sizes)(pixels)) < 5e-6


@torch.inference_mode()
def test_an_odd_window_and_other_depths_are_read_from_the_shapes():
    sizes = small(window=5, depths=(1, 2, 3, 1), decoder_layers=3, query_layers=6, queries=20)
    state = random_state(sizes, seed=1)
    assert read_sizes(without_prefix(state)) == sizes
    pixels = random_picture(90, 130).movedim(-1, 1)
    out = network(dict(state))(pixels)
    assert out.shape == (1, 20, 96) and relative(out, explicit(state, sizes)(pixels)) < 5e-6


@torch.inference_mode()
def test_pictures_of_a_batch_do_not_touch_each_other():
    net = network(random_state(small(True)))
    pixels = random_picture(70, 110, batch=3).movedim(-1, 1)
    batch = net(pixels)
    for i in range(3):
        assert relative(batch[i:i + 1], net(pixels[i:i + 1])) < 1e-6


@torch.inference_mode()
def test_large_pictures_go_through_in_parts_with_the_same_result(monkeypatch):
    from palimpsest.seecoder import decoder, swin

    net, pixels = network(random_state(small())), random_picture(150, 100).movedim(-1, 1)
    whole = net(pixels)
    for module in (swin, decoder):
        monkeypatch.setattr(module, "TOKENS_AT_ONCE", 50)
    assert relative(net(pixels), whole) < 2e-6


@torch.inference_mode()
@pytest.mark.parametrize("height, width", [(128, 192), (101, 77)])
def test_the_backbone_is_transformers_swin(height, width):
    from transformers import SwinBackbone, SwinConfig

    sizes = small()
    state = without_prefix(random_state(sizes, seed=4))
    config = SwinConfig(embed_dim=32, depths=list(sizes.depths), num_heads=list(sizes.heads), window_size=6, out_features=["stage2", "stage3", "stage4"],
                        image_size=64, layer_norm_eps=1e-5, hidden_act="gelu")
    theirs = SwinBackbone(config).eval()
    taken = {}
    for name, parameter in theirs.state_dict().items():
        ours = translate(name, state)
        if ours is not None:
            assert ours.shape == parameter.shape, name
            taken[name] = ours
    missing = theirs.load_state_dict(taken, strict=False).missing_keys
    # buffers that older versions store, and a last norm that the backbone does not use
    assert all("relative_position_index" in name or name in ("swin.layernorm.weight", "swin.layernorm.bias") for name in missing), missing
    pixels = random_picture(height, width).movedim(-1, 1)
    for mine, other in zip(network(random_state(sizes, seed=4)).imencoder(pixels), theirs(pixels).feature_maps):
        assert relative(mine.permute(0, 3, 1, 2), other) < 5e-6


def translate(name, state):
    """The tensor of ours that belongs to a name of transformers 4 or 5, None where there is none."""
    import re

    name = name.removeprefix("swin.").replace(".attention.self.", ".attention.").replace(".relative_position_bias.relative", ".relative")
    for old, new in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("attention.output.dense", "attention.o_proj"), ("intermediate.dense", "mlp.fc1")):
        name = name.replace(f".{old}.", f".{new}.")
    name = re.sub(r"(blocks\.\d+)\.output\.dense", r"\1.mlp.fc2", name)
    if match := re.fullmatch(r"encoder\.(layers\.\d+\.blocks\.\d+)\.attention\.([qkv])_proj\.(weight|bias)", name):
        return state[f"imencoder.{match[1]}.attn.qkv.{match[3]}"].chunk(3)["qkv".index(match[2])]
    if match := re.fullmatch(r"hidden_states_norms\.stage(\d)\.(weight|bias)", name):
        return state[f"imencoder.norm{int(match[1]) - 1}.{match[2]}"]
    name = name.replace("embeddings.patch_embeddings.projection", "patch_embed.proj").replace("embeddings.norm", "patch_embed.norm")
    name = name.replace("attention.o_proj", "attn.proj").replace("attention.relative", "attn.relative").replace("layernorm_before", "norm1").replace("layernorm_after", "norm2")
    return state.get("imencoder." + name.removeprefix("encoder."))


@torch.inference_mode()
def test_what_is_read_sums_to_one_and_leaves_the_tokens_alone():
    net, pixels = network(random_state(small(True))), random_picture(100, 60).movedim(-1, 1)
    reading = []
    out = net(pixels, reading=reading)
    assert torch.equal(out, net(pixels))
    assert [(level, tuple(maps.shape)) for level, maps in reading] == [("res3", (1, 148, 13, 8)), ("res4", (1, 148, 7, 4)), ("res5", (1, 148, 4, 2))]
    for _, maps in reading:
        assert torch.allclose(maps.sum((2, 3)), torch.ones(1, 148), atol=1e-4)


@torch.inference_mode()
def test_cells_outside_the_mask_are_not_read():
    net, picture = network(random_state(small())), random_picture(96, 96)
    coverage = torch.zeros(1, 96, 96)
    coverage[:, :, :48] = 1
    reading = []
    masked = net(picture.movedim(-1, 1), coverage, reading)
    for _, maps in reading:
        half = maps.shape[-1] // 2
        assert maps[..., half + 1:].abs().max() == 0 and maps[..., :half].sum() > 0
    assert relative(masked, net(picture.movedim(-1, 1))) > 0.01
    assert torch.equal(net(picture.movedim(-1, 1), torch.ones(1, 96, 96)), net(picture.movedim(-1, 1))), "a white mask is no mask"


def test_a_spot_smaller_than_a_cell_still_speaks():
    coverage = torch.zeros(2, 64, 64)
    coverage[0, 3, 60] = 1
    coverage[1, :32] = 1
    bias = reading_biases(coverage, (2, 2), 32)
    assert bias.shape == (2, 1, 1, 4)
    assert torch.isfinite(bias[0, 0, 0]).tolist() == [False, True, False, False]
    assert torch.isfinite(bias[1, 0, 0]).tolist() == [True, True, False, False]


def test_cells_of_the_mask_are_the_networks_cells():
    """Regression: the picture was stretched over the grid, although cells have a fixed size and the last ones reach over the border."""
    coverage = torch.zeros(1, 40, 333)
    coverage[:, :, 304:] = 1
    bias = reading_biases(coverage, (2, 11), 32)[0, 0, 0].view(2, 11)
    # column 9 covers 288 to 319, half of it white; column 10 reaches from 320 to 351, 13 pixels of it inside
    assert torch.isfinite(bias).tolist() == [[False] * 9 + [True, True]] * 2


@torch.inference_mode()
def test_fused_attention_gets_its_bias_in_the_features_own_format(monkeypatch):
    """Regression: in half precision the shifted windows' bias was float32, which fused attention on CUDA refuses."""
    import comfy.ldm.modules.attention as attention

    fused, seen = attention.attention_pytorch, []

    def watch(q, k, v, heads, mask=None, **kwargs):
        seen.append(mask is None or mask.dtype == q.dtype)
        return fused(q, k, v, heads, mask=mask, **kwargs)

    monkeypatch.setattr(attention, "attention_pytorch", watch)
    net = network(random_state(small(True))).half()
    net(random_picture(100, 60).movedim(-1, 1).half(), torch.ones(1, 100, 60))
    assert all(seen) and len(seen) > 20


def test_every_step_is_counted():
    net, calls = network(random_state(small())), []
    with torch.inference_mode():
        net(random_picture(40, 40).movedim(-1, 1), tick=lambda: calls.append(0))
    assert len(calls) == sum(net.sizes.depths) + 3 + net.sizes.query_layers


def test_the_names_are_the_official_ones(root):
    """The tables list every key of the official files with its shape; they lie beside the checkout in development."""
    tables = root.parent / "shared" / "reference"
    if not tables.is_dir():
        pytest.skip("the key tables are not here")
    from palimpsest.seecoder.sizes import expected_shapes
    from palimpsest.tests.helpers.seecoder import OFFICIAL

    for name, position in (("seecoder_keys.tsv", False), ("seecoder_pa_keys.tsv", True)):
        lines = [line.split("\t") for line in (tables / name).read_text().splitlines() if "imencoder" in line or "imdecoder" in line or "qtransformer" in line]
        listed = {line[0].removeprefix("ctx.image."): tuple(int(n) for n in line[1].strip("()[] ").replace("x", ",").split(",") if n.strip()) for line in lines}
        listed = {key: shape for key, shape in listed.items() if not key.endswith("relative_position_index")}
        assert listed == expected_shapes(replace(OFFICIAL, position=position))
