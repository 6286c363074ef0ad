"""The score of Versatile Diffusion: its cases, its judgement where the truth is known, and its runs on a model with random weights."""
from dataclasses import replace

import pytest
import torch

from palimpsest.devtools import figures, scoring
from palimpsest.devtools.scores import versatile as score, visii
from palimpsest.devtools.scores.seecoder import judged, right
from palimpsest.devtools.scoring import HELD_OUT, VALIDATION, pictures
from palimpsest.mini.parse import parse
from palimpsest.mini.reader import read
from palimpsest.mini.scenes import COLORS, SHAPES, edited

FIRST = VALIDATION + score.OFFSET
PAIRS = [score.pair(seed) for seed in range(FIRST, FIRST + 20)]
SCENES = [score.plain_scene(seed) for seed in range(FIRST, FIRST + 12)]


def other(table, *taken):
    return next(word for word in table if word not in taken)


def test_a_perfect_variation_is_kept_and_another_color_shape_or_number_is_not():
    assert {len(scene.objects) for scene in SCENES} == {1, 2} and all(obj.pattern == "plain" for scene in SCENES for obj in scene.objects)
    assert sum(right(judged(read(image), scene)) for image, scene in zip(pictures(SCENES), SCENES)) >= 11
    for scene in SCENES:
        taken = [obj.color for obj in scene.objects]
        wrong = [edited(scene, "color", other(COLORS, *taken), 0, 1), edited(scene, "shape", other(SHAPES, scene.objects[0].shape), 0, 1)]
        wrong += [replace(scene, objects=scene.objects[:1])] if len(scene.objects) == 2 else []
        assert not any(right(judged(read(image), scene)) for image in pictures(wrong))


def test_both_sides_of_a_pair_differ_in_all_three_and_the_caption_names_all():
    for found in PAIRS:
        assert found == score.pair(found.seed)
        shown, named = score.attributes(found.picture), score.attributes(found.text)
        assert set(shown) == set(score.ATTRIBUTES) and not any(shown[name] == named[name] for name in shown)
        (obj,), whole = parse(found.caption)
        assert {**obj, **whole}.items() >= named.items() and {"place", "size"} <= set(obj) and set(whole) == {"background", "style"}
    assert len({found.text for found in PAIRS}) == len(PAIRS)


def steps(found):
    """Five scenes from the picture's to the text's: color, shape, then background, place and the rest."""
    a, b = found.picture, found.text
    one = edited(a, "color", b.objects[0].color, 0, 1)
    two = edited(one, "shape", b.objects[0].shape, 0, 1)
    return [a, one, two, replace(two, background=b.background, background_rgb=b.background_rgb), b]


def test_a_way_from_picture_to_text_is_monotonic_and_its_detours_are_not():
    straight = [score.judge_blend(pictures(steps(found)), found) for found in PAIRS[:10]]
    assert sum(one.by_reader for one in straight) >= 9
    assert [sum(one.text[i] for one in straight) for i in (0, 4)] == [0, 30] and sum(one.picture[0] for one in straight) == 30 and sum(one.picture[4] for one in straight) == 0
    for found in PAIRS[:2]:
        scenes = pictures(steps(found))
        for order in ([4, 3, 2, 1, 0], [0, 3, 1, 2, 4], [0, 0, 0, 0, 0], [4, 4, 4, 4, 4], [0, 1, 1, 1, 1]):
            detour = score.judge_blend(scenes[order], found)
            # the last one moves a step, but ends nearer to the picture
            assert not detour.by_reader, order


def test_the_way_by_pixels():
    start, end = torch.zeros(4, 4, 3), torch.ones(4, 4, 3)
    sideways = torch.cat([torch.ones(2, 4, 3), -torch.ones(2, 4, 3)])
    images = torch.stack([start, 0.3 * end + 5 * sideways, 0.29 * end, 0.8 * end, end])
    assert score.way(images) == pytest.approx([0.0, 0.3, 0.29, 0.8, 1.0])
    blend = score.Blend((0, 1, 2, 3, 3), (3, 2, 1, 0, 0), tuple(score.way(images)))
    assert blend.by_picture and blend.by_reader
    assert not replace(blend, way=(0.0, 0.3, 0.27, 0.8, 1.0)).by_picture
    assert not replace(blend, way=(0.0, 0.3, 0.289, 0.279, 1.0)).by_picture, "small steps back add up"
    assert score.way(torch.stack([end, start, end])) == [0.0, 0.0, 0.0] and not replace(blend, way=(0.0,) * 5).by_picture


@pytest.mark.parametrize("text, picture, expected", [
    ((0, 0, 1, 2, 3), (3, 2, 2, 1, 0), True), ((0, 0, 0, 0, 3), (3, 3, 3, 3, 0), True), ((0, 2, 1, 3, 3), (3, 1, 1, 0, 0), False),
    ((0, 1, 1, 1, 1), (3, 2, 2, 2, 1), False), ((1, 1, 2, 3, 3), (1, 1, 0, 0, 0), False), ((0, 1, 2, 3, 2), (3, 2, 1, 0, 0), False),
])
def test_monotonic_by_the_reader(text, picture, expected):
    assert score.Blend(text, picture, (0.0, 0.2, 0.4, 0.6, 1.0)).by_reader is expected


