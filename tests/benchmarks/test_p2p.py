"""The benchmark of Prompt-to-Prompt: what it compares computes the same, and quick measuring gives every key."""

import os

import pytest

from palimpsest.benchmarks._p2p_variants import Variants
from palimpsest.benchmarks._step import Bench, Setting
from palimpsest.devtools import figures


def relative(a, b):
    return float((a - b).norm() / b.norm())


def test_the_variants_compute_what_they_claim():
    run = Bench(Setting(width=32, size=16, rounds=2, warm_up=1))
    variants = Variants(run)
    out = {name: run.step(getattr(variants, name)(), run.sigma(0))[1] for name in ("plain", "floor", "ours", "explicit")}
    assert relative(out["floor"], out["plain"]) == 0
    assert relative(out["ours"], out["explicit"]) < 1e-4
    assert relative(out["ours"], out["plain"]) > 1e-3


@pytest.mark.slow
def test_quick_measuring_gives_every_key(host, monkeypatch):
    from palimpsest.benchmarks.p2p import bench

    monkeypatch.setitem(os.environ, "COMFYUI_PATH", str(host))
    found = figures.complete(bench(quick=True))
    assert [key for key, _ in figures.leaves(found)] == [
        "memory_ratio_to_explicit", "peak_mb.explicit", "peak_mb.floor", "peak_mb.ours", "peak_mb.plain", "ratio_after_edit", "ratio_to_floor", "time_ratio_to_explicit",
    ]
    assert all(leaf["value"] > 0 for _, leaf in figures.leaves(found))
