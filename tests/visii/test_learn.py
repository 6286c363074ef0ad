"""The learning loop on a toy network: what moves, which state is the result, and how it ends when numbers run away."""

from dataclasses import replace

import pytest
import torch

from palimpsest.visii.learn import CHECKS, Record, Settings, learn

LENGTH, WIDTH, END, STEPS = 8, 5, 4, 40
SETTINGS = Settings(steps=STEPS, learning_rate=0.05, choice="last")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


START, GOAL = draw(1, LENGTH, WIDTH), draw(1, LENGTH, WIDTH, seed=1)


def toward(timestep):
    """A step whose prediction is right when the tokens are GOAL; every timestep looks at them through another matrix."""
    look = draw(LENGTH * WIDTH, 12, seed=100 + timestep)
    return lambda tokens: tokens.flatten(1) @ look, GOAL.flatten(1) @ look


def run(choice="last", branch=toward, steps=STEPS, validate=None, direction=None, settings=SETTINGS):
    record = Record()
    states = list(learn(branch, list(range(steps)), START, END, replace(settings, steps=steps, choice=choice), record, direction, validate))
    return record, states


def distance(tokens):
    return float((tokens - GOAL)[:, 1:END].norm())


def test_only_the_positions_of_words_move():
    record, states = run()
    for state in states:
        assert torch.equal(state.tokens[:, :1], START[:, :1]) and torch.equal(state.tokens[:, END:], START[:, END:])
        assert not state.tokens.requires_grad
    assert bool((record.best[:, 1:END] != START[:, 1:END]).all())
    assert distance(record.best) < 0.5 * distance(START) and record.best_step == STEPS


def test_the_update_is_adamw_with_the_published_numbers():
    _, states = run(steps=3)
    vectors = START[:, 1:END].clone().requires_grad_()
    adam = torch.optim.AdamW([vectors], lr=0.05, weight_decay=0.01)
    for timestep in range(3):
        predict, goal = toward(timestep)
        error = ((predict(torch.cat([START[:, :1], vectors, START[:, END:]], 1)) - goal) ** 2).mean()
        adam.zero_grad()
        (4 * error).backward()
        adam.step()
        assert float(error.detach()) == pytest.approx(states[timestep].error, rel=1e-6)
    assert torch.allclose(states[-1].tokens[:, 1:END], vectors.detach(), atol=1e-7)


def test_the_late_average_is_that_of_the_last_quarter():
    record, states = run("late average")
    assert torch.allclose(record.best, torch.stack([state.tokens for state in states[-STEPS // 4 :]]).mean(0), atol=1e-6)


def test_the_lowest_step_loss_is_the_state_that_had_it():
    record, states = run("lowest step loss")
    lowest = min(range(STEPS), key=lambda index: record.errors[index])
    assert record.best_step == lowest and torch.equal(record.best, states[lowest - 1].tokens if lowest else START)


def test_validation_takes_the_best_of_its_looks():
    asked = []

    def validate(tokens):
        asked.append(tokens)
        return abs(len(asked) - 9) + 1.0

    record, states = run("validation", validate=validate)
    assert len(asked) == CHECKS + 1 and torch.equal(asked[0], START)
    assert torch.equal(record.best, asked[8]) and record.best_step == 16 and torch.equal(asked[8], states[15].tokens)
    assert [made for made, _ in record.checks] == list(range(0, STEPS + 1, 2))


def test_validation_keeps_the_start_where_nothing_is_better():
    record, _ = run("validation", validate=lambda tokens: distance(tokens) * -1)
    assert record.best_step == 0 and torch.equal(record.best, START)


def test_the_direction_term_pulls_the_instruction():
    projection = draw(6, WIDTH, seed=3)
    direction = (torch.nn.functional.normalize(draw(1, 6, seed=4), dim=-1), projection)
    with_term, _ = run(direction=direction, settings=replace(SETTINGS, mse_weight=1e-6, direction_weight=1.0))
    without, _ = run(settings=replace(SETTINGS, mse_weight=1e-6))
    assert with_term.alike[-1] > with_term.alike[0] + 0.1 and not without.alike
    assert not torch.equal(with_term.best, without.best)


def breaks_at(step):
    """Like `toward`, but the loss is NaN at one step."""

    def branch(timestep):
        predict, goal = toward(timestep)
        return (lambda tokens: predict(tokens) * (float("nan") if timestep == step else 1.0)), goal

    return branch


@pytest.mark.parametrize("choice", ["last", "late average", "lowest step loss", "validation"])
def test_a_loss_that_is_no_number_stops_at_the_last_good_state(choice):
    whole, states = run("last")
    record, partial = run(choice, branch=breaks_at(20), validate=distance if choice == "validation" else None)
    assert len(partial) == 20 and len(record.errors) == 20 and record.errors == whole.errors[:20]
    assert "at step 21 of 40 (timestep 20)" in record.stopped and torch.isfinite(record.best).all()
    if choice in ("last", "late average"):
        # the state after the 20th update gave no number, so the one before it is the last good one
        assert torch.equal(record.best, states[18].tokens) and record.best_step == 19


def test_a_gradient_that_is_no_number_stops_as_well():
    class NoGradient(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient * float("inf")

    def branch(timestep):
        predict, goal = toward(timestep)
        return (lambda tokens: predict(NoGradient.apply(tokens) if timestep == 3 else tokens)), goal

    record, states = run(branch=branch)
    assert record.stopped and len(states) == 3 and torch.isfinite(record.best).all()


def test_nothing_learned_is_an_error():
    with pytest.raises(ValueError, match=r"NaN or infinite at its very first step \(timestep 0\)") as refused:
        run(branch=breaks_at(0))
    assert str(refused.value).endswith(".") and "\n" not in str(refused.value)


@pytest.mark.parametrize("cut", [lambda tokens: tokens.detach(), lambda tokens: torch.zeros(1, LENGTH, WIDTH, requires_grad=True)])
def test_a_cut_gradient_is_an_error(cut):
    def branch(timestep):
        predict, goal = toward(timestep)
        return (lambda tokens: predict(cut(tokens))), goal

    with pytest.raises(ValueError, match="No gradient reaches the instruction"):
        run(branch=branch)


def test_one_step_is_enough_for_every_choice():
    for choice in ("last", "late average"):
        record, states = run(choice, steps=1)
        assert torch.allclose(record.best, states[0].tokens) and record.best_step == 1
    record, _ = run("lowest step loss", steps=1)
    assert torch.equal(record.best, START) and record.best_step == 0
