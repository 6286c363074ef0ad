"""Names of all tensors in all four namings, at full size without memory."""

import pytest
import torch

from palimpsest.tests.helpers.checkpoints import SD15_UNET
from palimpsest.tests.helpers.versatile import image_shapes, key_table, text_shapes
from palimpsest.versatile_diffusion import keys
from palimpsest.versatile_diffusion.keys import DIFFUSERS, LDM, NAMINGS, OFFICIAL_2022, OFFICIAL_2023, Name

COUNTS = {OFFICIAL_2022: 1368, OFFICIAL_2023: 1368, DIFFUSERS: 1372, LDM: 1372}


@pytest.fixture(scope="module")
def whole():
    """Both diffusers on the meta device, under their ldm names."""
    shapes = {f"{part}.{key}": shape for part, table in (("image", image_shapes()), ("text", text_shapes())) for key, shape in table.items()}
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


@pytest.fixture(scope="module")
def tables(oracles):
    folder = oracles.parent / "reference"
    if not (folder / "vd_image_unet_keys.tsv").is_file():
        pytest.skip("no key tables beside the oracle tensors")
    return {part: key_table(folder, part) for part in keys.PARTS}


def test_sizes_of_the_model(whole):
    def size(part, group):
        return sum(value.numel() for key, value in whole.items() if key.startswith(part) and keys.group_of(key.split(".", 1)[1]) == group)

    assert size("image", "global") == 2_050_560
    assert size("image", "data") == 590_231_044 and size("text", "data") == 1_439_558_528
    assert size("image", "context") == size("text", "context") == 267_239_360


@pytest.mark.parametrize("source", NAMINGS)
@pytest.mark.parametrize("target", NAMINGS)
def test_every_naming_goes_to_every_other_and_back(whole, source, target):
    start = keys.convert(whole, LDM, source)
    assert len(start) == COUNTS[source]
    there = keys.convert(start, source, target)
    assert len(there) == COUNTS[target]
    back = keys.convert(there, target, source)
    assert back.keys() == start.keys(), "none missing, none left over"
    assert all(back[key].shape == start[key].shape for key in start)


@pytest.mark.parametrize("key, naming, expected", [
    ("model.diffusion_model.unet_image.output_blocks.2.1.conv.bias", OFFICIAL_2022, Name("image", "output_blocks.2.1.conv.bias")),
    ("model.diffusion_model.unet_text.output_blocks.2.1.weight", OFFICIAL_2022, Name("text", "output_blocks.2.1.weight")),
    ("model.diffusion_model.time_embed.2.bias", OFFICIAL_2022, Name("image", "time_embed.2.bias")),
    ("diffuser.image.time_embed.0.weight", OFFICIAL_2023, Name("image", "time_embed.0.weight")),
    ("diffuser.text.context_blocks.6.0.proj_in.weight", OFFICIAL_2023, Name("text", "middle_block.1.proj_in.weight")),
    ("diffuser.image.data_blocks.17.0.conv.weight", OFFICIAL_2023, Name("image", "output_blocks.2.1.conv.weight")),
    ("diffuser.image.data_blocks.29.0.2.bias", OFFICIAL_2023, Name("image", "out.2.bias")),
    ("diffuser.text.data_blocks.0.0.bias", OFFICIAL_2023, Name("text", "input_blocks.0.0.bias")),
    ("image_unet.down_blocks.2.downsamplers.0.conv.weight", DIFFUSERS, Name("image", "input_blocks.9.0.op.weight")),
    ("text_unet.down_blocks.2.downsamplers.0.weight", DIFFUSERS, Name("text", "input_blocks.9.0.weight")),
    ("text_unet.up_blocks.3.resnets.2.conv_shortcut.weight", DIFFUSERS, Name("text", "output_blocks.11.0.skip_connection.weight")),
    ("image_unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight", DIFFUSERS, Name("image", "middle_block.1.transformer_blocks.0.attn2.to_k.weight")),
    # saved from a dual pipeline
    ("image_unet.mid_block.attentions.0.transformers.1.norm.bias", DIFFUSERS, Name("text", "middle_block.1.norm.bias")),
    ("image_unet.mid_block.attentions.0.transformers.0.norm.bias", DIFFUSERS, Name("image", "middle_block.1.norm.bias")),
])
def test_names_spelled_out(key, naming, expected):
    assert keys.parse(key, naming) == expected
    if ".transformers." not in key:
        assert keys.write(expected, naming) == key


