"""The scores: their cases are fixed and disjoint, their judgement is right where the truth is known. No model runs here (`score --quick` does)."""
import importlib

import pytest
import torch

from palimpsest.devtools import score, scoring
from palimpsest.devtools.scores import pnp
from palimpsest.devtools.scoring import HELD_OUT, VALIDATION
from palimpsest.mini import train_autoencoder, train_text_to_image
from palimpsest.mini.parse import parse


def test_every_score_can_be_called():
    names = score.scores()
    assert {"scene_reader", "autoencoder", "text_to_image", "inversion", "pnp"} <= set(names)
    for name in names:
        module = importlib.import_module(f"palimpsest.devtools.scores.{name}")
        assert callable(module.score) and module.__doc__
        assert all(limit.startswith(f"{name}.") for limit in module.QUICK_LIMITS)


def test_no_seed_is_scored_that_was_trained_or_tuned_on():
    trained = {*range(train_autoencoder.TRAIN_SEED, train_autoencoder.TRAIN_SEED + train_autoencoder.POOL),
               *range(train_text_to_image.TRAIN_SEED, train_text_to_image.TRAIN_SEED + train_text_to_image.SCENES)}
    held = {case.seed for kind in pnp.KINDS for case in pnp.cases(kind, HELD_OUT, pnp.PER_KIND)}
    tuned = {case.seed for kind in pnp.KINDS for case in pnp.cases(kind, VALIDATION, 200)}
    assert len(held) == 200
    assert not held & tuned and not (held | tuned | set(range(HELD_OUT, HELD_OUT + 500))) & trained


@pytest.mark.parametrize("kind", pnp.KINDS)
def test_a_case_is_one_edit_with_words_that_name_it(kind):
    for first, second in zip(pnp.cases(kind, HELD_OUT, 20), pnp.cases(kind, HELD_OUT, 20)):
        assert first == second
        (named, whole), (new_named, new_whole) = parse(first.source), parse(first.prompt)
        pair = (whole, new_whole) if kind in ("style", "background") else (named[first.index], new_named[first.index])
        assert pair[0][kind] != pair[1][kind]
        assert [o.place for o in first.scene.objects] == [o.place for o in first.target.objects]


@pytest.mark.parametrize("kind", pnp.KINDS)
def test_the_perfect_edit_scores_one_and_the_untouched_picture_zero(kind):
    """What the metric gives at best and at worst; a method lies between."""
    batch = pnp.cases(kind, VALIDATION, 12)
    best = pnp.judge(scoring.pictures([c.target for c in batch]), batch)
    assert sum(best.success) >= 11 and sum(best.kept) >= 11 and min(best.iou) > 0.8
    untouched = pnp.judge(scoring.pictures([c.scene for c in batch]), batch)
    assert sum(untouched.success) == 0 and sum(untouched.kept) >= 11


def test_another_scene_keeps_no_structure():
    batch = pnp.cases("color", VALIDATION, 10)
    others = pnp.judge(scoring.pictures([c.scene for c in batch[1:] + batch[:1]]), batch)
    assert sum(others.kept) <= 1


def test_a_row_samples_alike_alone_and_in_a_batch(monkeypatch):
    """Noise belongs to the row, not to its place in the batch."""
    import comfy.sample

    seen = []
    monkeypatch.setattr(comfy.sample, "sample", lambda model, noise, *args, **kwargs: seen.append(noise) or noise)
    mini = object.__new__(scoring.Mini)
    latent = torch.zeros(3, 4, 16, 16)
    mini.sample(None, [], latent, [5, 6, 7], steps=2, cfg=1.0, negative=[])
    mini.sample(None, [], latent[:1], [6], steps=2, cfg=1.0, negative=[])
    assert torch.equal(seen[0][1:2], seen[1])
    mini.sample(None, [], latent, None, steps=2, cfg=1.0, negative=[])
    assert not seen[2].any()


def test_intervals_hold_the_value():
    leaf = scoring.rate([True] * 7 + [False] * 3, "0..9")
    assert leaf["low"] < leaf["value"] == 0.7 < leaf["high"] and leaf["n"] == 10
    leaf = scoring.mean([1.0, 2.0, 3.0], "0..2")
    assert leaf["low"] < leaf["value"] == 2.0 < leaf["high"]
