"""The recipe of the mini LoRA: who sees whom, what learns, and that its file loads through the host's own LoRA loader."""

import pytest
import torch

from palimpsest.mini import autoencoder, checkpoint, nets, optim, storage, tokens, train, train_strips
from palimpsest.mini.strips import ALONE, PANELS, TOGETHER, sample_strip
from palimpsest.tests.helpers.sampling import ksampler


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """Random weights in place of the shipped ones."""
    torch.manual_seed(0)
    words = tokens.GrammarTokens()
    unet, text = nets.new_unet(), nets.new_text_encoder(words.unknown + 1)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    named = {checkpoint.UNET_PREFIX + k: v for k, v in unet.state_dict().items()} | {checkpoint.TEXT_PREFIX + k: v for k, v in text.state_dict().items()}
    storage.write_weights(tmp_path / "text_to_image.safetensors", {**named, "token_ids": torch.tensor(words.ids, dtype=torch.int32)}, {})
    storage.write_weights(tmp_path / "autoencoder.safetensors", autoencoder.Autoencoder().state_dict(), {})
    for module in (checkpoint, train):
        monkeypatch.setattr(module, "WEIGHTS", tmp_path)
    return tmp_path


def attention(block, strips=2, tokens=16):
    torch.manual_seed(1)
    q, k, v = (torch.randn(strips * PANELS, tokens, 32) for _ in range(3))
    return (q, k, v), train_strips.StripAttention()(None, q, k, v, 8, transformer_options={"block": block})


def fused(q, k, v):
    q, k, v = (x.unflatten(-1, (8, 4)).transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_later_panels_see_the_first_ones_of_their_strip_and_themselves():
    (q, k, v), out = attention(("output", 8))
    for row in range(2 * PANELS):
        first = row - row % PANELS
        seen = [row] if row - first < ALONE else [row, *range(first, first + ALONE)]
        expected = fused(q[row:row + 1], *(torch.cat([x[i] for i in seen])[None] for x in (k, v)))
        assert torch.allclose(out[row:row + 1], expected, atol=1e-5)


@pytest.mark.parametrize("block", [("output", 2), ("input", 8), ("middle", 0)])
def test_other_layers_stay_apart(block):
    (q, k, v), out = attention(block)
    assert torch.allclose(out, fused(q, k, v), atol=1e-5)


def test_only_the_decoders_transformer_blocks_of_two_levels_learn():
    learn = [name for name, _ in nets.new_unet().named_parameters() if train_strips.is_trained(name)]
    # two attentions (q, k, v, out with bias), two layers of the feed-forward and three norms with bias
    assert {int(name.split(".")[1]) for name in learn} == set(range(3, 9)) and len(learn) == 6 * (2 * 5 + 4 + 6)
    assert all("transformer_blocks" in name for name in learn)


def matching(looks_at):
    """The matching loss of one strip of 1 token a panel per kind: later panels show object 1, object 2 and nothing; `looks_at` [3, 3 + 3 * ALONE] are their logits."""
    labels = torch.tensor([[[1, 0, 0], [0, 2, 0], *[[1, 2, 0]] * TOGETHER]])
    q = torch.eye(3)[None, None].expand(1, TOGETHER, -1, -1)
    return train_strips.matching_loss(q, 3**0.5 * looks_at.T[None, None].expand(1, TOGETHER, -1, -1), labels, heads=1)


def test_matching_is_right_where_objects_look_at_themselves_and_the_background_at_none():
    own, first = 3, 9
    right = torch.zeros(3, first)
    right[0, own + 0] = right[1, own + 4] = 30.0  # object 1 in the first panel, object 2 in the second
    right[2, 2] = 30.0  # the background at itself
    assert matching(right) < 1e-6
    swapped = right.clone()
    swapped[0], swapped[1] = right[1], right[0]
    assert matching(swapped) > 10
    staring = right.clone()
    staring[2, own] = 60.0
    assert matching(staring) > 5


def test_how_much_is_looked_at_the_first_panels_at_all_is_left_open():
    a, b = torch.zeros(3, 9), torch.zeros(3, 9)
    b[:2, :3] = 5.0  # both objects' tokens look at their own panel more
    assert torch.allclose(matching(a), matching(b))


def test_matching_has_a_gradient_without_holes():
    torch.manual_seed(2)
    labels = torch.randint(-1, 3, (2, PANELS, 16))
    q, k = torch.randn(2, TOGETHER, 16, 32, requires_grad=True), torch.randn(2, TOGETHER, 16 * (1 + ALONE), 32, requires_grad=True)
    loss = train_strips.matching_loss(q, k, labels, heads=8)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(q.grad).all() and torch.isfinite(k.grad).all() and q.grad.abs().max() > 0


def test_labels_tell_objects_by_their_shapes():
    panels = sample_strip(4).panels
    shapes = [obj.shape for obj in panels[-1].objects]
    alone = [set(train_strips.labels_of(panel, shapes).tolist()) for panel in panels[:ALONE]]
    together = set(train_strips.labels_of(panels[-1], shapes).tolist())
    assert {1} <= alone[0] <= {-1, 0, 1} and {2} <= alone[1] <= {-1, 0, 2} and {0, 1, 2} <= together


@pytest.mark.slow
def test_what_is_trained_loads_as_a_lora_and_changes_the_picture(shipped, monkeypatch, tmp_path):
    monkeypatch.setattr(train_strips, "POOL", 2)
    monkeypatch.setattr(train_strips, "BATCH", 1)
    monkeypatch.setattr(optim, "WARMUP", 1)
    monkeypatch.setattr(train, "ROOT", tmp_path)
    assert train.main(["strips", "--minutes", "0.05"]) == 0
    weights, metadata = storage.read_weights(shipped / "strips.safetensors")
    assert metadata["recipe"] == "strips" and all(key.startswith("lora_unet_output_blocks_") for key in weights)
    assert sum(2 * value.numel() for value in weights.values()) < 4_000_000
    model, _, _ = checkpoint.load("text_to_image")
    patched = checkpoint.with_lora(model, 1.0)
    # the host found a place for every tensor
    assert len(patched.patches) == len(weights) and not model.patches
    prompt, noise = [[torch.randn(1, 77, 128), {}]], torch.randn(1, 4, 16, 16)
    plain, changed, again = (ksampler(m, noise, prompt, prompt, steps=2, cfg=1.0) for m in (model, patched, model))
    assert torch.equal(plain, again) and not torch.equal(plain, changed)


def test_a_strange_model_is_refused_and_a_missing_file_named(shipped, tiny):
    storage.write_weights(shipped / "strips.safetensors", {"lora_unet_output_blocks_8_1_transformer_blocks_0_attn1_to_q.diff": torch.zeros(64, 64)}, {})
    with pytest.raises(ValueError, match="connect Mini Checkpoint") as refused:
        checkpoint.with_lora(tiny, 1.0)
    assert refused.value.args[0].count(". ") == 0
    (shipped / "strips.safetensors").unlink()
    with pytest.raises(ValueError, match="strips.safetensors"):
        checkpoint.with_lora(tiny, 1.0)


@pytest.fixture
def tiny():
    from palimpsest.tests.helpers.models import tiny_sdxl

    return tiny_sdxl()
