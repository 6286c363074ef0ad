"""The trade-off picture: points lie where their rates say."""
import numpy as np
import pytest

from palimpsest.devtools import tradeoff


def test_axes_end_at_tenths_around_the_values():
    assert tradeoff.limits([0.42, 0.61]) == pytest.approx((0.3, 0.7))
    assert tradeoff.limits([0.0, 1.0]) == (0.0, 1.0)
    low, high = tradeoff.limits([1.0])
    assert low < 1.0 <= high, "a single value has an axis too"


def middle(picture, color):
    found = (np.asarray(picture)[tradeoff.MARGIN[1]:] == color).all(2)
    y, x = np.nonzero(found)
    return x.mean(), y.mean()


def test_more_kept_is_farther_right_and_more_followed_higher():
    first, second = tradeoff.COLORS[:2]
    picture = tradeoff.draw({"a": [("", 0.2, 0.3)], "b": [("", 0.8, 0.9)]}, "kept", "followed")
    assert picture.size == tradeoff.SIZE and picture.mode == "RGB"
    (x1, y1), (x2, y2) = middle(picture, first), middle(picture, second)
    assert x2 > x1 and y2 < y1


def test_a_curve_is_joined():
    apart = tradeoff.draw({"a": [("", 0.2, 0.3)], "b": [("", 0.8, 0.9)]}, "", "")
    joined = tradeoff.draw({"a": [("", 0.2, 0.3), ("", 0.8, 0.9)]}, "", "")
    drawn = [(np.asarray(p) == tradeoff.COLORS[0]).all(2).sum() for p in (apart, joined)]
    assert drawn[1] > 5 * drawn[0]


def test_nothing_to_draw_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="no trade-off to draw"):
        tradeoff.write(tmp_path / "x.png", {}, "", "")
    tradeoff.write(tmp_path / "new" / "x.png", {"a": [("1", 0.5, 0.5)]}, "kept", "followed")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["x.png"]
