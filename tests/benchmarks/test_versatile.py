"""The benchmark of Versatile Diffusion: what it compares, and what it counts."""

import os

import pytest
import torch

from palimpsest.benchmarks._step import Setting
from palimpsest.benchmarks.versatile import count, dual_bench, full_size
from palimpsest.devtools import figures
from palimpsest.versatile_diffusion.dual import PairedTransformer


def test_a_dual_call_costs_less_than_three_quarters_of_two_single_ones():
    unet = full_size()
    dual, text, image = (count(unet, ratio) for ratio in (0.5, 1.0, 0.0))
    assert 0.5 < dual / (text + image) <= 0.75
    assert image > text, "257 tokens against 77"
    # what is saved is one run of what both share: residual blocks, samplers, time embedding
    assert text < dual < text + image


def test_the_flows_run_what_they_claim():
    run = dual_bench(Setting(width=32, size=16, rounds=2, warm_up=1))
    ran = []
    for layer in run.model.model.diffusion_model.modules():
        if isinstance(layer, PairedTransformer):
            for name, part in (("text", layer), ("image", layer.image)):
                part.norm.register_forward_hook(lambda module, args, out, name=name: ran.append((name, out.shape[0])))
    for name, expected in (("dual", {("text", 2): 16, ("image", 2): 16}), ("text", {("text", 2): 16}), ("image", {("image", 2): 16}), ("plain", {})):
        ran.clear()
        seconds, out = run.flow(name, run.sigma(0))
        assert seconds > 0 and torch.isfinite(out).all()
        assert {key: ran.count(key) for key in ran} == expected


@pytest.mark.slow
def test_quick_measuring_gives_every_key(host, monkeypatch):
    from palimpsest.benchmarks.versatile import bench

    monkeypatch.setitem(os.environ, "COMFYUI_PATH", str(host))
    found = figures.complete(bench(quick=True))
    assert [key for key, _ in figures.leaves(found)] == ["operations_to_two_single_flows", "ratio_single_to_plain", "ratio_to_two_single_flows"]
    assert all(0 < leaf["value"] < 3 for _, leaf in figures.leaves(found))
