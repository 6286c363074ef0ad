"""The scene reader: right on drawings, right on blurred ones, honest about everything else."""
import collections
import random

import numpy as np
import pytest
from scipy import ndimage

from palimpsest.mini import reader, reader_fit
from palimpsest.mini.metrics import against_scene
from palimpsest.mini.scenes import SHAPES, coverage, edited, inside_distance, masks, render, sample_object, sample_scene

SEEDS = range(70_000_000, 70_000_060)
Y, X = np.mgrid[:128, :128] + 0.5


def accuracy(change=lambda image, seed: image):
    """Fraction read right per attribute over SEEDS."""
    right = collections.defaultdict(list)
    for seed in SEEDS:
        scene = sample_scene(seed)
        for attribute, values in against_scene(reader.read(change(render(scene), seed)), scene).items():
            right[attribute] += values
    return {attribute: np.mean(values) for attribute, values in right.items()}


def blob(distance, color=(0.2, 0.3, 0.9), ground=(0.95, 0.95, 0.95)):
    """A picture of one colour where `distance` > 0."""
    cover = coverage(distance)[..., None]
    return (cover * np.array(color) + (1 - cover) * np.array(ground)).astype(np.float32)


def test_every_attribute_of_drawn_scenes():
    found = accuracy()
    assert min(found.values()) >= 0.98, found


def test_every_attribute_of_blurred_and_noisy_scenes():
    """What an autoencoder does to a picture, without one."""
    def worse(image, seed):
        noise = np.random.default_rng(seed).normal(0, 0.02, image.shape)
        return (ndimage.gaussian_filter(image, (0.9, 0.9, 0)) + noise).astype(np.float32)

    found = accuracy(worse)
    assert min(found.values()) >= 0.95, found


def test_numbers_and_masks_fit_the_drawing():
    for seed in SEEDS[:15]:
        scene = sample_scene(seed, 2)
        for read, obj, mask in sorted_pairs(scene):
            assert abs(read.cx - obj.cx) < 0.5 and abs(read.cy - obj.cy) < 0.5 and abs(read.radius - obj.radius) < 0.7
            # colours come back as drawn, not as a word's middle
            assert np.abs(np.subtract(read.rgb, obj.rgb)).max() < 0.06
            assert (read.mask & (mask > 0.5)).sum() / (read.mask | (mask > 0.5)).sum() > 0.85
            assert 0 <= read.confidence <= 1


def sorted_pairs(scene):
    order = sorted(range(2), key=lambda i: scene.objects[i].cx)
    return [(read, scene.objects[i], masks(scene)[i]) for read, i in zip(reader.read(render(scene)).objects, order)]


def test_it_is_deterministic_and_leaves_the_picture_alone():
    image = render(sample_scene(5))
    before = image.copy()
    first, second = reader.read(image), reader.read(image)
    assert np.array_equal(image, before)
    assert [(o.shape, o.rgb, o.cx) for o in first.objects] == [(o.shape, o.rgb, o.cx) for o in second.objects]


@pytest.mark.parametrize("attribute, value", [("color", "pink"), ("pattern", "checked"), ("style", "outline"), ("background", "brown"), ("shape", "triangle"), ("size", "small")])
def test_it_sees_the_edited_attribute_change(attribute, value):
    scene = next(s for s in (sample_scene(seed, 1) for seed in range(99)) if s.style == "flat" and s.background != "brown" and s.objects[0].pattern == "plain"
                 and s.objects[0].size == "large" and s.objects[0].color == "blue" and s.objects[0].shape != "triangle")
    plain, twin = reader.read(render(scene)), reader.read(render(edited(scene, attribute, value)))
    pair = (plain, twin) if attribute in ("background", "style") else (plain.objects[0], twin.objects[0])
    assert getattr(pair[0], attribute) != value and getattr(pair[1], attribute) == value


