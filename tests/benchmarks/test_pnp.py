"""The benchmark of Plug-and-Play: what it compares computes the same, and quick measuring gives every key."""

import os

import pytest

from palimpsest.benchmarks._step import Bench, Setting
from palimpsest.benchmarks._variants import VARIANTS
from palimpsest.devtools import figures


@pytest.fixture(scope="module")
def small():
    return Bench(Setting(width=32, size=16, rounds=2, warm_up=1))


def relative(a, b):
    return float((a - b).norm() / b.norm())


def test_the_variants_compute_what_they_claim(small):
    sigma = small.sigma(0)
    out = {name: small.step(make(small.model, small.trajectory), sigma)[1] for name, make in VARIANTS.items()}
    assert relative(out["ours"], out["joined"]) < 1e-4
    assert relative(out["floor"], out["plain"]) == 0
    assert relative(out["ours"], out["plain"]) > 1e-3


def test_floor_and_ours_run_the_same_rows_through_the_same_layers(small):
    counts = {}
    unet = small.model.model.diffusion_model
    last = unet.output_blocks[11][1].transformer_blocks[0]
    watched = {"rows": unet.input_blocks[0][0], "last": last.norm1, "behind": last.attn1.to_out[0]}
    for name in ("floor", "ours"):
        seen = counts[name] = []
        handles = [module.register_forward_hook(lambda m, args, out, key=key, seen=seen: seen.append((key, out.shape[0]))) for key, module in watched.items()]
        small.step(VARIANTS[name](small.model, small.trajectory), small.sigma(0))
        for handle in handles:
            handle.remove()
    assert counts["ours"] == counts["floor"] == [("rows", 1), ("last", 1), ("rows", 2), ("last", 2), ("behind", 2)]


@pytest.mark.slow
def test_quick_measuring_gives_every_key(host, monkeypatch):
    from palimpsest.benchmarks.pnp import bench

    monkeypatch.setitem(os.environ, "COMFYUI_PATH", str(host))
    found = figures.complete(bench(quick=True))
    keys = [key for key, leaf in figures.leaves(found)]
    assert keys == ["peak_mb.floor", "peak_mb.ours", "peak_mb.plain", "ratio_after_injection", "ratio_to_floor", "ratio_to_joined"]
    assert all(leaf["value"] > 0 for _, leaf in figures.leaves(found))
    assert 0.1 < found["peak_mb"]["plain"]["value"] < 500
