"""The benchmark of multi-reference self-attention: what it compares computes the same, and quick measuring gives every key."""

import os

import pytest

from palimpsest.benchmarks._mrsa_variants import COVERED, Variants
from palimpsest.benchmarks._step import Bench, Setting
from palimpsest.benchmarks.mrsa import COUNTS, setting
from palimpsest.devtools import figures
from palimpsest.tests.helpers.concepts import concept


@pytest.fixture(scope="module")
def small():
    return Bench(Setting(width=32, size=16, rounds=2, warm_up=1))


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("count", COUNTS)
def test_the_variants_compute_what_they_claim(small, count):
    variants = Variants(small, count)
    out = {name: small.step(getattr(variants, name)(), small.sigma(0))[1] for name in ("plain", "floor", "ours", "published")}
    assert relative(out["floor"], out["plain"]) == 0
    assert relative(out["ours"], out["published"]) < 1e-4
    assert relative(out["ours"], out["plain"]) > 1e-3


@pytest.mark.parametrize("count", COUNTS)
def test_the_rows_of_every_variant(small, count):
    """Floor and ours run 2 + R through the same layers, the published way 2 (1 + R) in one call."""
    counts, variants = {}, Variants(small, count)
    unet = small.model.model.diffusion_model
    last = unet.output_blocks[11][1].transformer_blocks[0]
    watched = {"rows": unet.input_blocks[0][0], "last": last.norm1, "behind": last.attn1.to_out[0]}
    for name in ("floor", "ours", "published"):
        seen = counts[name] = []
        handles = [module.register_forward_hook(lambda m, args, out, key=key, seen=seen: seen.append((key, out.shape[0]))) for key, module in watched.items()]
        small.step(getattr(variants, name)(), small.sigma(0))
        for handle in handles:
            handle.remove()
    assert counts["ours"] == counts["floor"] == [("rows", 1), ("last", 1)] * count + [("rows", 2), ("last", 2), ("behind", 2)]
    assert counts["published"] == [(key, 2 * (1 + count)) for key in watched]


def test_the_masks_cover_what_is_said():
    chosen = setting(quick=False, cuda=False)
    item = concept(0, size=(chosen.size,) * 2, share=COVERED)
    assert chosen.size == 64
    assert [abs(float(item.layer_mask(size).mean()) - 0.18) < 0.01 for size in ((64, 64), (32, 32))] == [True, True]


@pytest.mark.slow
def test_quick_measuring_gives_every_key(host, monkeypatch):
    from palimpsest.benchmarks.mrsa import bench

    monkeypatch.setitem(os.environ, "COMFYUI_PATH", str(host))
    found = figures.complete(bench(quick=True))
    each = ["memory_ratio_to_published", "peak_mb.ours", "peak_mb.published", "ratio_to_floor", "seconds.floor", "seconds.ours", "seconds.published", "time_ratio_to_published"]
    assert [key for key, _ in figures.leaves(found)] == ["peak_mb.plain", *(f"r{count}.{key}" for count in COUNTS for key in each)]
    assert all(leaf["value"] > 0 for _, leaf in figures.leaves(found))
