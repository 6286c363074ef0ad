"""Windows of words and equalizers."""

import pytest
import torch

from palimpsest.p2p.schedule import equalizer, window_rows, word_windows

TARGETS = ("A painting of a lion eating a burger", "A painting of a squirrel eating a lasagne")


def pair(value):
    return (0.0, value) if isinstance(value, float) else tuple(value)


def test_published_word_windows(cases, published, read):
    seen = 0
    for name, case in cases["time_alpha"].items():
        if case["error"]:
            continue
        spec = case["spec"] if isinstance(case["spec"], dict) else {"default_": case["spec"]}
        words = {word: pair(value) for word, value in spec.items() if word != "default_"}
        for k, text in enumerate(TARGETS):
            found = word_windows(pair(spec.get("default_", (0.0, 1.0))), words, read(text), case["steps"])
            assert torch.equal(found, published[f"time_alpha.{name}"][:, k, 0, 0]), (name, k)
        seen += 1
    assert seen == 24


def test_published_equalizers(cases, published, read):
    seen = 0
    for name, case in cases["equalizer"].items():
        if name.startswith("nulltext."):
            found = equalizer(dict(zip(case["words"], case["values"])), read(case["text"]))
            assert torch.equal(found[None], published[f"equalizer.{name}"]), name
            seen += 1
    assert seen == 6


def test_phrases_and_later_words_win(read):
    prompt = read("a big red car")
    assert equalizer({"big red car": 2, "red": -0.5}, prompt)[:6].tolist() == [1, 1, 2, -0.5, 2, 1]
    found = word_windows((0.0, 1.0), {"red car": (0.5, 1.0), "car": (0.0, 0.0)}, prompt, 9)
    assert found[:, 2].all() and found[:, 3].tolist() == [0] * 5 + [1] * 5 and not found[:, 4].any()


def test_rows_of_steps_or_steps_plus_one(read):
    prompt = read("cat")
    assert word_windows((0.0, 0.5), {}, prompt, 9).sum(0)[0] == 5 and word_windows((0.0, 0.5), {}, prompt, 9).shape == (10, 77)
    found = word_windows((0.2, 0.5), {}, prompt, 10, published_rows=False)
    assert found.shape == (10, 77) and found[:, 0].nonzero()[:, 0].tolist() == [2, 3, 4]


def test_self_attention_counts_steps():
    assert window_rows(0.0, 0.4, 50) == (0, 20) and window_rows(0.2, 0.6, 5) == (1, 3) and window_rows(0.0, 1.0, 7) == (0, 7)
    assert all(window_rows(0.0, hi / 100, 50) == (0, hi // 2) for hi in range(101))


def test_products_that_floats_round_down():
    assert int(0.29 * 100) == 28
    assert window_rows(0.29, 0.57, 100) == (29, 57)


@pytest.mark.parametrize("window", [(0.5, 0.4), (-0.1, 0.5), (0.0, 1.1), (float("nan"), 1.0)])
def test_windows_outside_the_run_are_refused(read, window):
    with pytest.raises(ValueError, match="The window of all words runs from"):
        word_windows(window, {}, read("a cat"), 10)
    with pytest.raises(ValueError, match="The window of cat runs from"):
        word_windows((0.0, 1.0), {"cat": window}, read("a cat"), 10)