def test_an_empty_picture_has_no_objects():
    read = reader.read(np.full((128, 128, 3), 0.55, np.float32))
    assert read.objects == () and read.background == "gray" and read.style is None


def test_noise_is_no_scene():
    read = reader.read(np.random.default_rng(0).uniform(size=(128, 128, 3)))
    assert read.background is None
    assert all(o.shape is None for o in read.objects)


@pytest.mark.parametrize("stretch", [1.25, 1.5, 2.0])
def test_a_stretched_circle_is_no_shape(stretch):
    """Regression: blobs were called by the nearest shape whatever they looked like."""
    read = reader.read(blob(20 - np.hypot((X - 64) / stretch, (Y - 64) * stretch)))
    assert len(read.objects) == 1
    only = read.objects[0]
    assert only.shape is only.color is only.pattern is only.size is None and only.confidence == 0
    assert only.place == "center"


def test_random_blobs_are_mostly_no_shape():
    unnamed = total = 0
    for seed in range(12):
        field = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(128, 128)), 7)
        field = field / field.std() - ((X - 64) ** 2 + (Y - 64) ** 2) / 900 + 0.4
        objects = [o for o in reader.read(blob(8 * field)).objects if o.mask.sum() > 500]
        total += len(objects)
        unnamed += sum(o.shape is None for o in objects)
    assert total >= 8 and unnamed / total > 0.6


def test_a_gray_object_has_a_shape_but_no_color():
    only = reader.read(blob(24 - np.hypot(X - 64, Y - 64), (0.3, 0.3, 0.3))).objects[0]
    assert (only.shape, only.color) == ("circle", None)


