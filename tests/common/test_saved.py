"""Files of one kind in the host's folders: names, the next one, and what a bad name is told."""

import os
from dataclasses import replace

import pytest

from palimpsest.common.saved import NONE, Kind, saved_line

KIND = Kind("melody", "melodies", ".melody.txt", (".txt", ".mid"), "Save Melody")
pytestmark = pytest.mark.usefixtures("folders")


def write(prefix=KIND.prefix):
    path, listed = KIND.new_file(prefix)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(b"x" * 1_250_000)
    return path, listed


def test_the_next_file_is_listed_under_its_name_and_found_again():
    assert KIND.options() == [NONE] and KIND.names() == []
    (first, listed), (second, other) = write(), write()
    assert (listed, other) == tuple(f"melodies/palimpsest_0000{i}_.melody.txt [output]" for i in (1, 2))
    assert KIND.names() == KIND.options() == [listed, other] and [KIND.resolve(name) for name in (listed, other)] == [first, second]
    assert KIND.check(listed) is True and saved_line(listed, first) == "Saved melodies/palimpsest_00001_.melody.txt (1.25 MB)"


def test_other_places_can_be_named_though_not_listed():
    path, listed = write("one")
    assert listed == "one_00001_.melody.txt [output]" and KIND.names() == [] and KIND.check(listed) is True and KIND.resolve(listed) == path


def test_the_input_folder_lists_all_that_is_read(folders):
    for name in ("b.mid", "a.TXT", "c.png"):
        (folders / "input" / name).write_bytes(b"")
    assert KIND.names() == ["a.TXT", "b.mid"]
    assert replace(KIND, offered=(".mid",)).names() == ["b.mid"]


def test_a_changed_file_has_another_stamp():
    path, listed = write()
    before = KIND.stamp(listed)
    assert KIND.stamp(listed) == before
    os.utime(path, ns=(1, 1))
    assert KIND.stamp(listed) != before and KIND.stamp("gone.mid") == "gone.mid" and KIND.stamp(None) == "None"


@pytest.mark.parametrize("name, words", [(NONE, "no melody file yet: save one with Save Melody"), ("gone.mid", "does not exist"), ("../x.mid", "outside"),
                                         ("/etc/passwd", "outside"), ("picture.png", "does not end in .txt or .mid")])
def test_bad_names_are_one_sentence(name, words):
    said = KIND.check(name)
    assert words in said and said.endswith(".") and "\n" not in said


def test_a_linked_name_is_only_known_when_it_runs():
    assert KIND.check(None) is True
