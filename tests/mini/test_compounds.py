"""Compounds: two edits, one after the other, and their text states joined as learned and written instructions are."""

import pytest
import torch

from palimpsest.mini.compounds import COMPOUND_KINDS, GAP, compound, join
from palimpsest.mini.instructions import vocabulary
from palimpsest.mini.tokens import GrammarTokens
from palimpsest.visii import compose
from palimpsest.visii.instruction import Instruction

COMPOUNDS = [compound(seed) for seed in range(120)]


def test_a_seed_gives_its_compound():
    assert COMPOUNDS[3] == compound(3) != compound(4)


def test_the_second_edit_goes_on_from_the_first():
    for one in COMPOUNDS:
        assert one.first.after == one.second.before and one.before == one.first.before and one.after == one.second.after
        assert one.first.before != one.first.after != one.second.after
        assert one.first.kind != one.second.kind
    kinds = {(one.first.kind, one.second.kind) for one in COMPOUNDS}
    assert {kind for pair in kinds for kind in pair} == set(COMPOUND_KINDS) and len(kinds) > 25


def test_objects_are_plain_before_and_half_of_the_scenes_have_one():
    assert all(o.pattern == "plain" for one in COMPOUNDS for o in one.before.objects)
    alone = sum(len(one.before.objects) == 1 for one in COMPOUNDS)
    assert 60 < alone < 110, "half, and half of the others by chance"


def test_every_word_is_in_the_grammar():
    tokens = GrammarTokens(vocabulary())
    assert not any((tokens.encode(one.instruction) == tokens.unknown).any() for one in COMPOUNDS)


@pytest.mark.parametrize("row, end, count", [(0, 3, 2), (1, 4, 3)])
def test_joined_states_are_those_of_a_hybrid_instruction(row, end, count, monkeypatch):
    """The recipe's way against the node's: `combine` with a text encoder of known states."""
    first, second = torch.randn(2, 12, 4), torch.randn(2, 12, 4)
    monkeypatch.setattr(compose, "read_text", lambda clip, text, what: (None, count))
    monkeypatch.setattr(compose, "encode", lambda clip, text, what: (second[row:row + 1], {}))
    monkeypatch.setattr(compose, "null_text", lambda clip: (torch.zeros(1, 12, 4), {}))
    expected = compose.combine(Instruction(first[row:row + 1], torch.zeros(1, 12, 4), end, "one"), None, "two")
    joined = join(first, second, torch.tensor([3, 4]), torch.tensor([2, 3]))
    assert torch.equal(joined[row:row + 1], expected.tokens)


@pytest.mark.parametrize("end, count, kept", [(3, 0, range(12)), (9, 4, range(11)), (11, 3, range(12))])
def test_what_is_not_joined_or_does_not_fit_stays(end, count, kept):
    first, second = torch.randn(1, 12, 4), torch.randn(1, 12, 4)
    joined = join(first, second, torch.tensor([end]), torch.tensor([count]))
    same = [position for position in range(12) if torch.equal(joined[0, position], first[0, position])]
    assert same == list(kept)


def test_words_can_stand_before_another_texts_padding():
    first, second = torch.randn(1, 12, 4), torch.randn(1, 12, 4)
    joined = join(first, second, torch.tensor([-GAP]), torch.tensor([4]))
    assert torch.equal(joined, torch.cat([second[:, :4], first[:, 4:]], 1))
