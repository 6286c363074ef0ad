"""What people type."""

import pytest

from palimpsest.p2p.syntax import missing_words, parse_weights, parse_windows, split_list


def test_windows():
    assert parse_windows("lion: 0.2, jungle: 0.1-0.4") == {"lion": (0.0, 0.2), "jungle": (0.1, 0.4)}
    assert parse_windows("red  car:.5\n\nlion :1 ,\n a: 0 - 1.0") == {"red car": (0.0, 0.5), "lion": (0.0, 1.0), "a": (0.0, 1.0)}
    assert parse_windows("") == parse_windows(" ,\n ,") == {}


def test_weights():
    assert parse_weights("jungle: x3, pink: -1, smiling: 0.5") == {"jungle": 3.0, "pink": -1.0, "smiling": 0.5}
    assert parse_weights("a: X 2.5\nb: x-.5\nc: +4.") == {"a": 2.5, "b": -0.5, "c": 4.0}


def test_quotation_marks_hold_commas_and_colons():
    assert parse_weights('"red, blue": x2, \'at 5:30\': 3,"plain" :1') == {"red, blue": 2.0, "at 5:30": 3.0, "plain": 1.0}
    assert parse_windows('"a: b": 0.1-0.2\n"c,": 1') == {"a: b": (0.1, 0.2), "c,": (0.0, 1.0)}


def test_apostrophes_and_colons_inside_words_need_none():
    assert parse_weights("cat's bowl: 2, 'tis: 3") == {"cat's bowl": 2.0, "'tis": 3.0}
    assert parse_weights("embedding:style: 2") == {"embedding:style": 2.0}


@pytest.mark.parametrize("text, piece, why", [
    ("lion: 0.2, tiger", "tiger", "has no value"),
    ("lion: 0,5", "5", "numbers take a point"),
    ("lion: soon", "lion: soon", "cannot be read"),
    ("lion:", "lion:", "cannot be read"),
    ("lion: -0.2", "lion: -0.2", "cannot be read"),
    ("lion: 0.1-0.2-0.3", "lion: 0.1-0.2-0.3", "cannot be read"),
    ("lion: 1.5", "lion: 1.5", "out of range"),
    ("lion: 0.6-0.4", "lion: 0.6-0.4", "out of range"),
    (": 0.2", ": 0.2", "names no word"),
    ('"  ": 0.2', '"  ": 0.2', "names no word"),
    ('"lion: 0.2', '"lion: 0.2', "not closed"),
    ("lion: 0.2, cat: 1, lion: 0.3", "lion: 0.3", "second time"),
])
def test_wrong_windows_name_the_piece(text, piece, why):
    with pytest.raises(ValueError, match=why) as failed:
        parse_windows(text)
    assert f'"{piece}"' in str(failed.value) and str(failed.value).count("\n") == 0 and str(failed.value).endswith(".")


@pytest.mark.parametrize("value", ["three", "", "x", "3x", "0.1-0.4", "inf", "nan", "--1"])
def test_wrong_weights_name_the_piece(value):
    with pytest.raises(ValueError, match="cannot be read") as failed:
        parse_weights(f"cat: 2\nlion: {value}")
    assert f'"lion: {value}'.strip() in str(failed.value)


def test_words_that_are_not_in_the_prompt(read):
    prompt = read("A painting of a lion, eating")
    assert missing_words({"Lion": 1, "of a": 2}, prompt) is None and missing_words({}, prompt) is None
    with pytest.raises(ValueError) as failed:
        missing_words({"dragon": 1, "lion": 1, "a lion eating": 2, "cake": 0}, prompt)
    assert str(failed.value) == ('Not in the edit prompt: "dragon", "cake" (found: "lion", "a lion eating"); its words are: A painting of a lion, eating.')
    with pytest.raises(ValueError, match="its words are: none"):
        missing_words(["x"], read(""))


def test_lists_of_words():
    assert split_list(" red  sofa, cat\n dog ,, cat") == ["red sofa", "cat", "dog"]
    assert split_list("  ") == []
