"""The score of the mini edit model: its judgement where the truth is known. No model runs here."""

import pytest

from palimpsest.devtools.scores import instruct_pix2pix as score, mrsa
from palimpsest.devtools.scoring import HELD_OUT, VALIDATION, pictures
from palimpsest.mini.instructions import KINDS, PLAIN_KINDS, triple
from palimpsest.mini.reader import read
from palimpsest.mini.scenes import BACKGROUNDS, COLORS, edited

TRIPLES = {kind: [triple(VALIDATION + seed, kind, plain=True) for seed in range(8)] for kind in KINDS}


def drawn(scene):
    return read(pictures([scene])[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_perfect_edit_is_both_and_the_picture_before_is_not(kind):
    perfect = [drawn(found.after) for found in TRIPLES[kind]]
    assert sum(score.followed(found, reading) for found, reading in zip(TRIPLES[kind], perfect)) >= 7
    assert sum(score.unchanged(found, reading) for found, reading in zip(TRIPLES[kind], perfect)) >= 7
    assert not any(score.followed(found, drawn(found.before)) for found in TRIPLES[kind])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("background", "style", "remove", "move", "add")])
def test_an_edit_not_made_still_leaves_the_rest(kind):
    assert sum(score.unchanged(found, drawn(found.before)) for found in TRIPLES[kind]) >= 7


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_not_asked_for_is_seen(kind):
    for found in TRIPLES[kind]:
        if kind != "background":
            other = next(word for word in BACKGROUNDS if word != found.after.background)
            assert not score.unchanged(found, drawn(edited(found.after, "background", other)))
        free = [i for i in range(len(found.after.objects)) if kind in ("background", "style", "remove") or i != found.index]
        for index in free:
            other = next(word for word in COLORS if word != found.after.objects[index].color)
            strange = drawn(edited(found.after, "color", other, index, 1))
            assert not score.unchanged(found, strange)


def test_leaves_carry_the_keys_and_the_kinds_take_turns():
    found = score.triples(0, 18)
    assert [one.kind for one in found] == list(PLAIN_KINDS) * 2
    assert {one.kind for one in score.triples(0, 10, plain=False)} == set(KINDS)
    result = score.Found()
    for one in found:
        result.add(one, drawn(one.after))
    leaves = result.leaves("0..17", by_edit=True)
    assert leaves["followed"]["n"] == 18 and leaves["followed"]["value"] >= 0.9 and set(leaves["by_edit"]) == set(PLAIN_KINDS) and leaves["by_edit"]["add"]["unchanged"]["n"] == 2


def test_no_seed_of_another_score_is_used():
    assert score.OFFSET >= mrsa.OFFSET + 100 * mrsa.APART and HELD_OUT + score.OFFSET + score.COUNT < VALIDATION


def leaf(value):
    return {"value": value, "n": 1, "seeds": "0", "versions": {}}


def test_the_trade_off_is_drawn_from_the_sweep(tmp_path):
    swept = {score.scale_key(scale): {"followed": leaf(1 - 0.1 * i), "unchanged": leaf(0.3 + 0.1 * i)} for i, scale in enumerate(score.SWEEP)}
    figures = {"instruct_pix2pix": {"sweep": swept, "text_scale_7_5": {"followed": leaf(0.9), "unchanged": leaf(0.2)}}}
    over_scales, published = score.curves(figures).values()
    assert over_scales[0] == ("1", 0.3, 1.0) and [label for label, _, _ in over_scales] == ["1", "1.2", "1.4", "1.6", "1.8", "2", "2.2"]
    assert published == [("1.5", 0.2, 0.9)]
    score.plot(figures, tmp_path / "pictures" / "curve.png")
    assert (tmp_path / "pictures" / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_sweep_nothing_is_drawn(tmp_path):
    with pytest.raises(ValueError, match="has no sweep: run the full score"):
        score.plot({}, tmp_path / "curve.png")
    assert not list(tmp_path.iterdir())
