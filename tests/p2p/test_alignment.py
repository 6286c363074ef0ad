"""Mappers: the published ones, an independent alignment, long prompts."""

import functools
import random

import pytest
import torch

from palimpsest.p2p.alignment import align, identical, matrix, refinement, replacement, spare_marks
from palimpsest.p2p.tokens import Token, PromptTokens

COUNT = " ".join(f"w{k % 10}" for k in range(30))  # 60 tokens


def common_length(a, b):
    """Length of the longest common subsequence, by one rolling row."""
    row = [0] * (len(b) + 1)
    for x in a:
        before = 0
        for j, y in enumerate(b):
            row[j + 1], before = (before + 1 if x == y else max(row[j], row[j + 1])), row[j + 1]
    return row[-1]


def naive(a, b):
    """The published rule as a recursion over prefixes: score, then which neighbour explains it, left before up before diagonal."""
    @functools.lru_cache(None)
    def score(i, j):
        if i == 0 or j == 0:
            return 0
        return max(score(i, j - 1), score(i - 1, j), score(i - 1, j - 1) + (1 if a[i - 1] == b[j - 1] else -1))

    def back(i, j):
        if i == 0 or j == 0:
            return [-1] * j
        if score(i, j) == score(i, j - 1):
            return back(i, j - 1) + [-1]
        if score(i, j) == score(i - 1, j):
            return back(i - 1, j)
        return back(i - 1, j - 1) + [i - 1]

    return back(len(a), len(b))


def test_the_aligner_against_a_naive_recursion_and_the_lcs():
    draw = random.Random(0)
    for case in range(1000):
        letters = range(draw.choice((2, 3, 6, 20)))
        longest = 9 if case % 2 else 40
        a, b = ([draw.choice(letters) for _ in range(draw.randint(0, longest))] for _ in range(2))
        found = align(a, b)
        assert len(found) == len(b)
        pairs = [(i, j) for j, i in enumerate(found) if i >= 0]
        assert all(a[i] == b[j] for i, j in pairs), "a mismatch is never taken"
        assert all(first[0] < second[0] for first, second in zip(pairs, pairs[1:])), "the order is kept"
        assert len(pairs) == common_length(a, b)
        assert found == naive(tuple(a), tuple(b)), (a, b)


def test_ties_go_left_then_up():
    assert align("ab", "ba") == [1, -1], "the source's first item is dropped, the target's last inserted"
    assert align("a", "aa") == [0, -1] and align("aa", "a") == [0]


def test_published_refinements(cases, published, read):
    seen = 0
    for name, pair in cases["pairs"].items():
        if pair["refine_error"]:
            continue
        mapper, alphas = refinement(read(pair["source"]), read(pair["target"]))
        assert torch.equal(mapper[None], published[f"refine.mapper.{name}"]), name
        assert torch.equal(alphas[None], published[f"refine.alphas.{name}"]), name
        seen += 1
    assert seen == 16


def test_published_replacements(cases, published, read):
    seen = 0
    for name, pair in cases["pairs"].items():
        source, target = read(pair["source"]), read(pair["target"])
        if pair["replace_error"]:
            with pytest.raises(ValueError, match="same number of words"):
                replacement(source, target, "published")
        elif len(source.chunks) == 1:
            assert torch.equal(replacement(source, target, "published")[None], published[f"replace.{name}"]), name
            seen += 1
    assert seen == 11


def test_published_batches(cases, published, read):
    for name, batch in cases["batches"].items():
        source, *targets = (read(text) for text in batch["prompts"])
        for k, target in enumerate(targets):
            mapper, alphas = refinement(source, target)
            assert torch.equal(mapper, published[f"batch.refine.mapper.{name}"][k]) and torch.equal(alphas, published[f"batch.refine.alphas.{name}"][k])
            if batch["replace_error"] is None:
                assert torch.equal(replacement(source, target, "published"), published[f"batch.replace.{name}"][k])


def test_an_aligned_tail_puts_every_word_on_its_own_tokens(read):
    source, target = read("a photo of a cat on a red sofa"), read("a photo of a schnoodle on a red sofa")
    found = replacement(source, target)
    expected = torch.zeros(77, 77)
    for i, j in [*((k, k) for k in range(5)), *((k, k + 1) for k in range(6, 76))]:
        expected[i, j] = 1
    expected[5, 5] = expected[5, 6] = 0.5
    assert torch.equal(found, expected)
    back = replacement(target, source)
    assert back[5, 5] == back[6, 5] == 1 and all(back[k + 1, k] == 1 for k in range(6, 76))
    assert back.sum() == 77 and back[:, 76].sum() == 0, "one padding fewer than the other prompt"
    assert not torch.equal(found, replacement(source, target, "published"))


def test_aligned_and_published_agree_where_token_counts_do(cases, read):
    for name in ("swap_same_len", "swap_punct", "refine_reorder", "identical"):
        source, target = read(cases["pairs"][name]["source"]), read(cases["pairs"][name]["target"])
        assert torch.equal(replacement(source, target), torch.eye(77)) and torch.equal(replacement(source, target, "published"), torch.eye(77))


def test_replacement_keeps_the_mass_of_every_word(read):
    source, target = read("the cat's bowl of lasagne on a table"), read("the schnoodle's hippopotamus of cake on a table")
    found = replacement(source, target)
    for before, after in zip(source.by_word, target.by_word):
        inside = found[list(before)][:, list(after)]
        assert torch.allclose(inside.sum(), torch.tensor(float(len(before))))
        assert torch.allclose(found[list(before)].sum(), inside.sum()), "nothing goes to another word"
        assert torch.allclose(found[:, list(after)].sum(), inside.sum())


