"""Plans: the two products of each step against explicit maps, the published episodes, the choice of a mode, the report."""

import ast
import json

import pytest
import torch
from safetensors import safe_open

from palimpsest.p2p.alignment import refinement, replacement
from palimpsest.p2p.plan import make_plan
from palimpsest.p2p.schedule import equalizer, word_windows

STEPS = 10
SWAP = ("a photo of a cat on a red sofa", "a photo of a schnoodle on a red sofa")
ADDED = ("a cat sitting next to a mirror", "a silver cat sculpture sitting next to a mirror")
EPISODES = ("nulltext_replace_dict", "nulltext_reweight_refine", "stable_refine", "stable_replace_multi_tok")


def maps(plan, seed=0):
    """Random A_source [2, 6, S], A_own [2, 6, T] and V [2, T, 5], float64."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)
    return draw(2, 6, plan.source.length).softmax(-1), draw(2, 6, plan.target.length).softmax(-1), draw(2, plan.target.length, 5)


def run(plan, s, source, own, values):
    """What the attention side makes of a step."""
    left, right = plan.step(s, STEPS, torch.float64)
    if left is None and right is None:
        return own @ values
    out = torch.zeros(1, dtype=torch.float64)
    if left is not None:
        out = out + source @ (left @ values)
    return out if right is None else out + own @ (right[:, None] * values)


def textbook(plan, kind, s, source, own, values, tail="aligned"):
    """Section 3.2 of the paper on whole maps."""
    if kind == "replace":
        edit = source @ replacement(plan.source, plan.target, tail).double()
    elif kind == "refine":
        mapper, alphas = refinement(plan.source, plan.target)
        edit = source[..., mapper] * alphas.double() + own * (1 - alphas.double())
    else:
        edit = source
    edit = edit * equalizer(plan.weights, plan.target).double()
    a = word_windows(plan.cross, plan.windows, plan.target, STEPS)[s].double()
    return (a * edit + (1 - a) * own) @ values


@pytest.mark.parametrize("prompts, kind, tail, windows, weights", [
    (SWAP, "replace", "aligned", {}, {}),
    (SWAP, "replace", "published", {}, {}),
    (SWAP, "replace", "aligned", {"schnoodle": (0.1, 0.3), "red sofa": (0.0, 0.0)}, {"sofa": 3.0, "photo": -1.0}),
    (("the cat's bowl", "the schnoodle's bowl"), "replace", "aligned", {}, {"bowl": 0.3}),
    (ADDED, "refine", "aligned", {}, {}),
    (ADDED, "refine", "aligned", {"cat": (0.2, 0.4), "silver": (0.0, 1.0)}, {"sculpture": 2.5, "mirror": 0.0}),
    (ADDED[::-1], "refine", "aligned", {}, {"cat": -0.7}),
    ((SWAP[0], SWAP[0]), "reweight", "aligned", {"cat": (0.0, 0.9)}, {"cat": 5.0, "red": 0.1}),
    ((SWAP[0], SWAP[0]), "replace", "aligned", {}, {"cat": 5.0}),
])
def test_every_step_against_whole_maps(read, prompts, kind, tail, windows, weights):
    plan = make_plan(*map(read, prompts), kind, tail, (0.1, 0.6), windows, weights)
    assert plan.mode == kind
    edited = 0
    for s in range(STEPS + 1):
        source, own, values = maps(plan, s)
        expected = textbook(plan, kind, s, source, own, values, tail)
        assert (run(plan, s, source, own, values) - expected).abs().max() < 1e-12
        edited += bool((expected - own @ values).abs().max() > 1e-3)
    assert 4 <= edited < STEPS + 1


def test_none_says_which_of_the_two_maps_is_not_needed(read):
    swap = make_plan(*map(read, SWAP), "replace", cross=(0.0, 0.5))
    left, right = swap.step(0, STEPS)
    assert right is None and left.shape == (77, 77) and left.dtype == torch.float32
    assert swap.step(9, STEPS) == (None, None)
    refine = make_plan(*map(read, ADDED), "refine", cross=(0.0, 0.5))
    left, right = refine.step(0, STEPS)
    assert left.shape == (77, 77) and right.nonzero()[:, 0].tolist() == [2, 4]
    # one word only has a window: the others keep all of their own
    only = make_plan(*map(read, SWAP), "replace", cross=(0.0, 0.0), word_windows={"schnoodle": (0.0, 1.0)})
    left, right = only.step(0, STEPS)
    assert left.nonzero().tolist() == [[5, 5], [5, 6]] and (right == 0).nonzero()[:, 0].tolist() == [5, 6]
    # an inserted word alone in its window: nothing of the source is needed, or nothing happens at all
    own = make_plan(*map(read, ADDED), "refine", cross=(0.0, 0.0), word_windows={"silver": (0.0, 1.0)})
    assert own.step(0, STEPS) == (None, None)
    scaled = make_plan(*map(read, ADDED), "refine", cross=(0.0, 0.0), word_windows={"silver": (0.0, 1.0)}, weights={"silver": 2.0})
    left, right = scaled.step(0, STEPS)
    assert left is None and right.tolist() == [2.0 if k == 2 else 1.0 for k in range(77)]


def test_zero_factors_never_look_like_the_mark(read):
    plan = make_plan(read("cat"), read("dog"), "replace", cross=(0.0, 1.0), weights={"dog": 0.0})
    left, right = plan.step(0, STEPS)
    assert right is None and left[0, 0] == 1 and left[:, 1].abs().sum() == 0


def test_steps_outside_the_run(read):
    plan = make_plan(read("cat"), read("dog"))
    plan.step(STEPS, STEPS)
    for s in (-1, STEPS + 1):
        with pytest.raises(ValueError, match=f"Step {s} does not exist in a run of 10 steps"):
            plan.step(s, STEPS)


def test_self_attention_window(read):
    plan = make_plan(read("a cat"), read("a dog"), self_window=(0.2, 0.6))
    assert [s for s in range(5) if plan.self_active(s, 5)] == [1, 2]
    assert [s for s in range(50) if plan.self_active(s, 50)] == list(range(10, 30))


@pytest.mark.parametrize("prompts, mode, weights, chosen", [
    (("a cat", "a dog"), "auto", {}, "replace"),
    (("a cat", "a big cat"), "auto", {}, "refine"),
    (("a cat", "a big cat"), "auto", {"big": 2.0}, "refine"),
    (("a cat", "a cat"), "auto", {"cat": 2.0}, "reweight"),
    (("a cat", "a cat"), "auto", {}, "identity"),
    (("a cat", "A  cat"), "refine", {}, "identity"),
    (("a cat", "a (cat:1.2)"), "auto", {}, "replace"),
    (("a cat", "a dog"), "refine", {}, "refine"),
    (("a cat", "a dog"), "reweight", {"dog": 2.0}, "replace"),
    (("a cat", "a big dog"), "reweight", {"dog": 2.0}, "refine"),
    (("a cat", "a cat"), "replace", {"cat": 2.0}, "replace"),
])
def test_the_mode_that_is_taken(read, prompts, mode, weights, chosen):
    plan = make_plan(*map(read, prompts), mode, weights=weights)
    assert plan.mode == chosen and plan.neutral == (chosen == "identity")
    assert (plan.step(0, STEPS) == (None, None)) == plan.neutral == (not plan.self_active(0, STEPS))


def test_windows_of_zero_length_leave_nothing_to_edit(read):
    source, target = read("a cat"), read("a dog")
    nothing = make_plan(source, target, cross=(0.0, 0.0), self_window=(0.3, 0.3), word_windows={"dog": (0.5, 0.5)}, weights={"dog": 2.0})
    assert nothing.neutral and all(nothing.step(s, STEPS) == (None, None) and not nothing.self_active(s, STEPS) for s in range(STEPS))
    assert not make_plan(source, target, cross=(0.0, 0.0), self_window=(0.0, 0.1)).neutral
    assert not make_plan(source, target, cross=(0.0, 0.0), self_window=(0.0, 0.0), word_windows={"dog": (0.0, 0.5)}).neutral


@pytest.mark.parametrize("arguments, message", [
    ({"mode": "swap"}, "The mode is 'swap'; choose one of auto, replace, refine, reweight"),
    ({"tail": "long"}, "The tail is 'long'; choose one of aligned, published"),
    ({"mode": "replace"}, "the source has 2 and the target 3"),
    ({"mode": "reweight"}, "no word weights are given"),
    ({"weights": {"dragon": 2.0}}, 'Not in the edit prompt: "dragon"'),
    ({"word_windows": {"dragon": (0.0, 1.0)}}, 'Not in the edit prompt: "dragon"'),
    ({"word_windows": {"big": (0.0, 2.0)}}, "The window of big runs from 0 to 2"),
    ({"cross": (0.5, 0.2)}, "The window of cross-attention runs from 0.5 to 0.2"),
    ({"self_window": (0.0, 1.2)}, "The window of self-attention runs from 0 to 1.2"),
])
def test_wrong_settings(read, arguments, message):
    with pytest.raises(ValueError, match=message) as failed:
        make_plan(read("a cat"), read("a big cat"), **arguments)
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize("name", EPISODES)
def test_published_episodes(oracles, read, name):
    """Maps in and maps out of the published controllers, every layer and step."""
    with safe_open(oracles / "p2p" / f"attn_{name}.safetensors", "pt") as file:
        about, keys = file.metadata(), list(file.keys())
        tensors = {key: file.get_tensor(key) for key in keys}
    steps, heads = int(about["steps"]), int(about["heads"])
    cross, equal = ast.literal_eval(about["cross"]), ast.literal_eval(about["eq"])
    spec = cross if isinstance(cross, dict) else {"default_": cross}
    windows = {word: value if isinstance(value, tuple) else (0.0, value) for word, value in spec.items() if word != "default_"}
    inside = ast.literal_eval(about["self"])
    plan = make_plan(*(read(text) for text in json.loads(about["prompts"])), "refine" if "refine" in name else "replace", "published",
                     (0.0, spec["default_"]), windows, {equal[0]: equal[1]} if equal else {}, inside if isinstance(inside, tuple) else (0.0, inside))
    checked = {True: 0, False: 0}
    for key in keys:
        if not key.startswith("in."):
            continue
        before, after = tensors[key], tensors["out" + key[2:]]
        s = int(key.split(".")[1][1:])
        rows = before.unflatten(0, (4, heads))  # uncond x 2, cond x 2
        source, own = rows[2], rows[3]
        if key.endswith("cross"):
            left, right = plan.step(s, steps)
            found = own if left is None and right is None else (0 if left is None else source @ left) + (0 if right is None else own * right)
        else:
            found = source if plan.self_active(s, steps) else own
        result = after.unflatten(0, (4, heads))[3]
        assert (found - result).abs().max() < 1e-6, key
        checked[bool((result - own).abs().max() > 0)] += 1
    assert checked[True] >= 4 and checked[False] >= 2


def test_surplus_chunks_do_not_change_the_sum_of_a_map(read):
    short, long = "cat " * 70, "cat " * 70 + "and lasagne on a big red table"
    for prompts in ((short, long), (long, short)):
        plan = make_plan(*map(read, prompts), "refine", cross=(0.0, 1.0))
        left, right = plan.step(0, STEPS, torch.float64)
        # all attention on BOS, shared among the chunks, as CLIP models nearly do it
        source, own = (torch.zeros(prompt.length, dtype=torch.float64) for prompt in (plan.source, plan.target))
        for vector, prompt in ((source, plan.source), (own, plan.target)):
            vector[[marks[0] for marks in prompt.marks]] = 1.0 / len(prompt.marks)
        total = (source @ left).sum() + (0 if right is None else (own * right).sum())
        assert torch.allclose(total, torch.ones((), dtype=torch.float64))


def test_the_report_names_what_happens(read):
    plan = make_plan(read(ADDED[0]), read(ADDED[1]), word_windows={"cat": (0.1, 0.4)}, weights={"sculpture": 2.0}, cross=(0.0, 0.8), self_window=(0.0, 0.5))
    lines = plan.describe().splitlines()
    assert lines[0] == "Prompt-to-Prompt: refine, because the source has 7 words and the edit 9; the weights go on top."
    assert lines[1:3] == [f"Source: {ADDED[0]}", f"Edit:   {ADDED[1]}"]
    assert lines[4].split(" | ")[1:5] == ["a", "(own) ", "cat", "(own)    "]
    assert lines[5].split(" | ")[1:5] == ["a", "silver", "cat", "sculpture"]
    assert lines[7:] == [
        "silver: keeps its own attention.",
        "cat: copies cat from 0.1 to 0.4 of the steps.",
        "sculpture: keeps its own attention, times 2 until 0.8 of the steps.",
        "All other words copy themselves from the source until 0.8 of the steps.",
        "Self-attention is the source's until 0.5 of the steps.",
    ]
    counted = plan.describe(steps=50)
    assert "until 0.8 of the steps (steps 1 to 40 of 50)" in counted and "from 0.1 to 0.4 of the steps (steps 6 to 20 of 50)" in counted
    assert "until 0.5 of the steps (steps 1 to 25 of 50)" in counted


def test_the_report_of_swaps(read):
    aligned = make_plan(read(SWAP[0]), read(SWAP[1]), cross=(0.0, 1.0), self_window=(0.0, 0.0)).describe()
    assert "replace, because both prompts have 9 words." in aligned
    assert "schnoodle: copies cat (summed or split) in all steps." in aligned and "1/2 cat | 1/2 cat" in aligned
    assert "Self-attention is the source's never." not in aligned and "Self-attention is never the source's." in aligned
    shifted = make_plan(read(SWAP[0]), read(SWAP[1]), tail="published").describe()
    assert "on: copies a until" in shifted and "sofa: copies (end) until" in shifted and "Not taken over from the source: on." in shifted
    mixed = make_plan(read("the cat's bowl"), read("the schnoodle's bowl"), "refine").describe()
    assert "schnoodle's: partly copies cat's, partly keeps its own attention until 0.8 of the steps." in mixed
    assert "Not taken over" not in mixed
    same = make_plan(read("a cat"), read("a cat")).describe()
    assert same.startswith("Prompt-to-Prompt: nothing is edited, because the prompts are the same and no word weights are given.")
    never = make_plan(read("a cat"), read("a dog"), cross=(0.0, 0.0), self_window=(0.0, 0.0)).describe()
    assert "all windows have zero length" in never


def test_the_report_wraps_and_stays_token_over_token(read):
    text = " ".join(f"word{k}" for k in range(60))
    lines = make_plan(read(text + " cat"), read(text + " lasagne")).describe().splitlines()
    assert all(len(line) <= 110 for line in lines if " | " in line)
    pairs = [(over, under) for over, under in zip(lines, lines[1:]) if over.startswith("copies |")]
    assert len(pairs) > 5
    for over, under in pairs:
        assert under.startswith("edit") and [k for k, letter in enumerate(over) if letter == "|"] == [k for k, letter in enumerate(under) if letter == "|"]


def test_an_empty_edit_prompt(read):
    plan = make_plan(read("a cat"), read(""))
    assert plan.mode == "refine" and not plan.neutral
    assert "Not taken over from the source: a, cat." in plan.describe() and " | " not in plan.describe()


def test_the_report_leaves_punctuation_aside_and_names_idle_windows(read):
    plan = make_plan(read("a squirrel eating a burger, autumn leaves"), read("A big lion eating a burger with fries, in jungle"),
                     word_windows={"big lion": (0.0, 0.2), "burger": (0.0, 0.8)})
    lines = plan.describe().splitlines()
    assert lines[-6:] == [
        "big lion: keep their own attention.",
        "with fries in jungle: keep their own attention.",
        "All other words copy themselves from the source until 0.8 of the steps.",
        "Not taken over from the source: squirrel, autumn, leaves.",
        "Windows without effect, as these words copy nothing: big lion.",
        "Self-attention is the source's until 0.4 of the steps.",
    ]