def painted(distance, colors, seed=0, cell=4):
    """A picture whose object is filled with cells of random ones of `colors`."""
    rng = np.random.default_rng(seed)
    cells = rng.integers(len(colors), size=(-(-128 // cell), -(-128 // cell))).repeat(cell, 0).repeat(cell, 1)
    cover = coverage(distance)[..., None]
    return (cover * np.array(colors)[cells][:128, :128] + (1 - cover) * 0.95).astype(np.float32)


RED, BLUE = (0.84, 0.12, 0.12), (0.2, 0.3, 0.86)


@pytest.mark.parametrize("shape", SHAPES)
def test_marks_that_are_no_pattern_hide_neither_shape_nor_colors(shape):
    """Regression: a generated object whose checks were warped had no name at all, and a mixture of its colors named it."""
    only = reader.read(painted(inside_distance(shape, X - 64, Y - 64, 28), (RED, BLUE))).objects[0]
    assert (only.shape, only.pattern, {only.color, only.color2}) == (shape, None, {"red", "blue"})


@pytest.mark.parametrize("shape", SHAPES)
def test_scribbles_inside_an_outline_hide_neither_its_shape_nor_its_color(shape):
    distance = inside_distance(shape, X - 64, Y - 64, 28)
    image = painted(distance - 5, (*[(0.95, 0.95, 0.95)] * 4, (0.1, 0.6, 0.2), (0.9, 0.5, 0.1)), cell=3)
    line = (coverage(distance) - coverage(distance - 4))[..., None]
    only = reader.read((image * (1 - line) + line * np.array(BLUE)).astype(np.float32)).objects[0]
    assert (only.shape, only.color) == (shape, "blue")


def test_many_colors_have_no_name():
    colors = [(0.84, 0.1, 0.1), (0.1, 0.6, 0.2), (0.2, 0.3, 0.86), (0.95, 0.9, 0.1), (0.6, 0.2, 0.7)]
    only = reader.read(painted(28 - np.hypot(X - 64, Y - 64), colors)).objects[0]
    assert only.pattern is None and not {only.color, only.color2} - {None} or only.shape is None


def test_more_objects_than_two_are_counted():
    image = blob(np.maximum.reduce([17 - np.hypot(X - x, Y - y) for x, y in ((25, 25), (100, 30), (60, 100))]))
    assert len(reader.read(image).objects) == 3
    assert len(reader.read(image, count=2).objects) == 2


def test_objects_that_touch_are_two():
    """Regression: corners of large squares may touch once blurred, and one part fits no drawing."""
    image = blob(np.maximum(22 - np.hypot(X - 40, Y - 60), 22 - np.hypot(X - 83, Y - 64)))
    assert [o.shape for o in reader.read(image).objects] == ["circle", "circle"]


def test_specks_are_no_objects():
    assert len(reader.read(blob(np.maximum(20 - np.hypot(X - 64, Y - 64), 3 - np.hypot(X - 20, Y - 20)))).objects) == 1


@pytest.mark.parametrize("height, width", [(192, 128), (128, 256), (64, 64)])
def test_other_sizes_keep_pixels_and_read_places_relative(height, width):
    y, x = np.mgrid[:height, :width] + 0.5
    only = reader.read(blob(19 - np.hypot(x - 0.5 * width, y - 0.5 * height))).objects[0]
    assert (only.shape, only.size, only.place, only.mask.shape) == ("circle", "small", "center", (height, width))


@pytest.mark.parametrize("shape", [(1, 128, 128, 3), (128, 128), (128, 128, 4), (32, 128, 3), (3, 128, 128)])
def test_what_is_no_picture_is_refused_in_a_sentence(shape):
    with pytest.raises(ValueError, match=r"one picture \[H, W, 3\]"):
        reader.read(np.zeros(shape))


def test_nan_is_refused_in_a_sentence():
    image = render(sample_scene(1))
    image[3, 3] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        reader.read(image)


def test_tensors_are_read_like_arrays():
    import torch

    scene = sample_scene(4)
    assert reader.read(torch.from_numpy(render(scene))).objects[0].shape == reader.read(render(scene)).objects[0].shape


def test_start_values_find_every_shape_at_any_tilt():
    rng = random.Random(0)
    for shape in SHAPES:
        for _ in range(5):
            obj = sample_object(rng, {"shape": shape})
            dx, dy = X - obj.cx, Y - obj.cy
            cos, sin = np.cos(obj.tilt), np.sin(obj.tilt)
            starts = reader_fit.silhouettes(inside_distance(shape, cos * dx + sin * dy, -sin * dx + cos * dy, obj.radius) > 0)
            assert starts[0][0] == shape
            assert np.abs(starts[0][1] - [obj.cx, obj.cy, obj.radius, obj.tilt if shape != "circle" else 0]).max() < 1.0


@pytest.mark.parametrize("color, other, name", [
    ((0.86, 0.62, 0.68), (0.92, 0.83, 0.67), "pink"), ((0.89, 0.66, 0.66), (0.96, 0.70, 0.14), "pink"), ((0.84, 0.12, 0.12), (0.1, 0.1, 0.1), "red"),
    ((0.5, 0.5, 0.52), (0.1, 0.1, 0.1), None)])
def test_a_mixed_color_is_named_after_its_purer_self(color, other, name):
    """Regression: a pink mark on beige decodes to a pale red, and was called red."""
    assert reader_fit.color_name(np.array(color), np.array(other)) == name


def test_each_style_draws_its_own_layers():
    """The fit's layers are those that `scenes` draws."""
    from palimpsest.mini.scenes import object_layers

    obj = sample_object(random.Random(2), {"pattern": "dotted"})
    patch = reader_fit.Patch(np.zeros((128, 128, 3)), (1, 1, 1), np.ones((128, 128), bool), np.zeros((128, 128), bool))
    frame = patch.frame(obj.shape, [obj.cx, obj.cy, obj.radius, obj.tilt])
    for style in ("flat", "outline"):
        drawn = object_layers(obj, style, (0, 0, 128, 128))[1:]
        assert np.allclose(patch.layers(frame, "dotted", style), np.stack(drawn))
