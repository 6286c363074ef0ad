"""Each rewrite against the textbook formula on explicit attention maps, in float64."""

import pytest
import torch

from palimpsest.attention_patches.rewrites import shared_self_attention, source_features, source_self_attention, word_swap

LIMIT = 1e-10
HEADS, WIDTH = 4, 32


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Projections:
    """to_q, to_k, to_v of one attention, without bias, as in SD."""

    def __init__(self, context_width=WIDTH):
        self.q = random(WIDTH, WIDTH, seed=1) / WIDTH**0.5
        self.k, self.v = (random(WIDTH, context_width, seed=seed) / context_width**0.5 for seed in (2, 3))

    def heads(self, tokens, weight):
        return (tokens @ weight.T).unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def logits(self, n, context):
        q, k = self.heads(n, self.q), self.heads(context, self.k)
        return q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5

    def map(self, n, context):
        return self.logits(n, context).softmax(-1)

    def apply(self, attention_map, value):
        return (attention_map @ self.heads(value, self.v)).transpose(1, 2).flatten(2)

    def fused(self, n, context, value):
        out = torch.nn.functional.scaled_dot_product_attention(self.heads(n, self.q), self.heads(context, self.k), self.heads(value, self.v))
        return out.transpose(1, 2).flatten(2)


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.fixture
def own():
    return random(2, 16, WIDTH, seed=4)


@pytest.fixture
def source():
    return random(2, 16, WIDTH, seed=5)


def test_source_self_attention_is_the_source_map_on_own_values(own, source):
    w = Projections()
    expected = w.apply(w.map(source, source), own)
    assert relative(w.fused(*source_self_attention(own, source)), expected) < LIMIT
    assert relative(w.fused(own, own, own), expected) > 0.1


@pytest.mark.parametrize("scaled", [False, True])
def test_word_swap_is_the_mapped_source_map_on_own_words(own, source, scaled):
    w = Projections(context_width=48)
    context, source_context = random(2, 9, 48, seed=6), random(2, 7, 48, seed=7)
    mapper = random(7, 9, seed=8).softmax(-1)
    scale = random(9, seed=9).exp() if scaled else None
    factor = torch.ones(9, dtype=torch.float64) if scale is None else scale
    expected = w.apply(w.map(source, source_context) @ mapper * factor, context)
    assert relative(w.fused(*word_swap(source, source_context, context, mapper, scale)), expected) < LIMIT


def test_shared_self_attention_is_one_softmax_over_own_and_weighted_reference_logits(own):
    w = Projections()
    references = random(2, 24, WIDTH, seed=10)
    weights = random(24, seed=11).abs()
    logits = torch.cat([w.logits(own, own), w.logits(own, references) * weights], dim=-1)
    expected = w.apply(logits.softmax(-1), torch.cat([own, references], dim=1))
    assert relative(w.fused(*shared_self_attention(own, references, weights)), expected) < LIMIT


def test_features_are_the_sources_in_the_targets_precision():
    source = random(1, 4, 3, 3)
    out = source_features(torch.zeros(1, 4, 3, 3, dtype=torch.bfloat16), source)
    assert out.dtype == torch.bfloat16 and torch.equal(out, source.bfloat16())
