"""Multi-reference self-attention against the textbook masked softmax, in float64."""

import math

import pytest
import torch

from palimpsest.attention_patches.mrsa_attention import CODE, PAPER, References, attend, blend_style, code_rule, paper_rule, pick, shares
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


def heads_of(tensor):
    """[rows, N, heads * dim] -> [rows, heads, N, dim]."""
    return tensor.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def usual(q, k, v):
    """What a kernel does: scaled by the width that it gets, no mask."""
    q, k, v = (heads_of(x) for x in (q, k, v))
    return ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.fixture
def own():
    return tuple(random(ROWS, OWN[0] * OWN[1], HEADS * DIM, seed=seed) for seed in (1, 2, 3))


def projected(count, chosen=None, rows=1, dtype=torch.float64):
    """Keys and values of all tokens of `count` references."""
    return [tuple(random(rows, mask.numel(), HEADS * DIM, seed=10 * i + seed, dtype=dtype) for seed in (20, 21)) for i, mask in enumerate((chosen or masks())[:count])]


def references(refs, chosen, weights, rule):
    """As the edit builds them."""
    picked = pick([select(mask, weight) for mask, weight in zip(chosen, weights)], rule)
    return References(picked.of([k for k, _ in refs]), picked.of([v for _, v in refs]), picked.weights)


def composed(own, refs, chosen, weights, rule=CODE, **more):
    return attend(*own, references(refs, chosen, weights, rule), rule, HEADS, usual, **more)


def textbook(own, refs, chosen, weights, rule):
    """The rules as they are written: the whole map, the masked-out tokens in it."""
    q, k, v = (heads_of(x) for x in own)
    logits = [q @ k.mT * DIM**-0.5]
    for (key, _), mask, weight in zip(refs, chosen, weights):
        block = q @ heads_of(key).mT * DIM**-0.5
        weighted = mask.flatten() * weight
        logits.append(torch.where(weighted == 0, torch.full_like(block, -math.inf), block + weighted) if rule == CODE else block * weighted)
    values = torch.cat([v, *(heads_of(value).expand(len(v), -1, -1, -1) for _, value in refs)], 2)
    return (torch.cat(logits, -1).softmax(-1) @ values).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize("rule", [CODE, PAPER])
@pytest.mark.parametrize("weights", [(3.0,), (1.0, 1.0), (3.0, 2.0, 3.0), (-1.5, 2.5, 0.5)])
def test_both_rules_are_the_textbook_masked_softmax(own, weights, rule, rows):
    refs, chosen = projected(len(weights), rows=rows), masks()
    expected = textbook(own, refs, chosen, weights, rule)
    assert relative(composed(own, refs, chosen, weights, rule), expected) < LIMIT
    assert relative(usual(*own), expected) > 0.01
    assert relative(textbook(own, refs, chosen, weights, PAPER if rule == CODE else CODE), expected) > 0.01


def test_a_weight_multiplies_the_share_of_the_kept_tokens(own):
    """The factor on the softmax mass before it is normalised is e to the weight, so the odds of the reference grow by it."""
    q, k, _ = own
    ((key, value),) = projected(1)

    def share(weight):
        return composed((q, k, torch.zeros_like(k)), [(key, torch.ones_like(value))], masks(), (weight,))

    one, three = share(1.0), share(3.0)
    assert torch.allclose(three / (1 - three) / (one / (1 - one)), torch.full_like(one, math.exp(2)), rtol=1e-9)


def test_masked_out_tokens_are_dropped_and_kept_ones_come_in_order(own):
    refs, chosen = projected(2), masks()[:2]
    kept, count = [int(mask.sum()) for mask in chosen], OWN[0] * OWN[1]
    picked = pick([select(mask, weight) for mask, weight in zip(chosen, (3.0, 2.0))], CODE)
    assert picked.counts == tuple(kept) and picked.weights.tolist() == [3.0] * kept[0] + [2.0] * kept[1]
    queries, keys, values = (x.unflatten(-1, (HEADS, -1)) for x in code_rule(*own, references(refs, chosen, (3.0, 2.0), CODE), HEADS))
    first = refs[0][0].unflatten(-1, (HEADS, -1))[0, chosen[0].flatten().bool()]
    assert keys.shape == values.shape == (ROWS, count + sum(kept), HEADS, 16), "heads grow to a multiple of 8"
    assert torch.equal(keys[:, :count, :, :DIM], own[1].unflatten(-1, (HEADS, -1))) and torch.equal(keys[1, count : count + kept[0], :, :DIM], first)
    # the bias lies evenly in the new channels of every head
    new = keys[..., DIM:]
    assert not new[:, :count].any() and not values[..., DIM:].any() and bool((queries[..., DIM:] == 1).all())
    assert torch.allclose(new[:, count:].sum(-1) / 16**0.5, picked.weights.double()[:, None].expand(ROWS, -1, HEADS), rtol=1e-12)
    assert torch.equal(new, new[..., :1].expand_as(new))


