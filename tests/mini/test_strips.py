"""Strips: what recurs looks the same, and the quiet caption gives nothing away."""

import random

from palimpsest.mini.parse import parse
from palimpsest.mini.scenes import COLORS, PATTERNS, apart
from palimpsest.mini.strips import ALONE, PANELS, TOGETHER, captions, sample_strip

STRIPS = [sample_strip(seed) for seed in range(60)]
LOOKS = ("shape", "color", "pattern", "color2", "size", "rgb", "rgb2", "radius")


def test_a_seed_gives_its_strip():
    assert STRIPS[3] == sample_strip(3) != sample_strip(4)


def test_objects_alone_recur_together_with_the_same_looks():
    for strip in STRIPS:
        assert len(strip.panels) == PANELS == ALONE + TOGETHER
        first, second, *later = strip.panels
        assert later[0].objects[0].shape != later[0].objects[1].shape and later[0].objects[0].color != later[0].objects[1].color
        for both in later:
            assert apart(*both.objects)
            for alone, obj in zip((first, second), both.objects):
                (single,) = alone.objects
                assert all(getattr(single, name) == getattr(obj, name) for name in LOOKS)
        assert len({panel.style for panel in strip.panels}) == 1


def test_some_panels_move_and_some_keep_still_some_strips_are_plain():
    pairs = [pair for strip in STRIPS for pair in zip(strip.panels[2:], strip.panels[3:])]
    still = [panel.objects[0].place == other.objects[0].place and panel.background_rgb == other.background_rgb for panel, other in pairs]
    assert 0.1 < sum(still) / len(still) < 0.5
    plain = [all(obj.pattern == "plain" for obj in strip.panels[2].objects) for strip in STRIPS]
    assert 15 <= sum(plain) <= 45
    assert len({obj.pattern for strip in STRIPS for obj in strip.panels[2].objects}) == len(PATTERNS)


def test_the_quiet_captions_name_no_looks_and_the_loud_ones_do():
    for number, strip in enumerate(STRIPS):
        for text in captions(strip, random.Random(number), silent=1.0)[ALONE:]:
            objects, whole = parse(text)
            assert all(not {"color", "pattern", "color2"} & set(named) and {"shape", "place", "size"} <= set(named) for named in objects)
            assert "background" in whole
    loud = [text for number, strip in enumerate(STRIPS) for text in captions(strip, random.Random(number), silent=0.0)]
    assert sum(any(color in text.split() for color in COLORS) for text in loud) > 0.9 * len(loud)
