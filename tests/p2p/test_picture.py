"""The picture of an alignment."""

import pytest
import torch

from palimpsest.p2p import picture
from palimpsest.p2p.plan import make_plan

SWAP = ("a photo of a cat on a red sofa", "a photo of a schnoodle on a red sofa")
ADDED = ("a cat sitting next to a mirror", "a silver cat sculpture sitting next to a mirror")
CASES = [
    (SWAP, "auto", "aligned"), (SWAP, "auto", "published"), (SWAP[::-1], "auto", "published"), (ADDED, "auto", "aligned"), (ADDED[::-1], "auto", "aligned"),
    (SWAP, "refine", "aligned"), (("red car and blue house", "blue car and red house"), "refine", "aligned"), (("a cat", "a cat"), "auto", "aligned"),
    (("", "a cat"), "auto", "aligned"), (("a cat", ""), "auto", "aligned"),
]


def pixels(found, color):
    """Number of pixels of exactly this color."""
    return int((found[0] * 255).round().eq(torch.tensor(color, dtype=torch.float32)).all(-1).sum())


def test_a_picture_of_the_host(read):
    found = picture.draw(make_plan(*map(read, SWAP)))
    assert found.dtype == torch.float32 and found.shape[0] == 1 and found.shape[2:] == (picture.WIDTH, 3)
    assert 0 <= found.min() and found.max() <= 1 and 150 < found.shape[1] < 400
    assert pixels(found, picture.GROUND) > found[..., 0].numel() / 2


def test_every_token_is_in_one_block_and_lines_stay_inside(read):
    for prompts, mode, tail in CASES:
        plan = make_plan(*map(read, prompts), mode, tail)
        blocks = picture.blocks(plan)
        assert [position for block in blocks for position in block.targets] == [token.position for token in plan.target.content]
        sources = [position for block in blocks for position in block.sources if plan.source.tokens[position].word is not None]
        assert sorted(sources) == [token.position for token in plan.source.content]
        for block in blocks:
            for target in block.targets:
                assert set(plan.source_part[:, target].nonzero()[:, 0].tolist()) <= set(block.sources)
        picture.draw(plan)


def test_a_dropped_word_stands_over_the_one_in_its_place(read):
    plan = make_plan(read("a squirrel eating"), read("a lion eating"), "refine")
    assert [(block.sources, block.targets) for block in picture.blocks(plan)] == [([1], [1]), ([2], [2]), ([3], [3])]
    shrunk = make_plan(read("a big squirrel eating"), read("a lion eating"), "refine")
    assert [(block.sources, block.targets) for block in picture.blocks(shrunk)] == [([1], [1]), ([2], [2]), ([3], []), ([4], [3])]


def test_colors_say_what_happens(read):
    copied = picture.draw(make_plan(*map(read, SWAP)))
    refined = picture.draw(make_plan(*map(read, ADDED)))
    scaled = picture.draw(make_plan(*map(read, ADDED), weights={"cat": 3.0}))
    legend = pixels(copied, picture.OWN)
    assert pixels(refined, picture.OWN) > legend + 50 and pixels(scaled, picture.SCALED) > pixels(refined, picture.SCALED) + 100
    assert pixels(picture.draw(make_plan(*map(read, SWAP), cross=(0.0, 0.1))), picture.COPIED) < pixels(copied, picture.COPIED), "shorter bars"


def test_split_words_have_thick_lines(read):
    """Both tokens of a split word are joined to one source token by lines of twice the width."""
    target = "a photo of a neoclassical on a red sofa"
    plan, pen = make_plan(read(SWAP[0]), read(target)), Recorder()
    picture._draw_band(plan, pen, picture._bands(plan, pen)[0], 0)
    assert sorted(thickness for thickness, _ in pen.lines) == [2] * 8 + [4] * 2
    assert {color for _, color in pen.lines} == {picture.COPIED}


class Recorder(picture._Pen):
    """Remembers lines, filled bars and texts."""

    def __init__(self):
        super().__init__()
        self.lines, self.fills, self.texts = [], [], []

    def line(self, ends, color, thickness):
        self.lines.append((thickness, color))

    def fill(self, corners, color):
        self.fills.append((corners, color))

    def write(self, x, y, text, color, size=picture.TEXT):
        self.texts.append(text)
        return super().write(x, y, text, color, size)


def test_bars_show_the_windows_and_labels_the_factors(read):
    plan, pen = make_plan(*map(read, ADDED), cross=(0.25, 0.75), word_windows={"mirror": (0.0, 0.5)}, weights={"next": -1.0}), Recorder()
    (band,) = picture._bands(plan, pen)
    picture._draw_band(plan, pen, band, 0)
    tracks = [corners for corners, color in pen.fills if color == picture.TRACK]
    bars = {round(corners[0], 3): corners for corners, color in pen.fills if color != picture.TRACK}
    assert len(tracks) == 9 and len(bars) == 7, "two words keep their own map"
    parts = []
    for left, _, right, _ in tracks:
        inside = [bar for bar in bars.values() if left <= bar[0] and bar[2] <= right]
        parts += [(round((bar[0] - left) / (right - left), 6), round((bar[2] - left) / (right - left), 6)) for bar in inside]
    assert sorted(parts) == [(0.0, 0.5)] + [(0.25, 0.75)] * 6
    assert "x-1" in pen.texts and pen.texts.count("own") == 2 and pen.texts.count("0.25-0.75") == 6 and "0-0.5" in pen.texts


def test_long_prompts_take_several_bands(read):
    text = " ".join(f"word{k}" for k in range(50))
    plan = make_plan(read(text + " cat"), read(text + " lasagne"))
    short = picture.draw(make_plan(*map(read, SWAP)))
    found = picture.draw(plan)
    assert found.shape[2] == picture.WIDTH and found.shape[1] >= short.shape[1] + 4 * picture.BAND
    for row in picture._bands(plan, picture._Pen()):
        assert row and all(block.x + block.width <= picture.WIDTH - picture.MARGIN for block in row)


@pytest.mark.parametrize("word", ["\u732b", "\U0001f408", "\u00e9l\u00e9phant"])
def test_letters_that_the_font_lacks(read, word):
    assert picture.draw(make_plan(read("a cat"), read(f"a {word}"))).shape[0] == 1
    # the bitmap font of a Pillow without FreeType stops at Latin-1
    assert picture._drawable(word, object()) == "".join(letter if letter < "\u0100" else "?" for letter in word)


def test_nothing_to_edit_is_said(read, monkeypatch):
    texts = []

    class Listening(picture._Pen):
        def write(self, x, y, text, color, size=picture.TEXT):
            texts.append(text)
            return super().write(x, y, text, color, size)

    monkeypatch.setattr(picture, "_Pen", Listening)
    picture.draw(make_plan(read("a cat"), read("a cat")))
    picture.draw(make_plan(read("a cat"), read("a dog"), cross=(0.0, 0.0), self_window=(0.0, 0.0)))
    picture.draw(make_plan(read(""), read("")))
    assert [text for text in texts if text.startswith("Nothing is edited")] == [
        "Nothing is edited: the prompts are the same and no word weights are given", "Nothing is edited: all windows have zero length",
        "Nothing is edited: the prompts are the same and no word weights are given"]
    assert "Both prompts are empty" in texts
