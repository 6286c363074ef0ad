"""Multi-reference self-attention against the textbook masked softmax, in float64."""

import math

import pytest
import torch

from palimpsest.attention_patches.mrsa_attention import (
    CODE, PAPER, Reference, attend, blend_style, code_rule, fold_bias, paper_inputs, paper_rule, scaled_dot_product,
)
from palimpsest.attention_patches.mrsa_masks import select
from palimpsest.attention_patches.rewrites import shared_self_attention

LIMIT = 1e-10
ROWS, HEADS, DIM = 3, 4, 10
OWN = (4, 6)  # tokens of the picture, height and width
SIZES = ((4, 6), (5, 3), (2, 2))  # of the references, whose size may differ


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def relative(a, b):
    return float((a - b).norm() / b.norm())


def masks(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.rand(size, generator=generator) > 0.5).double() for size in SIZES]


@pytest.fixture
def own():
    n = OWN[0] * OWN[1]
    return tuple(random(ROWS, HEADS, n, DIM, seed=seed) for seed in (1, 2, 3))


def references(weights, chosen=None, rows=1, dtype=torch.float64):
    out = []
    for i, (mask, weight) in enumerate(zip(chosen or masks(), weights)):
        k, v = (random(rows, HEADS, mask.numel(), DIM, seed=10 * i + seed, dtype=dtype) for seed in (20, 21))
        out.append(Reference(k, v, select(mask, weight)))
    return out


def textbook(q, k, v, refs, chosen, weights, rule):
    """The rules as they are written: the whole map, the masked-out tokens in it."""
    scale = DIM**-0.5
    logits = [q @ k.transpose(-1, -2) * scale]
    for reference, mask, weight in zip(refs, chosen, weights):
        block = q @ reference.k.transpose(-1, -2) * scale
        weighted = mask.flatten() * weight
        if rule == CODE:
            block = torch.where(weighted == 0, torch.full_like(block, -math.inf), block + weighted)
        else:
            block = block * weighted
        logits.append(block)
    values = torch.cat([v, *(reference.v.expand(len(v), -1, -1, -1) for reference in refs)], 2)
    return torch.cat(logits, -1).softmax(-1) @ values


@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize("rule", [CODE, PAPER])
@pytest.mark.parametrize("weights", [(3.0,), (1.0, 1.0), (3.0, 2.0, 3.0), (-1.5, 2.5, 0.5)])
def test_both_rules_are_the_textbook_masked_softmax(own, weights, rule, rows):
    refs, chosen = references(weights, rows=rows), masks()
    expected = textbook(*own, refs, chosen, weights, rule)
    assert relative(attend(*own, refs, rule), expected) < LIMIT
    assert relative(scaled_dot_product(*own, None), expected) > 0.01
    assert relative(textbook(*own, refs, chosen, weights, PAPER if rule == CODE else CODE), expected) > 0.01


def test_a_weight_multiplies_the_share_of_the_kept_tokens(own):
    """The factor on the softmax mass before it is normalised is e to the weight, so the odds of the reference grow by it."""
    q, k, _ = own
    chosen = masks()[:1]

    def share(weight):
        reference = references((weight,), chosen)[0]
        ones = Reference(reference.k, torch.ones_like(reference.v), reference.selection)
        return attend(q, k, torch.zeros_like(k), [ones])

    one, three = share(1.0), share(3.0)
    assert torch.allclose(three / (1 - three) / (one / (1 - one)), torch.full_like(one, math.exp(2)), rtol=1e-9)


def test_masked_out_tokens_are_dropped_and_kept_ones_come_in_order(own):
    q, k, v = own
    refs = references((3.0, 2.0))
    keys, values, bias = code_rule(k, v, refs)
    kept = [int(mask.sum()) for mask in masks()[:2]]
    assert keys.shape[2] == values.shape[2] == bias.shape[-1] == k.shape[2] + sum(kept) and bias.shape[:3] == (1, 1, 1)
    assert bias.flatten().tolist() == [0.0] * k.shape[2] + [3.0] * kept[0] + [2.0] * kept[1]
    first = masks()[0].flatten().bool()
    assert torch.equal(keys[:, :, : k.shape[2]], k) and torch.equal(keys[1, :, k.shape[2] : k.shape[2] + kept[0]], refs[0].k[0][:, first])


