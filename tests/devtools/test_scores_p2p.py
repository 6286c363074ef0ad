"""The score of Prompt-to-Prompt: its cases, and its judgement where the truth is known. No model runs here."""
from dataclasses import replace

import pytest

from palimpsest.devtools import readme, scoring
from palimpsest.devtools.scores import inversion_repairs, p2p
from palimpsest.devtools.scoring import HELD_OUT, VALIDATION
from palimpsest.mini.metrics import background_psnr, edit_success, others_kept
from palimpsest.mini.parse import parse
from palimpsest.mini.reader import read


def seeds_of(kind: str, first: int, count: int) -> list[int]:
    start = first + p2p.OFFSET + p2p.APART * list(p2p.KINDS).index(kind)
    return list(range(start, start + count))


@pytest.mark.parametrize("kind", p2p.KINDS)
def test_a_case_is_one_edit_with_words_that_name_it(kind):
    for seed in seeds_of(kind, VALIDATION, 20):
        found = p2p.case(kind, seed)
        (named, whole), (new_named, new_whole) = parse(found.source), parse(found.prompt)
        old, new = (whole, new_whole) if kind in ("style", "background") else (named[found.index], new_named[found.index])
        assert old.get(kind) != new[kind] and (kind != "style" or "style" not in old)
        assert found == p2p.case(kind, seed)


def test_the_swapped_words_are_those_that_differ():
    for kind in ("color", "shape"):
        for seed in seeds_of(kind, VALIDATION, 20):
            found = p2p.case(kind, seed)
            new, old = p2p.swapped(found)
            assert new and old and new in found.prompt and old in found.source and {new, old}.isdisjoint({"a", "an"})


@pytest.mark.parametrize("kind", p2p.KINDS)
def test_the_perfect_edit_is_kept_and_another_scene_is_not(kind):
    kept, other, success = [], [], []
    for seed in seeds_of(kind, VALIDATION, 12):
        found = p2p.case(kind, seed)
        source, twin, stranger = (read(picture) for picture in scoring.pictures([found.scene, found.target, p2p.case(kind, seed + 100).scene]))
        kept.append(others_kept(twin, source, kind, p2p._place(found, source)))
        other.append(others_kept(stranger, source, kind, p2p._place(found, source)))
        success.append(edit_success(twin, found.target, kind, found.index))
    assert sum(kept) >= 11 and sum(other) == 0 and sum(success) >= 11


def test_what_cannot_be_read_in_the_source_is_not_judged():
    found = p2p.case("color", seeds_of("color", VALIDATION, 1)[0])
    source, twin = (read(picture) for picture in scoring.pictures([found.scene, found.target]))
    assert others_kept(twin, source, "color", p2p._place(found, source))
    first, *rest = source.objects

    def with_size(size):
        return replace(source, objects=type(source.objects)([replace(first, size=size), *rest]))

    assert not others_kept(twin, with_size("small" if first.size == "large" else "large"), "color", p2p._place(found, source))
    assert others_kept(twin, with_size(None), "color", p2p._place(found, source))


def test_background_psnr_leaves_the_objects_out():
    found = p2p.case("color", seeds_of("color", VALIDATION, 1)[0])
    before, after = (picture.numpy() for picture in scoring.pictures([found.scene, found.target]))
    assert background_psnr(after, before, read(after), read(before)) > 60
    assert background_psnr((after * 0.9), before, read(after), read(before)) < 40


def test_no_seed_of_two_scores_meets():
    used = [seed for kind in p2p.KINDS for seed in seeds_of(kind, HELD_OUT, p2p.APART)]
    repairs = [HELD_OUT + inversion_repairs.OFFSET + inversion_repairs.APART * i + j for i in range(2) for j in range(inversion_repairs.PER_KIND)]
    assert len(set(used) | set(repairs)) == len(used) + len(repairs) and min(used) > HELD_OUT + 100_000 and max(repairs) < VALIDATION


def test_the_ways_back_stand_side_by_side():
    leaf = {"value": 0.5, "n": 20, "seeds": "", "versions": {}}
    found = {way: {"structure_kept": leaf, "background_psnr_db": leaf, "edit_success": leaf, "seconds": {**leaf, "value": 3.0}} for way in inversion_repairs.WAYS}
    lines = readme.repairs(found).splitlines()
    assert len(lines) == 6 and lines[2].endswith("| 0.5 | 0.5 | 0.5 | 3 |") and readme.repairs({}) == readme.NONE_YET
