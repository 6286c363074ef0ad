"""The score of learned instructions: its edits, and its judgement where the truth is known. No model runs here."""
from collections import Counter

import pytest

from palimpsest.devtools import scoring
from palimpsest.devtools.scores import instruct_pix2pix, inversion_repairs, mrsa, visii
from palimpsest.devtools.scoring import HELD_OUT, VALIDATION
from palimpsest.mini import captions, instructions
from palimpsest.mini.reader import read

FIRST = VALIDATION + visii.OFFSET
EDITS = [visii.edit(number, FIRST) for number in range(visii.EDITS)]


def of_scene(scene, kind):
    return getattr(scene if kind in ("background", "style") else scene.objects[0], kind)


def test_edits_are_of_all_kinds_and_change_one_thing_only():
    assert set(Counter(found.kind for found in EDITS).values()) == {4} and {found.kind for found in EDITS} == set(visii.TABLES)
    assert {found.value for found in EDITS if found.kind == "style"} == {"flat", "outline"} and {found.value for found in EDITS if found.kind == "size"} == {"small", "large"}
    for found in EDITS:
        assert len(found.scenes) == visii.SCENES and found == visii.edit(EDITS.index(found), FIRST)
        for one in (found.pair, *found.scenes):
            assert of_scene(one.before, found.kind) != found.value == of_scene(one.after, found.kind)
            assert len(one.before.objects) == 1 and one.before.objects[0].pattern == "plain"
            others = [name for name in visii.TABLES if name != found.kind]
            assert all(of_scene(one.before, name) == of_scene(one.after, name) for name in others)
    assert len({one.before for found in EDITS for one in found.scenes}) == visii.EDITS * visii.SCENES


def test_written_instructions_and_captions_use_words_the_model_knows():
    words = {*captions.vocabulary(), *instructions.vocabulary()}
    for kind, table in visii.TABLES.items():
        for value in table:
            assert set(visii.written(kind, value).split()) <= words, visii.written(kind, value)
    for found in EDITS:
        text = found.start.replace(",", " ").split()
        assert set(text) <= words and 0 < len(text) <= 9, found.start


@pytest.mark.parametrize("kind", visii.TABLES)
def test_the_perfect_edit_is_followed_and_unchanged_and_no_edit_is_not(kind):
    perfect, none = instruct_pix2pix.Found(), instruct_pix2pix.Found()
    for found in EDITS:
        if found.kind == kind:
            chosen = found.scenes[:3]
            for one, after, before in zip(chosen, *(scoring.pictures([getattr(one, side) for one in chosen]) for side in ("after", "before"))):
                perfect.add(one, read(after))
                none.add(one, read(before))
    assert sum(perfect.followed) >= 11 and sum(perfect.unchanged) >= 11 and sum(none.followed) == 0


def test_hybrid_scenes_have_neither_the_color_nor_the_shape_yet():
    for seed in range(FIRST, FIRST + 20):
        one = visii.scene_for(seed, "color", "blue", shape="star")
        assert one.before.objects[0].color != "blue" and one.before.objects[0].shape != "star"


def test_no_seed_of_two_scores_meets():
    own = [HELD_OUT + visii.OFFSET + visii.APART * number + k for number in range(visii.EDITS) for k in range(visii.APART)]
    instruct = range(HELD_OUT + instruct_pix2pix.OFFSET, HELD_OUT + instruct_pix2pix.OFFSET + instruct_pix2pix.COUNT)
    assert len(set(own)) == len(own) and max(own) < VALIDATION and not set(own) & set(instruct)
    assert min(own) > HELD_OUT + max(mrsa.OFFSET, inversion_repairs.OFFSET) + 100_000
    assert 60 + visii.SCENES <= visii.APART
