"""Whether a file holds the tensors of its kind: every fault in one sentence."""

import pytest

from palimpsest.common.shapes import compare_shapes

EXPECTED = {"a.weight": (2, 3), "b.weight": (4,)}


def test_what_is_expected_passes():
    compare_shapes(dict(reversed(EXPECTED.items())), EXPECTED, "file")


@pytest.mark.parametrize("stored, words", [
    ({"a.weight": (2, 3)}, "The SAM file x lacks 1 tensor, b.weight first"),
    ({}, "The SAM file x lacks 2 tensors, a.weight first"),
    ({**EXPECTED, "c": ()}, "The SAM file x has besides what belongs to it 1 tensor, c first"),
    ({**EXPECTED, "b.weight": (5,)}, "The SAM file x has in another shape than the rest of it asks for 1 tensor, b.weight first"),
])
def test_every_fault_is_one_sentence(stored, words):
    with pytest.raises(ValueError) as error:
        compare_shapes(stored, EXPECTED, "SAM file x")
    assert str(error.value) == words + ": it is damaged or was converted wrongly, so download it again."
