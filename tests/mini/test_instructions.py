"""Instructions: what they say is what changes, and nothing else does."""

import random
from dataclasses import fields

import pytest

from palimpsest.mini.captions import NO_SHAPE, PLACE_WORDS, SHAPE_WORDS, SIZE_WORDS
from palimpsest.mini.instructions import KINDS, PLAIN_KINDS, call, hue, triple, vocabulary
from palimpsest.mini.scenes import BACKGROUNDS, COLORS, PLACES, SIZE, SIZES, apart, bounds, nearest_color
from palimpsest.mini.tokens import GrammarTokens

TRIPLES = {kind: [triple(seed, kind) for seed in range(60)] for kind in KINDS}
ALL = [found for triples in TRIPLES.values() for found in triples]
# what an edit of a kind may change of its object
MAY = {"color": {"color", "rgb"}, "color2": {"color2", "rgb2"}, "pattern": {"pattern", "color2", "rgb2"}, "shape": {"shape", "tilt"},
       "move": {"place", "cx", "cy"}, "size": {"size", "radius", "cx", "cy"}}


def differences(a, b):
    return {field.name for field in fields(a) if getattr(a, field.name) != getattr(b, field.name)}


def test_a_seed_gives_its_triple():
    assert triple(5) == triple(5) != triple(6)
    assert {triple(seed).kind for seed in range(300)} == set(KINDS)


@pytest.mark.parametrize("kind", MAY)
def test_an_edit_of_an_object_changes_what_it_says_of_it_alone(kind):
    for found in TRIPLES[kind]:
        assert differences(found.before, found.after) == {"objects"} and len(found.before.objects) == len(found.after.objects)
        for number, (old, new) in enumerate(zip(found.before.objects, found.after.objects)):
            changed = differences(old, new)
            assert changed <= MAY[kind] and bool(changed) == (number == found.index)


@pytest.mark.parametrize("kind, what", [("background", {"background", "background_rgb"}), ("style", {"style"})])
def test_an_edit_of_the_scene_leaves_the_objects(kind, what):
    assert all(differences(found.before, found.after) == what and found.index is None for found in TRIPLES[kind])


def test_adding_and_removing():
    for found in TRIPLES["add"]:
        assert found.after.objects[:1] == found.before.objects and len(found.after.objects) == 2 and found.index == 1
        assert all(any(word in found.instruction for word in words) for words in (SHAPE_WORDS[found.after.objects[1].shape], SIZE_WORDS[found.after.objects[1].size]))
    for found in TRIPLES["remove"]:
        assert found.after.objects == (found.before.objects[1 - found.index],)


def test_the_new_value_is_in_the_words():
    assert all(found.after.objects[found.index].color in found.instruction for found in TRIPLES["color"])
    assert all(found.after.background in found.instruction for found in TRIPLES["background"])
    places = {place: [word.split(" the ")[1] for word in words] for place, words in PLACE_WORDS.items()}
    assert all(any(found.instruction.endswith(word) for word in places[found.after.objects[found.index].place]) for found in TRIPLES["move"])


def test_what_changes_takes_the_middle_of_its_word():
    """One right answer per picture and instruction: nothing of the edit is left to chance."""
    assert all(nearest_color(hue(name)) == name for name in COLORS)
    assert all(found.after.objects[found.index].rgb == hue(found.after.objects[found.index].color) for kind in ("color", "add") for found in TRIPLES[kind])
    assert all(found.after.objects[found.index].rgb2 == hue(found.after.objects[found.index].color2) for found in TRIPLES["color2"])
    assert all(found.after.background_rgb == BACKGROUNDS[found.after.background] for found in TRIPLES["background"])
    assert all(found.after.objects[found.index].radius == sum(SIZES[found.after.objects[found.index].size]) / 2 for kind in ("size", "add") for found in TRIPLES[kind])
    for kind in ("move", "add"):
        for found in TRIPLES[kind]:
            obj = found.after.objects[found.index]
            assert abs(obj.cx - PLACES[obj.place][0]) < 5 and abs(obj.cy - PLACES[obj.place][1]) < 5


def test_only_a_plain_circle_is_turned_when_its_shape_changes():
    for found in TRIPLES["shape"]:
        old, new = found.before.objects[found.index], found.after.objects[found.index]
        assert new.tilt == (0.0 if old.shape == "circle" and old.pattern == "plain" else old.tilt)


def test_a_second_color_is_asked_for_where_there_is_one():
    assert all(found.before.objects[found.index].pattern != "plain" and found.after.objects[found.index].color2 in found.instruction.split() for found in TRIPLES["color2"])
    assert "color2" not in {triple(seed, plain=True).kind for seed in range(80)} and set(PLAIN_KINDS) < set(KINDS)
    assert triple(3, "color2", plain=True).kind == "color2", "a kind that was asked for goes first"


def test_every_picture_fits_and_no_two_objects_touch():
    for found in ALL:
        for scene in (found.before, found.after):
            assert len(scene.objects) == 1 or apart(*scene.objects)
            for obj in scene.objects:
                left, top, right, bottom = bounds(obj)
                assert obj.radius < obj.cx < SIZE - obj.radius and obj.radius < obj.cy < SIZE - obj.radius and right <= SIZE and bottom <= SIZE


def test_a_call_fits_one_object_only():
    names = {word: shape for shape, words in SHAPE_WORDS.items() for word in words}
    for found in ALL:
        for index in range(len(found.before.objects)):
            words = call(found.before, index, random.Random(1)).split()
            fits = []
            for obj in found.before.objects:
                place = PLACE_WORDS[obj.place][0]
                said = next(word for word in words if word in names or word in NO_SHAPE)
                text = " ".join(words)
                rest = text.split(said, 1)[1].strip()
                fits.append((said in NO_SHAPE or names[said] == obj.shape) and (words[1] == said or words[1] == obj.color) and rest in ("", place))
            assert fits[index] and sum(fits) == 1, words


def test_plain_scenes_are_plain_before():
    assert all(obj.pattern == "plain" for seed in range(40) for obj in triple(seed, plain=True).before.objects)
    assert any(obj.pattern != "plain" for seed in range(40) for obj in triple(seed, plain=False).before.objects)


def test_every_word_has_a_token_of_its_own():
    tokens = GrammarTokens(vocabulary())
    assert all(tokens.unknown not in tokens.encode(found.instruction).tolist() for found in ALL)
    assert set(GrammarTokens().ids) < set(tokens.ids)


def test_an_unknown_kind_is_one_sentence():
    with pytest.raises(ValueError, match="no edit of the kind melt.*choose one of"):
        triple(0, "melt")
