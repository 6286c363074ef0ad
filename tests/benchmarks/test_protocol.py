"""Interleaved rounds: the order of calls, the ratios and the control."""

from palimpsest.benchmarks._protocol import compared, interleaved, ratio


class Clock:
    """Stands for timed calls: notes who was called and gives the next of its seconds."""

    def __init__(self, **seconds):
        self.called, self._seconds = [], {name: iter(values) for name, values in seconds.items()}

    def __call__(self, name):
        def once():
            self.called.append(name)
            return next(self._seconds[name])

        return once


def test_a_round_ends_with_what_it_began_with():
    clock = Clock(a=[9, 1, 2, 3, 4], b=[9, 5, 6], c=[9, 7, 8])
    rounds = interleaved({name: clock(name) for name in "abc"}, 2, warm_up=1)
    assert clock.called == [*"abc", *"abca", *"abca"]
    assert rounds == [{"a": [1, 2], "b": [5], "c": [7]}, {"a": [3, 4], "b": [6], "c": [8]}]


def test_ratios_come_from_the_rounds_that_hold_both_and_the_control_from_all():
    rounds = [{"a": [1.0, 1.0], "b": [3.0], "c": [4.0]}, {"a": [2.0, 2.0], "b": [4.0], "c": [2.0]}, {"a": [1.0, 1.5], "b": [5.0]}, {"a": [2.0, 2.02], "b": [2.01]}]
    found = compared(rounds, "b", "a")
    assert found["value"] == (2.0 + 3.0) / 2 and found["n"] == 4, "of 3, 2, 4 and 1"
    assert abs(found["control"] - 1.005) < 1e-9 and found["valid"] is True, "of 1, 1, 1.5 and 1.01"
    other = compared(rounds, "b", "c")
    assert other["value"] == (0.75 + 2.0) / 2 and other["n"] == 2 and other["control"] == found["control"]
    assert other["p10"] < other["value"] < other["p90"]


def test_the_ratio_of_two():
    clock = Clock(measured=[0, 3, 6], reference=[0, 1, 1.1, 2, 2.2])
    found = ratio(clock("measured"), clock("reference"), 2, 1)
    assert clock.called == ["reference", "measured", *["reference", "measured", "reference"] * 2]
    assert abs(found["value"] - 3 / 1.05) < 1e-9 and abs(found["control"] - 1.1) < 1e-9 and found["valid"] is False
