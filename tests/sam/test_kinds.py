"""Which file is which SAM, by its tensors."""

import pytest
import torch

from palimpsest.sam.kinds import KINDS, recognise


def state(*names, **shapes):
    return {name: torch.empty(1, device="meta") for name in names} | {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def sam(width, blocks):
    own = [f"image_encoder.blocks.{i}.attn.qkv.weight" for i in range(blocks)]
    more = ["image_encoder.patch_embed.proj.weight", "image_encoder.neck.0.weight", "prompt_encoder.no_mask_embed.weight", "mask_decoder.iou_token.weight"]
    return state(*own, *more, **{"image_encoder.pos_embed": (1, 64, 64, width)})


@pytest.mark.parametrize("width, blocks, kind", [(768, 12, "vit_b"), (1024, 24, "vit_l"), (1280, 32, "vit_h")])
def test_the_kind_is_read_from_the_tensors(width, blocks, kind):
    wrong_name = f"sam_{next(name for name in KINDS.values() if name != kind)}.pth"
    assert recognise(sam(width, blocks), wrong_name) == kind


def test_an_encoder_of_another_size_is_refused_with_its_size():
    for width, blocks in ((384, 12), (768, 11), (1280, 24)):
        with pytest.raises(ValueError, match=f"has {blocks} blocks of {width} values, which is none of vit_b, vit_l, vit_h: choose sam_vit_b"):
            recognise(sam(width, blocks), "x.pth")


@pytest.mark.parametrize("words, others", [
    ("a SAM-HQ", sam(768, 12) | state("mask_decoder.hf_token.weight", "mask_decoder.compress_vit_feat.0.weight")),
    ("a SAM 2", state("image_encoder.trunk.pos_embed", "image_encoder.neck.convs.0.conv.weight", "sam_mask_decoder.iou_token.weight", "memory_attention.norm.weight")),
    ("a MobileSAM", sam(768, 12) | state("image_encoder.layers.0.blocks.0.conv1.c.weight", "image_encoder.patch_embed.seq.0.c.weight")),
    ("a SAM with another image encoder", state("image_encoder.backbone.stages.0.weight", "prompt_encoder.x", "mask_decoder.x")),
    ("a SAM in the format of transformers", state("vision_encoder.layers.0.attn.qkv.weight", "mask_decoder.iou_token.weight", "prompt_encoder.x")),
    ("a YOLO", state("model.0.conv.weight", "model.22.cv2.0.0.conv.weight")),
    ("a YOLO", state("model.model.0.conv.weight")),
    ("a Grounding DINO", state("module.transformer.level_embed", "module.bert.embeddings.x")),
    ("a CLIP vision model", state("vision_model.embeddings.class_embedding")),
    ("a CLIP vision model", state("visual.conv1.weight")),
    ("a whole checkpoint", state("model.diffusion_model.out.2.weight", "first_stage_model.x")),
    ("a LoRA", state("lora_unet_down_blocks.lora_up.weight")),
    ("parts of SAM are missing", {key: value for key, value in sam(768, 12).items() if not key.startswith("mask_decoder")}),
    ("its first tensor is called something", state("something")),
    ("it holds no tensor", {}),
])
def test_other_files_are_named(words, others):
    with pytest.raises(ValueError, match="The file other.pth is no SAM that this node can run") as error:
        recognise(others, "other.pth")
    assert words in str(error.value) and "\n" not in str(error.value) and "choose sam_vit_b_01ec64.pth" in str(error.value)


def test_a_position_without_axes_is_no_crash():
    broken = sam(768, 12) | {"image_encoder.pos_embed": torch.tensor(1.0)}
    with pytest.raises(ValueError, match="12 blocks of 0 values"):
        recognise(broken, "x.pth")
