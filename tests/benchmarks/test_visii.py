"""The benchmark of instruction learning: what it compares computes the same gradient, and quick measuring gives every key."""

import os

import pytest

from palimpsest.benchmarks._visii_variants import VARIANTS, Bench, Setting, vectors
from palimpsest.devtools import figures


def relative(a, b):
    return float((a - b).norm() / b.norm())


def test_the_variants_compute_one_gradient():
    run = Bench(Setting(width=32, size=16))
    seen = []

    def watch(apply_model, parameters):
        seen.append(len(parameters["input"]))
        return apply_model(parameters["input"], parameters["timestep"], **parameters["c"])

    run.model.set_model_unet_function_wrapper(watch)

    def gradients(step):
        found = {}
        for name, (compute, rows, checkpointing) in VARIANTS.items():
            made = step(checkpointing)
            found[name] = compute(made, vectors(made, run.start, rows))
        return found

    found = run.inside(gradients)
    assert seen == [2, 1, 3, 2, 1], "calls of ours, the three rows and ours with checkpointing"
    assert found["three_rows"].shape[0] == 3 and all(bool(row.abs().max() > 0) for row in found["three_rows"])
    assert relative(found["ours"][0], found["three_rows"][0]) < 1e-5 and relative(found["checkpointed"], found["ours"]) < 1e-5


@pytest.mark.slow
def test_quick_measuring_gives_every_key(host, monkeypatch):
    from palimpsest.benchmarks.visii import bench

    monkeypatch.setitem(os.environ, "COMFYUI_PATH", str(host))
    found = figures.complete(bench(quick=True))
    assert [key for key, _ in figures.leaves(found)] == [
        "memory_ratio_to_three_rows", "peak_mb.checkpointed", "peak_mb.ours", "peak_mb.three_rows", "time_ratio_of_checkpointing", "time_ratio_to_three_rows",
    ]
    values = dict(figures.leaves(found))
    assert all(leaf["value"] > 0 for leaf in values.values()) and values["memory_ratio_to_three_rows"]["value"] < 0.8