def test_grey_masks_weigh_their_tokens(own):
    grey = [torch.rand(SIZES[0], generator=torch.Generator().manual_seed(3)).double() * (masks()[0] > 0)]
    refs = references((2.0,), grey)
    # weights of a mask are float32
    assert relative(attend(*own, refs), textbook(*own, refs, grey, (2.0,), CODE)) < 1e-6


@pytest.mark.parametrize("channels", [1, 6])
@pytest.mark.parametrize("weights", [(3.0, 2.0), (-4.0, 1.0)])
def test_the_bias_fits_into_extra_channels(own, weights, channels):
    """For kernels without a mask, which divide by the root of the width they get."""
    q, k, v = own
    refs = references(weights)
    folded = fold_bias(q, *code_rule(k, v, refs), channels)
    assert folded[0].shape[-1] == folded[1].shape[-1] == folded[2].shape[-1] == DIM + channels
    out = torch.nn.functional.scaled_dot_product_attention(*folded)
    assert relative(out[..., :DIM], textbook(q, k, v, refs, masks(), weights, CODE)) < LIMIT
    assert not out[..., DIM:].any()


@pytest.mark.parametrize("rule", [CODE, PAPER])
def test_weight_zero_and_empty_masks_are_exactly_the_plain_attention(own, rule):
    q, k, v = own
    plain = scaled_dot_product(q, k, v, None)
    called = []

    def attention(*given):
        called.append(given)
        return scaled_dot_product(*given)

    off = [[], references((0.0, 0.0)), references((3.0, 2.0), [mask * 0 for mask in masks()]), references((0.0, 3.0), [masks()[0], masks()[1] * 0])]
    for refs in off:
        assert torch.equal(attend(q, k, v, refs, rule, attention), plain)
        assert called[-1][1] is k and called[-1][2] is v and called[-1][3] is None, "the call the host would have made"
    # one that is off leaves the others as they are alone
    on = references((0.0, 3.0))
    assert torch.equal(attend(q, k, v, on, rule), attend(q, k, v, on[1:], rule)) and not torch.equal(attend(q, k, v, on, rule), plain)


def test_the_literal_paper_rule_lets_masked_out_tokens_leak_in(own):
    q, k, v = own
    refs = references((3.0,), [masks()[0] * 0])
    expected = textbook(q, k, v, refs, [masks()[0] * 0], (3.0,), PAPER)
    assert relative(scaled_dot_product(q, *paper_rule(k, v, refs, literal=True), None), expected) < LIMIT
    assert relative(scaled_dot_product(q, k, v, None), expected) > 0.01


def test_an_unknown_rule_is_refused(own):
    with pytest.raises(ValueError, match='no rule "sum" for reference weights: choose one of code, paper'):
        attend(*own, [], "sum")


class Projections:
    """to_q, to_k, to_v of one attention, without bias, as in SD."""

    width = HEADS * DIM

    def __init__(self):
        self.weights = [random(self.width, self.width, seed=seed) / self.width**0.5 for seed in (1, 2, 3)]

    def __call__(self, *inputs):
        return [(tokens @ weight.T).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for tokens, weight in zip(inputs, self.weights)]