@pytest.mark.parametrize("key", [
    "betas", "alphas_cumprod_prev", "ctx.text.model.text_model.final_layer_norm.bias", "vae.image.decoder.conv_in.weight", "model.diffusion_model.input_blocks.0.0.weight",
    "diffuser.image.data_blocks.30.0.weight", "diffuser.image.context_blocks.16.0.norm.weight", "diffuser.text.time_embed.0.weight",
    "model.diffusion_model.unet_text.time_embed.0.bias",
    "diffuser.image.context_blocks.0.0.transformer_blocks.0.attn1.to_q.bias", "diffuser.image.data_blocks.3.0.weight", "diffuser.text.data_blocks.3.0.op.weight",
    "image_unet.conv_in.scale", "image_unet.down_blocks.0.resnets.0.norm3.weight", "image_unet.down_blocks.3.attentions.0.norm.weight",
    "text_unet.mid_block.resnets.2.norm1.weight",
])
def test_what_is_no_tensor_of_a_diffuser_is_left_out(key):
    assert all(keys.parse(key, naming) is None for naming in NAMINGS)


def test_names_of_the_image_diffuser_agree_with_the_host():
    """The host has a table of its own for diffusers' names of this layout."""
    import comfy.utils

    host = comfy.utils.unet_to_diffusers(SD15_UNET)
    ours = {keys.write(Name("image", key), DIFFUSERS): key for key in image_shapes()}
    assert len(ours) == 686
    assert all(host[key.removeprefix("image_unet.")] == ldm for key, ldm in ours.items())


@pytest.mark.parametrize("part", keys.PARTS)
def test_names_and_shapes_agree_with_the_reference_tables(tables, whole, part):
    assert len(tables[part]) == 686
    for row in tables[part]:
        name = Name(part, row["ldm_key"])
        assert "x".join(map(str, whole[f"{part}.{name.key}"].shape)) == row["shape"]
        assert keys.group_of(name.key) == row["group"]
        owner = Name("image", name.key) if row["group"] == "global" else name
        for naming, key in ((OFFICIAL_2022, row["official_2022_key"]), (OFFICIAL_2023, row["official_2023_key"])):
            assert keys.write(name, naming) == key and keys.parse(key, naming) == owner
        key = f"{part}_unet.{row['diffusers_key']}"
        assert keys.write(name, DIFFUSERS) == key and keys.parse(key, DIFFUSERS) == name


@pytest.mark.parametrize("part", keys.PARTS)
def test_names_and_shapes_agree_with_diffusers_own_modules(whole, part):
    """At full size on the meta device."""
    diffusers = pytest.importorskip("diffusers")
    sizes = {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8, "layers_per_block": 2}
    with torch.device("meta"):
        if part == "image":
            unet = diffusers.UNet2DConditionModel(**sizes)
        else:
            from diffusers.pipelines.deprecated.versatile_diffusion.modeling_text_unet import UNetFlatConditionModel

            unet = UNetFlatConditionModel(in_channels=(768, 1, 1), out_channels=(768, 1, 1), **sizes)
    theirs = {f"{part}_unet.{key}": value.shape for key, value in unet.state_dict().items()}
    ours = {keys.write(Name(part, key.split(".", 1)[1]), DIFFUSERS): value.shape for key, value in whole.items() if key.startswith(part)}
    assert theirs == ours and len(ours) == 686
