"""Scores: what they count as right, on readings made by hand."""
from dataclasses import replace

import pytest

from palimpsest.mini import metrics
from palimpsest.mini.captions import caption
from palimpsest.mini.reader import read
from palimpsest.mini.scenes import edited, render, sample_scene


def two_objects(**wanted):
    """A scene of two objects that a reader reads without fault."""
    return next(s for s in (sample_scene(seed, 2) for seed in range(400)) if all(getattr(s.objects[0], k) == v for k, v in wanted.items()))


@pytest.fixture(scope="module")
def scene():
    return two_objects(pattern="plain", color="red")


@pytest.fixture(scope="module")
def reading(scene):
    return read(render(scene))


def changed(reading, scene, index, **values):
    """The reading with attributes of the scene's object `index` replaced."""
    wanted = metrics.match_objects(reading, scene)[index]
    return replace(reading, objects=tuple(replace(o, **values) if o is wanted else o for o in reading.objects))


def test_a_perfect_reading_is_right_everywhere(reading, scene):
    assert all(all(values) for values in metrics.against_scene(reading, scene).values())
    text, named, whole = caption(scene, 0, 1.0)
    assert all(all(values) for values in metrics.against_caption(reading, named, whole).values())
    assert metrics.structure_kept(reading, scene)
    assert metrics.object_iou(reading, scene) > 0.9


def test_a_wrong_color_is_one_wrong_value(reading, scene):
    wrong = changed(reading, scene, 1, color="none of them")
    found = metrics.against_scene(wrong, scene)
    assert found["color"] == [True, False]
    assert all(all(values) for attribute, values in found.items() if attribute != "color")


def test_objects_are_matched_by_place_not_by_order(reading, scene):
    turned = replace(reading, objects=reading.objects[::-1])
    assert metrics.match_objects(turned, scene) == metrics.match_objects(reading, scene)


def test_a_missing_object_counts_against_every_attribute(reading, scene):
    one = replace(reading, objects=reading.objects[:1])
    found = metrics.against_scene(one, scene)
    assert found["count"] == [False] and sum(found["shape"]) == 1 and len(found["shape"]) == 2
    assert not metrics.structure_kept(one, scene)
    assert metrics.object_iou(one, scene) < 0.6


def test_an_extra_object_breaks_count_and_structure(reading, scene):
    three = replace(reading, objects=(*reading.objects, replace(reading.objects[0], cx=5.0)))
    assert metrics.against_scene(three, scene)["count"] == [False]
    assert not metrics.structure_kept(three, scene)


def test_nothing_read_is_all_wrong(reading, scene):
    empty = replace(reading, objects=())
    assert not any(metrics.against_scene(empty, scene)["shape"])
    assert metrics.object_iou(empty, scene) == 0
    assert not metrics.edit_success(empty, scene, "color")


def test_captions_bind_attributes_to_objects(reading, scene):
    """A red circle and a blue star is not a blue circle and a red star."""
    first, second = ({a: getattr(o, a) for a in ("shape", "color", "place")} for o in scene.objects)
    swapped = [{**first, "color": second["color"]}, {**second, "color": first["color"]}]
    assert all(metrics.against_caption(reading, [second, first], {})["color"])
    assert not all(metrics.against_caption(reading, swapped, {})["color"]) or first["color"] == second["color"]


@pytest.mark.parametrize("pattern, style, either", [
    ("striped", "flat", True), ("checked", "flat", True), (None, "flat", True), ("dotted", "flat", False), ("striped", "outline", False)])
def test_half_and_half_patterns_name_their_colors_in_either_order(reading, pattern, style, either):
    """Filled stripes and checks cover half of an object; dots and an outline's marks do not."""
    only = replace(reading.objects[0], color="red", color2="blue", pattern=pattern)
    picture = replace(reading, objects=(only,), style=style)
    named = {"shape": only.shape, "color": "blue", "color2": "red"}
    found = metrics.against_caption(picture, [named], {})
    assert found["color"] == found["color2"] == [either]
    assert metrics.against_caption(picture, [{"color": "green"}], {})["color"] == [False]
    assert metrics.against_caption(picture, [{"color": "red", "color2": "blue"}], {})["color"] == [True]


@pytest.mark.parametrize("attribute, value", [("color", "teal"), ("pattern", "striped"), ("style", "outline"), ("background", "sky")])
def test_edit_success_asks_for_the_new_value(scene, attribute, value):
    scene = replace(scene, style="flat", background="white", background_rgb=(0.95, 0.95, 0.95))
    target = edited(scene, attribute, value, 0)
    assert metrics.edit_success(read(render(target)), target, attribute, 0)
    assert not metrics.edit_success(read(render(scene)), target, attribute, 0)
    assert metrics.structure_kept(read(render(target)), scene)


@pytest.mark.parametrize("attribute, value", [("shape", "square"), ("size", "small")])
def test_structure_is_not_kept_by_an_edit_of_shape_or_size(attribute, value):
    scene = two_objects(shape="circle", size="large", pattern="plain")
    assert not metrics.structure_kept(read(render(edited(scene, attribute, value))), scene)


def test_wilson_interval():
    low, high = metrics.wilson(150, 200)
    assert (round(low, 4), round(high, 4)) == (0.6857, 0.8049)
    assert metrics.wilson(0, 10)[0] == pytest.approx(0) and metrics.wilson(10, 10)[1] == pytest.approx(1)
    assert metrics.wilson(10, 10)[0] == pytest.approx(0.7225, abs=1e-4)
    for bad in ((1, 0), (3, 2), (-1, 5)):
        with pytest.raises(ValueError, match="successes"):
            metrics.wilson(*bad)