@pytest.mark.parametrize("weights", [(3.0, 2.0), (-1.5, 0.0)])
def test_the_paper_rule_can_be_done_on_attention_inputs(weights):
    project, chosen = Projections(), masks()[:2]
    own = random(ROWS, 24, Projections.width, seed=4)
    tokens = [random(1, mask.numel(), Projections.width, seed=5 + i) for i, mask in enumerate(chosen)]
    selections = [select(mask, weight) for mask, weight in zip(chosen, weights)]
    context, value = paper_inputs(own, own, list(zip(tokens, selections)))
    found = scaled_dot_product(*project(own, context, value), None)
    q, k, v = project(own, own, own)
    refs = [Reference(*project(t, t, t)[1:], selection) for t, selection in zip(tokens, selections)]
    used = [i for i, weight in enumerate(weights) if weight]
    expected = textbook(q, k, v, [refs[i] for i in used], [chosen[i] for i in used], [weights[i] for i in used], PAPER)
    assert relative(found, expected) < LIMIT
    if all(weights):
        # the rewrite that PnP's and P2P's stand beside, for one block of tokens
        joined = torch.cat([t.expand(ROWS, -1, -1) for t in tokens], 1)
        _, keys, values = shared_self_attention(own, joined, torch.cat([selection.weighted for selection in selections]))
        assert torch.equal(context, keys) and torch.equal(value, values)


def test_inputs_that_another_edit_has_changed_apart_stay_so():
    own, other = random(1, 24, 8, seed=1), random(1, 24, 8, seed=2)
    tokens = random(1, 24, 8, seed=3)
    context, value = paper_inputs(own, other, [(tokens, select(masks()[0], 2.0))])
    assert torch.equal(context[:, :24], own) and torch.equal(value, torch.cat([other, tokens], 1))
    assert torch.equal(context[:, 24:], tokens * 2 * masks()[0].flatten()[:, None])
    same = paper_inputs(own, other, [(tokens, select(masks()[0], 0.0))])
    assert same[0] is own and same[1] is other


@pytest.mark.parametrize("fidelity", [0.0, 0.25, 0.5, 1.0])
def test_style_fidelity_blends_the_unconditional_output(own, fidelity):
    refs, chosen = references((3.0, 2.0)), masks()
    asked = []

    def mrsa():
        asked.append("references")
        return attend(*own, refs)

    def plain():
        asked.append("plain")
        return scaled_dot_product(*own, None)

    q, k, v = own
    ordinary = (q @ k.transpose(-1, -2) / DIM**0.5).softmax(-1) @ v
    expected = (1 - fidelity) * textbook(*own, refs, chosen, (3.0, 2.0), CODE) + fidelity * ordinary
    assert relative(blend_style(mrsa, plain, fidelity), expected) < LIMIT
    assert asked == {0.0: ["references"], 1.0: ["plain"]}.get(fidelity, ["references", "plain"]), "nothing is computed for nothing"


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("rule", [CODE, PAPER])
def test_references_take_the_dtype_of_the_call(own, rule, dtype, limit):
    """Stored features may be of another precision than the call, and the bias of the mask is float32."""
    weights = (3.0, 2.0)
    expected = textbook(*own, references(weights), masks(), weights, rule)
    cast = tuple(tensor.to(dtype) for tensor in own)
    out = attend(*cast, references(weights, dtype=torch.float32), rule)
    assert out.dtype == dtype and relative(out.double(), expected) < limit
    if rule == CODE:
        folded = fold_bias(cast[0], *code_rule(*cast[1:], references(weights, dtype=torch.float32)), 6)
        out = torch.nn.functional.scaled_dot_product_attention(*folded)[..., :DIM]
        assert out.dtype == dtype and relative(out.double(), expected) < limit


def test_the_hosts_attention_takes_the_bias_as_it_is(own):
    from comfy.ldm.modules.attention import optimized_attention

    q, k, v = (tensor.float() for tensor in own)
    refs = references((3.0, 2.0), dtype=torch.float32)

    def host(q, k, v, bias):
        return optimized_attention(q, k, v, HEADS, mask=bias, skip_reshape=True)

    out = attend(q, k, v, refs, CODE, host).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
    assert relative(out.double(), textbook(*own, references((3.0, 2.0)), masks(), (3.0, 2.0), CODE)) < 1e-5