@pytest.mark.parametrize("rule", [CODE, PAPER])
@pytest.mark.parametrize("count", [2, 19])
def test_shares_are_the_columns_of_the_map(own, rule, count):
    """More references than channels in a head go in groups."""
    chosen, weights = [masks()[i % 3] for i in range(count)], [1.0 + 0.1 * i for i in range(count)]
    refs, noted = projected(count, chosen), []
    composed(own, refs, chosen, weights, rule, watch=lambda q, k: noted.append((q, k)))
    counts = pick([select(mask, weight) for mask, weight in zip(chosen, weights)], rule).counts
    found = shares(*noted[0], counts, HEADS, usual)
    # values that tell one reference from all else
    for number in {0, 1, count - 1}:
        marked = [(key, torch.full_like(value, float(i == number))) for i, (key, value) in enumerate(refs)]
        expected = textbook((*own[:2], torch.zeros_like(own[2])), marked, chosen, weights, rule).unflatten(-1, (HEADS, DIM))[..., 0].mean(-1)
        assert found.shape == (ROWS, 24, count) and float((found[..., number] - expected).abs().max()) < 1e-6


def test_grey_masks_weigh_their_tokens(own):
    grey = [torch.rand(SIZES[0], generator=torch.Generator().manual_seed(3)).double() * (masks()[0] > 0)]
    refs = projected(1)
    # weights of a mask are float32
    assert relative(composed(own, refs, grey, (2.0,)), textbook(own, refs, grey, (2.0,), CODE)) < 1e-6


@pytest.mark.parametrize("rule", [CODE, PAPER])
def test_weight_zero_and_empty_masks_are_exactly_the_plain_attention(own, rule):
    plain, called = usual(*own), []

    def attention(*given):
        called.append(given)
        return usual(*given)

    empty = [mask * 0 for mask in masks()]
    for chosen, weights in ((masks(), (0.0, 0.0)), (empty, (3.0, 2.0)), ([masks()[0], empty[1]], (0.0, 3.0))):
        refs = references(projected(2), chosen, weights, rule)
        assert torch.equal(attend(*own, refs, rule, HEADS, attention), plain)
        assert all(given is mine for given, mine in zip(called[-1], own)), "the call the host would have made"
    # one that is off leaves the others as they are alone
    both, alone = composed(own, projected(2), masks(), (0.0, 3.0), rule), composed(own, projected(2)[1:], masks()[1:], (3.0,), rule)
    assert torch.equal(both, alone) and not torch.equal(both, plain)


def test_masked_out_tokens_of_the_paper_rule_leak_in(own):
    """In the formula even a reference without any masked token would; `pick` leaves that one out."""
    refs, nothing = projected(1), [masks()[0] * 0]
    ((key, value),) = refs
    literal = paper_rule(*own, References(key, value, select(nothing[0], 3.0).weighted))
    assert relative(usual(*literal), textbook(own, refs, nothing, (3.0,), PAPER)) < LIMIT and relative(usual(*literal), usual(*own)) > 0.01
    assert pick([select(nothing[0], 3.0), select(masks()[1], 2.0)], PAPER).counts == (0, 15)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match='no rule "sum" for reference weights: choose one of code, paper'):
        pick([], "sum")


def test_the_paper_rule_is_the_rewrite_of_attention_inputs():
    """As to_k has no bias, scaling projected keys is scaling their inputs: the rewrite that PnP's and P2P's stand beside."""
    width, chosen, weights = HEADS * DIM, masks()[:2], (3.0, 2.0)
    to_q, to_k, to_v = (random(width, width, seed=seed) / width**0.5 for seed in (1, 2, 3))
    own, tokens = random(ROWS, 24, width, seed=4), [random(1, mask.numel(), width, seed=5 + i) for i, mask in enumerate(chosen)]
    found = composed((own @ to_q, own @ to_k, own @ to_v), [(t @ to_k, t @ to_v) for t in tokens], chosen, weights, PAPER)
    weighted = torch.cat([select(mask, weight).weighted for mask, weight in zip(chosen, weights)])
    n, context, value = shared_self_attention(own, torch.cat([t.expand(ROWS, -1, -1) for t in tokens], 1), weighted)
    assert relative(found, usual(n @ to_q, context @ to_k, value @ to_v)) < LIMIT


@pytest.mark.parametrize("fidelity", [0.0, 0.25, 0.5, 1.0])
def test_style_fidelity_blends_the_unconditional_output(own, fidelity):
    refs, chosen, asked = projected(2), masks(), []

    def mrsa():
        asked.append("references")
        return composed(own, refs, chosen, (3.0, 2.0))

    def plain():
        asked.append("plain")
        return usual(*own)

    expected = (1 - fidelity) * textbook(own, refs, chosen, (3.0, 2.0), CODE) + fidelity * usual(*own)
    assert relative(blend_style(mrsa, plain, fidelity), expected) < LIMIT
    assert asked == {0.0: ["references"], 1.0: ["plain"]}.get(fidelity, ["references", "plain"]), "nothing is computed for nothing"


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("rule", [CODE, PAPER])
def test_references_take_the_dtype_of_the_call(own, rule, dtype, limit):
    """Keys may be of another precision than the call, and the bias of the mask is float32."""
    weights = (3.0, 2.0)
    expected = textbook(own, projected(2), masks(), weights, rule)
    out = composed(tuple(tensor.to(dtype) for tensor in own), projected(2, dtype=torch.float32), masks(), weights, rule)
    assert out.dtype == dtype and relative(out.double(), expected) < limit


def test_the_hosts_attention_gives_the_same(own):
    from comfy.ldm.modules.attention import optimized_attention

    refs = projected(2, dtype=torch.float32)
    out = attend(*(x.float() for x in own), references(refs, masks(), (3.0, 2.0), CODE), CODE, HEADS, lambda q, k, v: optimized_attention(q, k, v, HEADS))
    assert relative(out.double(), textbook(own, projected(2), masks(), (3.0, 2.0), CODE)) < 1e-5
