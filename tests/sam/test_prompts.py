"""Boxes and points: what is read, what is refused."""

import pytest

from palimpsest.sam.prompts import Prompt, make_prompt, parse_points

NONE = (0, 0, 0, 0)


def refusal(message, *args):
    with pytest.raises(ValueError, match=message) as error:
        make_prompt(*args)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


@pytest.mark.parametrize("text, points", [
    ("120, 80, +; 40,200,-", [(120, 80, True), (40, 200, False)]),
    ("1.5 ,2 , +", [(1.5, 2, True)]),
    ("3,4", [(3, 4, True)]),
    ("3,4,-\n5,6\n\n;7,8,+;", [(3, 4, False), (5, 6, True), (7, 8, True)]),
    ("", []), (" ;\n ", []),
])
def test_points_are_read(text, points):
    assert parse_points(text) == points


@pytest.mark.parametrize("piece", ["12", "1, 2, 3", "1, 2, yes", "x, y, +", "1; 2", "1,,2", "nan, 3, +", "1e3, 2, +", "1, 2, +-", "(1, 2)"])
def test_what_cannot_be_read_is_named(piece):
    with pytest.raises(ValueError, match="Cannot read the point") as error:
        parse_points(f"10, 10, +; {piece}")
    assert f'"{piece.split(";")[0].strip()}"' in str(error.value) and "\n" not in str(error.value)


def test_box_and_points_become_a_prompt():
    assert make_prompt((1, 2, 30, 40), "", 64, 48) == Prompt((1, 2, 30, 40), (), ())
    assert make_prompt(NONE, "5, 6, +; 7, 8, -", 64, 48) == Prompt(None, ((5, 6), (7, 8)), (True, False))
    both = make_prompt((1, 2, 30, 40), "7, 8, -", 64, 48)
    assert both.box == (1, 2, 30, 40) and both.wanted == (False,), "a box may be corrected by points that are all unwanted"
    assert both.describe() == "box 1, 2, 30, 40 and 1 - point"
    assert make_prompt(NONE, "5,6;7,8;1,1,-", 64, 48).describe() == "2 + points and 1 - point"
    assert make_prompt((0, 0, 64, 48), "", 64, 48).box == (0, 0, 64, 48), "the whole picture"
    assert make_prompt(NONE, "63, 47, +", 64, 48).points == ((63, 47),)


def test_boxes_that_are_none_are_refused():
    refusal("from 30, 2 to 10, 40 has no area: x1, y1 is its top left", (30, 2, 10, 40), "", 64, 48)
    refusal("has no area", (5, 5, 5, 40), "", 64, 48)
    refusal("has no area", (5, 0, 0, 0), "", 64, 48)
    refusal("from 1, 2 to 65, 40 reaches beyond the picture of 64 x 48 px", (1, 2, 65, 40), "", 64, 48)
    refusal("reaches beyond the picture of 64 x 48 px", (1, 2, 64, 49), "", 64, 48)
    refusal("reaches beyond", (100, 100, 120, 120), "", 64, 48)


def test_points_beside_the_picture_are_refused():
    for point in ("64, 10, +", "10, 48, -", "-1, 5, +", "5, -0.5, +"):
        refusal("lies outside the picture of 64 x 48 px", NONE, point, 64, 48)


def test_no_prompt_is_refused():
    refusal("Nothing says where the concept is", NONE, "", 64, 48)
    refusal("Nothing says where the concept is", NONE, " ; ", 64, 48)
    refusal("All points are marked -", NONE, "5, 6, -", 64, 48)
