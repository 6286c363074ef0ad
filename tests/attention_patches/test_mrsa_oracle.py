"""The authors' own values: masks as they load them, attention outputs, and whole guided batches."""

import json

import pytest
import torch
from safetensors.torch import load_file

from palimpsest.attention_patches.mrsa_attention import CODE, References, attend, blend_style, paper_rule, pick
from palimpsest.attention_patches.mrsa_masks import PUBLISHED, SQUASH, fit, layer_mask, prepare_mask, select

LIMIT = 1e-5
ATTENTION = ("h2_s4_r1_w1", "h2_s8_r2_w3", "h2_s8_r2_w_zero", "h2_s8_r1_empty", "h2_s8_r1_full", "h8_s16_r3_w323")
GUIDED = ("sf0_on", "sf1_on", "sf1_r1", "sf1_step_off")


@pytest.fixture(scope="module")
def folder(oracles):
    return oracles / "mrsa"


@pytest.fixture(scope="module")
def about(folder):
    return json.loads((folder / "manifest.json").read_text())


@pytest.mark.parametrize("name", ["grey_300", "wide_512x300"])
def test_masks_are_equal(folder, name):
    stored = load_file(folder / "masks" / f"{name}.safetensors")
    grey = stored["image_u8"]
    chosen = fit(tuple(grey.shape), (512, 512), SQUASH)
    prepared = prepare_mask(grey / 255, chosen, PUBLISHED)  # 8 bits as the host's MASK holds them
    assert torch.equal(prepared, stored["loaded_u8_128"][0, 0].float()) and 0 < float(prepared.mean()) < 1
    sides = [int(key.rsplit("_", 1)[1]) for key in stored if key.startswith("weighted_w3_")]
    assert sorted(sides) == [8, 12, 16, 32, 64]
    for side in sides:
        assert torch.equal(select(layer_mask(prepared, (side, side), PUBLISHED), 3.0).weighted, stored[f"weighted_w3_{side}"])


def selections(stored, weights, side):
    masks = [layer_mask(stored[f"mask_{i}"][0, 0].float(), (side, side), PUBLISHED) for i in range(len(weights))]
    return masks, [select(mask, weight) for mask, weight in zip(masks, weights)]


def attention_of(heads):
    """A kernel without mask, on [rows, tokens, heads * dim]."""

    def attention(*given):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in given)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    return attention


def flat(tensor):
    """[rows, heads, tokens, dim] of the stored tensors -> [rows, tokens, heads * dim]."""
    return tensor.transpose(1, 2).flatten(2)


def composed(q, k, v, others, chosen, heads):
    """The shipped rule: others are keys and values of whole references."""
    picked = pick(chosen, CODE)
    references = References(picked.of([key for key, _ in others]), picked.of([value for _, value in others]), picked.weights)
    return attend(q, k, v, references, CODE, heads, attention_of(heads))


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_of_both_rules(folder, about, name):
    stored, facts = load_file(folder / "attn" / f"{name}.safetensors"), about["attn"][name]
    masks, chosen = selections(stored, facts["weights"], facts["side"])
    for i, mask in enumerate(masks):
        # weighted or not, what is kept is the same
        assert torch.equal(mask.flatten() != 0, stored[f"keymask_{i}"] != 0)
    q, keys, values = (stored[key][None] for key in "qkv")
    n, heads = q.shape[2], q.shape[1]
    k, v = flat(keys[:, :, :n]), flat(values[:, :, :n])
    others = [tuple(flat(side[:, :, n * (i + 1) : n * (i + 2)]) for side in (keys, values)) for i in range(len(chosen))]
    assert float((composed(flat(q), k, v, others, chosen, heads) - stored["out_reference_code"]).abs().max()) < LIMIT
    # the formula itself, with what is switched off leaking in
    whole = References(torch.cat([key for key, _ in others], 1), torch.cat([value for _, value in others], 1), torch.cat([selection.weighted for selection in chosen]))
    literal = attention_of(heads)(*paper_rule(flat(q), k, v, whole))
    assert float((literal - stored["out_paper_rule_own"]).abs().max()) < LIMIT
    assert float((stored["out_paper_rule_own"] - stored["out_reference_code"]).abs().max()) > 0.1


@pytest.mark.parametrize("name", GUIDED)
def test_whole_guided_batches(folder, about, name):
    """Rows: unconditional picture and references, then conditional ones; each half sees its own references."""
    stored, facts = load_file(folder / "cfg" / f"{name}.safetensors"), about["cfg"][name]
    heads, side, count = facts["heads"], facts["side"], facts["refs"]
    q, k, v = (flat(stored[key].unflatten(0, (-1, heads))) for key in "qkv")
    _, chosen = selections(stored, facts["weights"], side)
    active = facts["step_window"][0] <= facts["step"] < facts["step_window"][1] and facts["layer"] in facts["layers"]
    plain = attention_of(heads)(q, k, v)
    out = plain.clone()
    for first, conditional in ((0, False), (1 + count, True)):
        row = slice(first, first + 1)
        others = [(k[first + 1 + i : first + 2 + i], v[first + 1 + i : first + 2 + i]) for i in range(count)]

        def mrsa(row=row, others=others):
            return composed(q[row], k[row], v[row], others, chosen, heads)

        if active:
            out[row] = mrsa() if conditional else blend_style(mrsa, lambda row=row: plain[row], float(facts["style_fidelity"]))
    assert float((out - stored["out"]).abs().max()) < LIMIT
    assert torch.equal(out, plain) is not active
