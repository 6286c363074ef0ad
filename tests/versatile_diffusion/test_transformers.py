"""Contexts against transformers' own towers, at toy size and wherever the tests run."""

import pytest
import torch

from palimpsest.tests.helpers.versatile import TEXT, TOWER, picture, relative, text_encoder, vision_network
from palimpsest.versatile_diffusion.contexts import encode_pixels

transformers = pytest.importorskip("transformers")
LIMIT = 1e-5


@pytest.fixture(scope="module")
def words():
    """Token ids of three prompts: short, empty, full."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (5, 0, 75):
        rows.append([49406, *torch.randint(0, 49000, (length,), generator=generator).tolist(), *[49407] * (76 - length)])
    return rows


@torch.inference_mode()
def test_text(words):
    torch.manual_seed(1)
    config = transformers.CLIPTextConfig(**TEXT, vocab_size=49408, max_position_embeddings=77, hidden_act="quick_gelu", bos_token_id=49406, eos_token_id=49407)
    theirs = transformers.CLIPTextModelWithProjection(config).eval()
    ours = text_encoder()
    assert not ours.transformer.load_state_dict(theirs.state_dict(), strict=False).missing_keys
    out = theirs(torch.tensor(words))
    expected = theirs.text_projection(out.last_hidden_state) / out.text_embeds.norm(dim=-1)[:, None, None]
    context, pooled = ours(words)
    assert relative(context, expected) < LIMIT and relative(pooled, out.text_embeds) < LIMIT


@torch.inference_mode()
def test_picture():
    torch.manual_seed(2)
    config = transformers.CLIPVisionConfig(**{key: value for key, value in TOWER.items() if key != "model_type"})
    theirs = transformers.CLIPVisionModelWithProjection(config).eval()
    ours = vision_network()
    ours.load_state_dict({key: value for key, value in theirs.state_dict().items() if not key.endswith("position_ids")})
    pixels = picture(224, 224, batch=2).movedim(-1, 1) * 3 - 1.5
    out = theirs(pixels)
    tokens = theirs.visual_projection(theirs.vision_model.post_layernorm(out.last_hidden_state))
    expected = tokens / out.image_embeds.norm(dim=-1)[:, None, None]
    assert relative(encode_pixels(ours, pixels), expected) < LIMIT
