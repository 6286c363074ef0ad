"""The scene reader's lines on the contact sheet."""
import io

import numpy as np
import pytest
from PIL import Image

from palimpsest.devtools import reading
from palimpsest.devtools.graphs import Role
from palimpsest.mini.captions import caption
from palimpsest.mini.reader import read
from palimpsest.mini.scenes import edited, render, sample_scene

SCENE = sample_scene(1, 1)
BLUE = edited(SCENE, "color", "blue")


def png(scene) -> bytes:
    data = io.BytesIO()
    Image.fromarray((render(scene) * 255).round().astype(np.uint8)).save(data, "PNG")
    return data.getvalue()


def lines(before, after, prompt, row=1):
    outputs = [(Role("input", 1, ""), [png(before)], ""), (Role("edit", row, ""), [png(after)], ""), (Role("edit caption", row, ""), [], prompt)]
    return "\n".join(text for _, _, text in reading.scores(outputs))


def test_an_edit_that_is_what_was_asked_for_is_said_to_be():
    text = lines(SCENE, BLUE, caption(BLUE, 1, 1.0)[0])
    assert "all that the prompt names is there" in text and "structure kept" in text and "object IoU 1.00" in text
    assert " blue " in text and SCENE.objects[0].shape in text


def test_an_edit_that_did_not_happen_names_the_attribute():
    assert "not as the prompt says: color" in lines(SCENE, SCENE, caption(BLUE, 1, 1.0)[0])


@pytest.mark.parametrize(("attribute", "values"), [("shape", ("star", "circle")), ("size", ("small", "large"))])
def test_a_lost_structure_names_what_was_lost(attribute, values):
    changed = edited(SCENE, attribute, next(value for value in values if value != getattr(SCENE.objects[0], attribute)))
    assert attribute in reading.structure(read(render(SCENE)), read(render(changed))).split("(")[1]


def test_a_lost_object_is_told():
    two = sample_scene(2, 2)
    assert "number of objects" in reading.structure(read(render(two)), read(render(type(two)(two.objects[:1], two.background, two.background_rgb, two.style))))


def test_a_row_without_an_input_is_compared_with_the_first():
    assert "structure kept" in lines(SCENE, BLUE, caption(BLUE, 1, 1.0)[0], row=2)


def test_a_prompt_of_other_words_is_not_judged():
    text = lines(SCENE, BLUE, "an elephant in the garden")
    assert "prompt" not in text and "structure kept" in text


def test_other_pictures_are_left_alone():
    data = io.BytesIO()
    Image.new("RGB", (512, 64)).save(data, "PNG")
    assert reading.scores([(Role("edit", 1, ""), [data.getvalue()], ""), (Role("film strip", 1, ""), [png(SCENE)], "")]) == []