def test_nothing_to_read_keeps_nothing():
    scene = replace(PAIRS[0].picture, objects=())
    empty = read(pictures([scene])[0])
    assert score.largest(empty) is None and score.found_of(empty, PAIRS[0].picture) == 1, "the background alone"


def test_no_seed_of_two_parts_or_scores_meets():
    assert score.OFFSET >= visii.OFFSET + visii.APART * visii.EDITS
    assert max(score.COUNT, score.PATTERNED) <= score.PAIR_OFFSET and score.PAIRS < score.APART
    # further tries of a pair lie APART above each other; nobody needs fifty
    assert score.PAIR_OFFSET + 50 * score.APART <= score.FOCUS_OFFSET and HELD_OUT + score.OFFSET + score.FOCUS_OFFSET + score.FOCUSED < VALIDATION


@pytest.fixture(scope="module")
def model():
    """The mini family's text encoder, autoencoder and vision tower around a Versatile Diffusion with random weights."""
    from palimpsest.mini import checkpoint, towers
    from palimpsest.tests.helpers.versatile import tiny

    mini = object.__new__(scoring.Mini)
    _, mini.clip, mini.vae = checkpoint.load("text_to_image")
    mini.model = tiny(context=128)
    vision = towers.load_clip_vision(checkpoint.WEIGHTS)
    vision.context_width = 128
    return score.Versatile(mini, vision)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(score, "STEPS", 2)


def test_the_ends_of_a_blend_are_the_variation_and_the_drawing_of_the_text_alone(model, short):
    pair = PAIRS[:2]
    images, seeds = model.blends(pair), [one.seed for one in pair]
    assert images.shape == (5, 2, 128, 128, 3)
    assert torch.equal(images[0], model.variations([one.picture for one in pair], seeds, cfg=score.BLEND_CFG))
    words, no_words = model.mini.prompts([one.caption for one in pair]), model.mini.prompts([""] * 2)
    assert torch.equal(images[-1], model.draw(words, no_words, seeds, score.BLEND_CFG))
    assert all(not torch.equal(a, b) for a, b in zip(images, images[1:]))
    alone = model.blends(pair[1:])
    assert torch.allclose(alone[:, 0], images[:, 1], atol=1e-3), "a pair is drawn alike alone and in a batch"


def test_the_focus_reaches_the_picture_and_the_middle_is_the_plain_variation(model, short):
    scenes = [one.picture for one in PAIRS[:2]]
    plain, middle, style, semantics = (model.variations(scenes, [1, 2], *level) for level in ((), (0.5,), (1.0,), (0.0,)))
    assert torch.equal(plain, middle)
    assert len({float(image.double().sum()) for image in (plain, style, semantics)}) == 3


def test_a_quick_score_gives_every_key(model, short, monkeypatch):
    monkeypatch.setattr(score, "Versatile", lambda: model)
    monkeypatch.setattr(score, "batches", lambda items: scoring.batches(items, 4))
    found = score.score(quick=True)
    keys = {key for key, _ in figures.leaves(figures.complete(found))}
    assert {"versatile.variation_kept", "versatile.variation.patterned", "versatile.variation.details.shape", "versatile.blend_monotonic", "versatile.blend.monotonic_by_picture",
            "versatile.blend.monotonic_by_both", "versatile.blend.sweep.ratio_0_25.text", "versatile.blend.sweep.ratio_1.picture", "versatile.focus.level_0.shape",
            "versatile.focus.level_0_75.color"} <= keys
    assert set(score.QUICK_LIMITS) <= keys
    assert found["versatile"]["variation_kept"]["n"] == 10 and found["versatile"]["focus"]["level_0"]["color"]["n"] == 4


def leaf(value):
    return {"value": value, "n": 1, "seeds": "0", "versions": {}}


def test_both_pictures_are_drawn_from_the_figures(tmp_path):
    sweep = {score.ratio_key(ratio): {"text": leaf(ratio), "picture": leaf(1 - ratio)} for ratio in score.RATIOS}
    levels = {score.level_key(level): {"color": leaf(0.5 + level / 2), "shape": leaf(1 - level)} for level in score.LEVELS}
    known = {"versatile": {"blend": {"sweep": sweep}, "focus": levels}}
    found = score.curves(known)
    assert found[score.BLEND_PICTURE]["as the text names it"] == [("", ratio, ratio) for ratio in score.RATIOS]
    assert [y for _, _, y in found[score.FOCUS_PICTURE]["shape kept"]] == [1.0, 0.75, 0.5, 0.25, 0.0]
    score.plot(known, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [score.BLEND_PICTURE, score.FOCUS_PICTURE]
    with pytest.raises(ValueError, match="run the full score"):
        score.plot({}, tmp_path / "none")
    assert not (tmp_path / "none").exists()
