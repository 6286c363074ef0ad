"""The authors' own values: masks as they load them, attention outputs, and whole guided batches."""

import json

import pytest
import torch
from safetensors.torch import load_file

from palimpsest.attention_patches.mrsa_attention import Reference, attend, blend_style, paper_rule, scaled_dot_product
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


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_of_both_rules(folder, about, name):
    stored, facts = load_file(folder / "attn" / f"{name}.safetensors"), about["attn"][name]
    masks, chosen = selections(stored, facts["weights"], facts["side"])
    for i, mask in enumerate(masks):
        # weighted or not, what is kept is the same
        assert torch.equal(mask.flatten() != 0, stored[f"keymask_{i}"] != 0)
    q, keys, values = (stored[key][None] for key in "qkv")
    n = q.shape[2]
    k, v = keys[:, :, :n], values[:, :, :n]
    refs = [Reference(*(side[:, :, n * (i + 1) : n * (i + 2)] for side in (keys, values)), selection) for i, selection in enumerate(chosen)]

    def flat(out):
        return out.transpose(1, 2).flatten(2)

    assert float((flat(attend(q, k, v, refs)) - stored["out_reference_code"]).abs().max()) < LIMIT
    # the formula itself, with what is switched off leaking in
    literal = scaled_dot_product(q, *paper_rule(k, v, refs, literal=True), None)
    assert float((flat(literal) - stored["out_paper_rule_own"]).abs().max()) < LIMIT
    assert float((stored["out_paper_rule_own"] - stored["out_reference_code"]).abs().max()) > 0.1


@pytest.mark.parametrize("name", GUIDED)
def test_whole_guided_batches(folder, about, name):
    """Rows: unconditional picture and references, then conditional ones; each half sees its own references."""
    stored, facts = load_file(folder / "cfg" / f"{name}.safetensors"), about["cfg"][name]
    heads, side, count = facts["heads"], facts["side"], facts["refs"]
    q, k, v = (stored[key].unflatten(0, (-1, heads)) for key in "qkv")
    _, chosen = selections(stored, facts["weights"], side)
    active = facts["step_window"][0] <= facts["step"] < facts["step_window"][1] and facts["layer"] in facts["layers"]
    plain = scaled_dot_product(q, k, v, None)
    out = plain.clone()
    for first, conditional in ((0, False), (1 + count, True)):
        row = slice(first, first + 1)
        refs = [Reference(k[first + 1 + i : first + 2 + i], v[first + 1 + i : first + 2 + i], chosen[i]) for i in range(count)]

        def mrsa(row=row, refs=refs):
            return attend(q[row], k[row], v[row], refs)

        if active:
            out[row] = mrsa() if conditional else blend_style(mrsa, lambda row=row: plain[row], float(facts["style_fidelity"]))
    assert float((out.transpose(1, 2).flatten(2) - stored["out"]).abs().max()) < LIMIT
    assert torch.equal(out, plain) is not active
