"""The benchmark of SeeCoder: quick measuring gives every key. That both forms compute the same is tested in tests/seecoder."""

import os

import pytest

from palimpsest.devtools import figures


@pytest.mark.slow
def test_quick_measuring_gives_every_key(host, monkeypatch):
    from palimpsest.benchmarks.seecoder import bench

    monkeypatch.setitem(os.environ, "COMFYUI_PATH", str(host))
    found = figures.complete(bench(quick=True))
    keys = [key for key, leaf in figures.leaves(found)]
    assert keys == ["memory_ratio_to_explicit", "peak_mb.explicit", "peak_mb.ours", "ratio_to_floor", "seconds", "time_ratio_to_explicit"]
    assert all(leaf["value"] > 0 for _, leaf in figures.leaves(found))
