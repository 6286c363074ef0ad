"""Collect and preview nodes for attention maps and features: schema and wiring."""

import torch

from palimpsest.nodes.attention_maps import AttentionMapPreview, CollectAttentionMaps, CollectFeatures, FeaturePCAPreview
from palimpsest.tests.helpers.models import tiny_cond, tiny_sd15
from palimpsest.tests.helpers.prompts import WordClip
from palimpsest.tests.helpers.sampling import ksampler

PROMPT = "a cat on a sofa"


def defaults(node):
    return {item.id: item.default for item in node.define_schema().inputs if getattr(item, "default", None) is not None}


def test_ids_and_order_of_inputs_are_for_ever():
    nodes = (CollectAttentionMaps, AttentionMapPreview, CollectFeatures, FeaturePCAPreview)
    listed = {node.define_schema().node_id: [item.id for item in node.define_schema().inputs] for node in nodes}
    assert listed == {
        "PalimpsestCollectAttentionMaps": ["model", "clip", "prompt", "words", "layers", "start", "end"],
        "PalimpsestAttentionMapPreview": ["maps", "latent", "image", "columns"],
        "PalimpsestCollectFeatures": ["model", "layers", "what", "start", "end"],
        "PalimpsestFeaturePCAPreview": ["features", "latent", "image"],
    }


def test_from_collecting_to_the_sheets():
    model, clip = tiny_sd15(channel_mult=(1, 1, 1, 1)), WordClip()
    positive = clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT))
    watched, maps = CollectAttentionMaps.execute(model=model, clip=clip, **{**defaults(CollectAttentionMaps), "prompt": PROMPT, "words": "cat, a sofa"}).args
    watched, features = CollectFeatures.execute(model=watched, **{**defaults(CollectFeatures), "layers": "u1, u4"}).args
    out = ksampler(watched, torch.zeros(2, 4, 16, 16), positive, tiny_cond(seed=2))
    picture = torch.rand(2, 128, 128, 3)
    sheet, heat = AttentionMapPreview.execute(maps=maps, latent={"samples": out}, image=picture, columns=5).args
    assert sheet.shape[0] == 1 and sheet.shape[-1] == 3 and heat.shape == (4, 8, 8)
    assert torch.allclose(heat.amax((1, 2)), torch.ones(4))
    (pca,) = FeaturePCAPreview.execute(features=features, latent={"samples": out}, image=picture).args
    assert pca.shape[0] == 1 and pca.shape[-1] == 3 and float(pca.max()) <= 1
