"""The layer notation and its refusals."""

import pytest

from palimpsest.attention_patches.blocks import Point, architecture_name, attention_points, feature_points, parse_blocks, unet_layers
from palimpsest.tests.helpers.models import patcher, tiny_sd2, tiny_sdxl


@pytest.fixture(scope="module")
def layers(model):
    return unet_layers(model)


@pytest.fixture(scope="module")
def sdxl():
    return tiny_sdxl()


@pytest.fixture(scope="module")
def xl_layers(sdxl):
    return unet_layers(sdxl)


def test_names_of_the_families(model, sdxl):
    assert (architecture_name(model), architecture_name(tiny_sd2()), architecture_name(sdxl)) == ("SD1.x", "SD2.x", "SDXL")


def other_model(name):
    """A host model of another family; its weights are never looked at."""
    import comfy.model_base
    import comfy.supported_models as supported
    import torch

    small = {
        "Flux": (supported.Flux, dict(image_model="flux", in_channels=16, out_channels=16, vec_in_dim=8, context_in_dim=8, hidden_size=32, mlp_ratio=2.0,
                 num_heads=2, depth=1, depth_single_blocks=1, axes_dim=[4, 6, 6], theta=10000, patch_size=2, qkv_bias=True, guidance_embed=False)),
        "SD3": (supported.SD3, dict(in_channels=16, pos_embed_scaling_factor=None, depth=2, patch_size=2, num_patches=None, pos_embed_max_size=8,
                adm_in_channels=8, context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 8, "out_features": 128}})),
        "SVD_img2vid": None,
    }[name]
    if small is None:
        from palimpsest.tests.helpers.models import SD15_LAYOUT

        config = supported.SVD_img2vid({**SD15_LAYOUT, "model_channels": 64, "context_dim": 64, "in_channels": 8, "num_classes": "sequential", "adm_in_channels": 768,
                                        "use_temporal_attention": True, "use_temporal_resblock": True, "extra_ff_mix_layer": True, "use_spatial_context": True,
                                        "merge_strategy": "learned_with_images", "video_kernel_size": [3, 1, 1], "dtype": torch.float32})
        return patcher(comfy.model_base.SVD_img2vid(config))
    cls, unet = small
    return patcher(cls({**unet, "dtype": torch.float32}).get_model({}))


@pytest.mark.parametrize("name", ["Flux", "SD3", "SVD_img2vid"])
def test_other_families_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"the connected model is a {name} .*: connect a checkpoint") as error:
        architecture_name(other_model(name))
    assert str(error.value).count(". ") == 0, "one sentence"


@pytest.mark.parametrize(
    "text, blocks",
    [
        ("u1", [("output", 4)]),
        ("u0", [("output", 3)]),
        ("u8", [("output", 11)]),
        ("d0, d5", [("input", 1), ("input", 8)]),
        ("m0", [("middle", 0)]),
        ("d2,m0,u1-2", [("input", 4), ("middle", 0), ("output", 4), ("output", 5)]),
        ("output4 input7", [("output", 4), ("input", 7)]),
        ("U1.0", [("output", 4)]),
        ("u1,u1-1", [("output", 4)]),
        ("", []),
        ("preset none", []),
        ("Preset  Default", [("output", n) for n in range(4, 12)]),
        ("preset coarse", [("output", n) for n in range(4, 9)]),
    ],
)
def test_attention_layers_of_sd15(layers, text, blocks):
    assert attention_points(text, layers) == {Point("attn1", *block) for block in blocks}


@pytest.mark.parametrize("text, blocks", [("preset default", [("output", 4)]), ("u1,output0,m0", [("output", 4), ("output", 0), ("middle", 0)]), ("preset none", [])])
def test_feature_layers_of_sd15(layers, text, blocks):
    assert feature_points(text, layers) == {Point("resblock", *block) for block in blocks}


def test_sdxl_layers_have_several_transformer_blocks(xl_layers):
    assert attention_points("u0", xl_layers) == {Point("attn1", "output", 0, 0), Point("attn1", "output", 0, 1)}
    assert attention_points("u0.1", xl_layers) == {Point("attn1", "output", 0, 1)}
    assert len(attention_points("preset default", xl_layers)) == 6
    assert feature_points("preset default", xl_layers) == {Point("resblock", "output", 1)}


@pytest.mark.parametrize("text", ["x1", "u", "1", "u1-", "u3-1", "u1.3-2", "u1..2", "u-1", "output", "default", "u1;u2", "u\u0662"])
def test_what_cannot_be_read_is_named(layers, text):
    with pytest.raises(ValueError, match="Cannot read .* in the attention layers: write layers like"):
        attention_points(text, layers)


def test_sdxl_layer_names_on_sd15_are_refused(layers, xl_layers):
    with pytest.raises(ValueError, match="transformer block 5 of output4, but that layer of this SD1.x model has 1"):
        attention_points("u1.5", layers)
    with pytest.raises(ValueError, match='"ctrl-x" of the attention layers is for SDXL, but the connected model is SD1.x'):
        attention_points("preset ctrl-x", layers)
    with pytest.raises(ValueError, match="name u8, but this SDXL model has u0 to u5"):
        attention_points("u1-8", xl_layers)
    with pytest.raises(ValueError, match="m1, but this SD1.x model has only m0"):
        attention_points("m1", layers)


def test_blocks_without_the_wanted_layer_are_refused(layers):
    with pytest.raises(ValueError, match="output2, but that block of this SD1.x model has no attention"):
        attention_points("output2", layers)
    with pytest.raises(ValueError, match="input3, but this SD1.x model has no ResBlock there"):
        feature_points("input3", layers)
    with pytest.raises(ValueError, match="features are taken from ResBlocks"):
        feature_points("u1.0", layers)
    with pytest.raises(ValueError, match='no preset "best" .* choose one of coarse, ctrl-x, decoder, default, none'):
        attention_points("preset best", layers)


def test_points_sort_in_running_order():
    points = [Point("attn1", "output", 4, 0), Point("resblock", "output", 4), Point("attn1", "middle", 0), Point("attn1", "input", 8), Point("attn1", "output", 3, 1)]
    assert [(p.kind, p.part, p.number) for p in sorted(points, key=lambda p: p.order)] == [
        ("attn1", "input", 8),
        ("attn1", "middle", 0),
        ("attn1", "output", 3),
        ("resblock", "output", 4),
        ("attn1", "output", 4),
    ]


def test_items_of_the_notation():
    assert parse_blocks("d2.2-9,m0,u1-8") == (("d", 2, 2, 2, 9), ("m", 0, 0, None, None), ("u", 1, 8, None, None))