def test_different_word_counts_name_both(read):
    with pytest.raises(ValueError, match="the source has 2 and the target 3"):
        replacement(read("a cat"), read("a big cat"))
    with pytest.raises(ValueError, match="aligned or published, not 'loose'"):
        replacement(read("a cat"), read("a dog"), "loose")


def test_refinement_of_long_prompts(read):
    source, target = read(f"{COUNT} cat {COUNT} end"), read(f"{COUNT} big cat {COUNT} red end")
    assert source.length == target.length == 154
    mapper, alphas = refinement(source, target)
    for word in ("big", "red"):
        (position,) = target.positions(word)
        assert alphas[position] == 0 and mapper[position] == -1
    for word in ("cat", "end", "w3"):
        assert mapper[list(target.positions(word))].tolist() == list(source.positions(word))
    assert mapper[0] == 0 and mapper[76] == 76 and mapper[77] == 77, "BOS and EOS of the same chunk"
    assert mapper[target.marks[1][1]] == source.marks[1][1] != target.marks[1][1], "EOS, two positions further on"
    padding = target.marks[1][2:]
    assert mapper[list(padding)].tolist() == list(padding) and alphas[list(padding)].all()
    assert int((alphas == 0).sum()) == 2


def test_padding_of_long_prompts_never_copies_words(read):
    source, target = read(f"{COUNT} big red cat {COUNT}"), read(f"{COUNT} cat {COUNT}")
    mapper, alphas = refinement(source, target)
    first = [position for position in target.marks[1][2:] if position not in source.marks[1][2:]]
    assert len(first) == 2 and not alphas[first].any()
    assert alphas.sum() == 154 - 2


def test_one_chunk_to_two_and_back(read):
    short, long = read(f"{COUNT} cat"), read(f"{COUNT} cat in {COUNT}")
    mapper, alphas = refinement(short, long)
    assert mapper.shape == (154,) and mapper[list(long.positions("cat"))].tolist() == list(short.positions("cat"))
    assert mapper[0] == 0 and mapper[76] == 62 and alphas[76] == 1, "EOS of the first chunk"
    assert not alphas[77:].any()
    pairs, empty = spare_marks(short, long)
    assert pairs == [] and empty == list(long.marks[1])
    pairs, empty = spare_marks(long, short)
    assert empty == [] and pairs[:2] == [(77, 0), (long.marks[1][1], 62)] and all(j in short.marks[0] for _, j in pairs)
    back, kept = refinement(long, short)
    assert back.shape == (77,) and back[62] == 76 and kept[62] == 1 and not kept[63:].any(), "no padding in the longer prompt's first chunk"


def test_replacement_over_different_numbers_of_chunks_keeps_bos(read):
    long, short = read(" ".join(["lasagne"] * 40)), read(" ".join(["cat"] * 40))
    assert (long.length, short.length) == (154, 77)
    there, back = replacement(long, short), replacement(short, long)
    assert there[0, 0] == there[77, 0] == 1 and there[76, 41] == there[long.marks[1][1], 41] == 1
    assert back[0, 0] == 1 and back[:, 77].sum() == 0, "the second BOS gets nothing"
    assert torch.allclose(back[:42].sum(1), torch.ones(42)), "no attention to words, BOS and EOS is lost"
    with pytest.raises(ValueError, match="one chunk only, but these have 1 and 2"):
        replacement(short, long, "published")


def test_long_prompts_with_equal_tokens_map_onto_themselves(cases, read):
    pair = cases["pairs"]["long"]
    source, target = read(pair["source"]), read(pair["target"])
    assert torch.equal(replacement(source, target), torch.eye(154))
    mapper, alphas = refinement(source, target)
    (changed,) = target.positions("dog")
    assert mapper.tolist() == [-1 if k == changed else k for k in range(154)] and alphas.sum() == 153


def test_matrix_is_the_map_where_alpha_is_one(read):
    source, target = read("a silver cat sculpture on grass"), read("a cat on wet grass, shouting")
    mapper, alphas = refinement(source, target)
    found = matrix(mapper, alphas, source.length)
    own, there = torch.randn(4, 77), torch.randn(4, 77)
    assert torch.equal(there @ found + own * (1 - alphas), there[:, mapper] * alphas + own * (1 - alphas))


def test_identical_is_about_tokens_and_weights(read):
    assert identical(read("A  cat"), read("a cat")), "case and spaces make no difference to CLIP"
    assert not identical(read("a cat"), read("a dog")) and not identical(read("a cat"), read("a (cat:1.2)"))
    assert not identical(read("a cat"), read("a cat" + " a cat" * 60))


def test_textual_inversions_align_by_their_numbers():
    def prompt(*ids):
        tokens = [Token(0, 1, "", None, 1.0), *(Token(k, value, "x", k - 1, 1.0) for k, value in enumerate(ids, 1)), Token(len(ids) + 1, 2, "", None, 1.0)]
        return PromptTokens("", tuple(tokens), len(tokens), tuple("x" * len(ids)))

    first, second = torch.arange(4.0), torch.arange(4.0) + 1
    mapper, alphas = refinement(prompt(first, second, 7), prompt(second.clone(), 9, 7))
    assert mapper.tolist() == [0, 2, -1, 3, 4] and alphas.tolist() == [1, 1, 0, 1, 1]
