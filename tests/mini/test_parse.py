"""The parser of captions, and scenes made from what it found."""
import pytest

from palimpsest.mini.captions import caption
from palimpsest.mini.parse import parse, restate, scene_for
from palimpsest.mini.scenes import sample_scene


@pytest.mark.parametrize("probability", [0.2, 0.7, 1.0])
def test_parse_is_the_inverse_of_caption(probability):
    for seed in range(400):
        text, named, whole = caption(sample_scene(seed), seed, probability)
        assert parse(text) == (named, whole), text


def test_a_scene_from_a_caption_has_what_it_names():
    for seed in range(200):
        _, named, whole = caption(sample_scene(seed), seed)
        scene = scene_for(named, whole, seed)
        assert scene == scene_for(named, whole, seed)
        assert all(getattr(obj, attribute) == value for obj, words in zip(scene.objects, named) for attribute, value in words.items())
        assert all(getattr(scene, attribute) == value for attribute, value in whole.items())
        assert not any(obj.color == obj.color2 for obj in scene.objects)
        assert parse(restate(scene, named, whole, seed)) == (named, whole)


def test_the_seed_draws_the_rest():
    named, whole = parse("a red circle")
    assert len({scene_for(named, whole, seed).background for seed in range(40)}) > 3


@pytest.mark.parametrize("text, expected", [
    ("A Red CIRCLE.", {"color": "red", "shape": "circle"}),
    ("circle red small", {"color": "red", "shape": "circle", "size": "small"}),
    ("the striped box", {"pattern": "striped", "shape": "square"}),
    ("a star in the top left", {"shape": "star", "place": "top left"}),
])
def test_a_little_more_than_the_grammar_is_understood(text, expected):
    assert parse(text) == ([expected], {})


@pytest.mark.parametrize("text, sentence", [
    ("a red dog", "does not understand 'dog'"),
    ("", "names no object"),
    ("a circle and", "names no object"),
    ("a red blue circle", "two values for color, .* and "),
    ("a star, flat drawing, outline sketch", "two values for style"),
    ("a circle and a star and a square", "3 objects"),
    ("a red circle with red dots", "does not show"),
    ("a circle; DROP TABLE", "does not understand"),
])
def test_what_it_cannot_draw_is_one_sentence(text, sentence):
    with pytest.raises(ValueError, match=sentence) as failed:
        parse(text)
    assert "\n" not in str(failed.value)


def test_objects_that_cannot_stand_side_by_side_do_not_hang():
    with pytest.raises(ValueError, match="do not fit beside each other"):
        scene_for(*parse("a large circle in the center and a large star in the center"), 0)
