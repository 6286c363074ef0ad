"""Pictures of what is read."""

import torch

from palimpsest.seecoder import view
from palimpsest.tests.helpers.seecoder import random_picture


def readings(place, batch=1):
    maps = []
    for level, size in (("res3", (8, 12)), ("res4", (4, 6)), ("res5", (2, 3))):
        seen = torch.zeros(1, 148, *size)
        seen[..., place(size[0]), place(size[1])] = 1
        maps.append((level, seen))
    return [maps] * batch


def test_the_brightest_place_is_where_most_is_read():
    picture = torch.full((64, 96, 3), 0.5)
    seen = readings(lambda n: 0)[0][0][1][0, 4:]
    glow = view.overlay(picture, view.heat(seen), 8).sum(-1)
    assert glow[:8, :8].mean() > 1.5 * glow[32:, 48:].mean()
    assert view.heat(seen).max() == 1


def test_a_sheet_has_a_row_per_reference_and_five_columns():
    pictures = random_picture(64, 96, batch=2)
    one, two = (view.comparison(pictures[:n], readings(lambda n: n // 2, n), (64, 96)) for n in (1, 2))
    assert one.ndim == 4 and two.shape[1] == 2 * one.shape[1] and two.shape[2] == one.shape[2]
    # five tiles of 192 px with one pixel of frame on either side
    assert one.shape[2] == 5 * 194


def test_the_report_says_how_concentrated_the_reading_is():
    assert "1/8 size 1 %, 1/16 size 4 %, 1/32 size 17 %" in view.describe(readings(lambda n: 0))
    even = [[("res3", torch.ones(1, 148, 8, 8) / 64)]]
    assert "50 % of the cells" in view.describe(even)


def test_the_glow_lies_on_the_cell_that_is_read():
    """Regression: the map was stretched over the picture, although its last cells reach over the border."""
    shares = torch.zeros(2, 3)
    shares[0, 1] = 1
    glow = view.overlay(torch.zeros(40, 70, 3), shares, 32).sum(-1)
    y, x = divmod(int(glow.argmax()), 70)
    assert y < 24 and 40 <= x < 56


def test_huge_references_are_shrunk_before_they_are_painted():
    one = view.comparison(random_picture(64, 96).repeat_interleave(20, 1).repeat_interleave(20, 2), readings(lambda n: n // 2), (1280, 1920))
    assert one.shape[2] == 5 * 194
