"""The score of multi-reference self-attention: its pairs, and its judgement where the truth is known. No model runs here."""
from dataclasses import replace

from palimpsest.devtools import scoring
from palimpsest.devtools.scores import inversion_repairs, mrsa, p2p
from palimpsest.devtools.scoring import HELD_OUT, VALIDATION
from palimpsest.mini.parse import parse
from palimpsest.mini.reader import read
from palimpsest.mini.scenes import COLORS, PATTERNS, edited

SEEDS = range(VALIDATION + mrsa.OFFSET, VALIDATION + mrsa.OFFSET + 20)
PAIRS = [mrsa.pair(seed, plain=False) for seed in SEEDS]


def drawn(scene):
    return read(scoring.pictures([scene])[0])


def test_the_prompt_names_neither_colors_nor_patterns_and_each_reference_names_its_own():
    for found in PAIRS:
        objects, whole = parse(found.prompt)
        assert len(objects) == 2 and all(not set(named) & set(mrsa.LOOKS) and {"shape", "place"} <= set(named) for named in objects)
        assert not set(found.prompt.replace(",", "").split()) & (set(COLORS) | set(PATTERNS)) - {whole.get("background")}
        assert found.named == objects and found == mrsa.pair(found.seed, plain=False)
        assert len({obj.shape for obj in found.scene.objects}) == 2
        all_named, _ = parse(found.telling)
        assert [{name: named.get(name, "") for name in mrsa.LOOKS} for named in all_named] == [{name: getattr(obj, name) for name in mrsa.LOOKS} for obj in found.scene.objects]
        for obj, reference, text in zip(found.scene.objects, found.references, found.captions):
            (named,), _ = parse(text)
            assert reference.objects == (obj,) and all(named.get(name, "") == getattr(obj, name) for name in mrsa.LOOKS)


def test_plain_pairs_are_filled_and_of_two_colors():
    for found in map(mrsa.pair, SEEDS):
        a, b = found.scene.objects
        assert found.scene.style == "flat" and a.color != b.color and a.shape != b.shape
        assert {obj.pattern for obj in (a, b)} == {"plain"} and {named.get("color2") for named in parse(found.telling)[0]} <= {None, ""}
        assert [reference.objects for reference in found.references] == [(a,), (b,)]


def test_every_look_occurs():
    looks = {name: {getattr(obj, name) for found in PAIRS for obj in found.scene.objects} for name in mrsa.LOOKS}
    assert looks["pattern"] == set(PATTERNS) and len(looks["color"]) >= 6 and "" in looks["color2"]


def test_the_perfect_picture_succeeds_and_wrong_ones_do_not():
    perfect, swapped, strange = mrsa.Found(), mrsa.Found(), mrsa.Found()
    for found in PAIRS:
        perfect.add(drawn(found.scene), found)
        a, b = found.scene.objects
        looks = [{key: getattr(obj, key) for key in ("color", "pattern", "color2", "rgb", "rgb2")} for obj in (a, b)]
        # both looks are there, on the wrong objects
        swapped.add(drawn(replace(found.scene, objects=(replace(a, **looks[1]), replace(b, **looks[0])))), found)
        other = next(name for name in COLORS if name not in (b.color, b.color2))
        strange.add(drawn(edited(found.scene, "color", other, 1, 1)), found)
    assert sum(perfect.both) >= 19 and sum(swapped.both) == 0 and sum(strange.both) == 0
    assert all(sum(values) >= 0.95 * len(values) for values in perfect.details.values())
    assert 0.4 <= sum(strange.one) / len(strange.one) <= 0.5, "the first object is right"


def test_a_missing_object_fails():
    result = mrsa.Found()
    result.add(drawn(PAIRS[0].references[0]), PAIRS[0])
    assert result.both == [False] and result.details["count"] == [False] and sum(result.one) == 1


def test_leaves_carry_the_keys_and_the_seeds():
    result = mrsa.Found()
    result.add(drawn(PAIRS[0].scene), PAIRS[0])
    leaves = result.leaves("7..7")
    assert leaves["both_concepts"]["value"] == 1.0 and leaves["one_concept"]["n"] == 2 and leaves["details"]["color2"]["seeds"] == "7..7"
    assert set(mrsa.WAYS) == {"mrsa", "mrsa_paper_rule", "prompt_only", "prompt_naming_all", "mrsa_bare", "mrsa_paper_rule_bare"}
    assert {name.split(".", 1)[1] for name in mrsa.QUICK_LIMITS} <= {"both_concepts", *(f"details.{name}" for name in leaves["details"])}


def test_no_seed_of_another_score_is_used():
    # further tries lie mrsa.APART above each other; nobody needs a hundred
    own = range(HELD_OUT + mrsa.OFFSET, HELD_OUT + mrsa.OFFSET + 100 * mrsa.APART)
    others = [HELD_OUT + p2p.OFFSET + p2p.APART * (len(p2p.KINDS) + 1), HELD_OUT + inversion_repairs.OFFSET + inversion_repairs.APART * 2, HELD_OUT + 100_000]
    assert min(own) > max(others) and max(own) < VALIDATION
