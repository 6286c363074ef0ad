"""Loading: which files are taken, what is refused and how, number formats, memory."""

import gc
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from palimpsest.seecoder import loader
from palimpsest.seecoder.sizes import PREFIX, check_tensors, read_sizes, without_prefix
from palimpsest.tests.helpers.seecoder import random_picture, random_state, relative, small


def write(path, state):
    save_file({key: value.contiguous() for key, value in state.items()}, str(path))
    return str(path)


def refusal(message, state, name="x.safetensors"):
    with pytest.raises(ValueError, match=message) as error:
        loader.from_state(state, name)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


@torch.inference_mode()
def test_prefix_format_and_buffers_make_no_difference(tmp_path):
    picture, sizes = random_picture(60, 90), small()
    tokens = loader.load(write(tmp_path / "a.safetensors", random_state(sizes))).encode(picture)
    assert tokens.shape == (1, 148, 96) and tokens.dtype == torch.float32
    bare = loader.load(write(tmp_path / "b.safetensors", random_state(sizes, prefix="", buffers=False)))
    assert torch.equal(bare.encode(picture), tokens)
    pickled = tmp_path / "c.pth"
    torch.save({"state_dict": random_state(sizes)}, pickled)
    assert torch.equal(loader.load(str(pickled)).encode(picture), tokens)
    whole = {**random_state(sizes), "model.diffusion_model.out.0.weight": torch.ones(3), "vae.x": torch.ones(1)}
    assert torch.equal(loader.load(write(tmp_path / "d.safetensors", whole)).encode(picture), tokens), "a whole-model file holds it too"


@pytest.mark.parametrize("position", [False, True])
def test_the_variant_is_read_from_the_keys(position):
    model = loader.from_state(random_state(small(position)), "named-wrongly-v1-0.safetensors")
    assert ("position-aware" in model.describe()) is position and (model.network.qtransformer.pe_layer is not None) is position


@torch.inference_mode()
@pytest.mark.parametrize("stored, precision, compute, limit", [
    (torch.float16, "auto", torch.float32, 2e-3), (torch.bfloat16, "auto", torch.float32, 2e-2), (torch.float32, "fp16", torch.float16, 1e-2),
])
def test_number_formats(stored, precision, compute, limit):
    picture = random_picture(70, 70)
    exact = loader.from_state(random_state(small(True)), "a").encode(picture)
    model = loader.from_state(random_state(small(True), dtype=stored), "b", precision)
    assert model.compute == compute
    out = model.encode(picture)
    assert out.dtype == torch.float32 and 0 < relative(out, exact) < limit


@torch.inference_mode()
def test_half_precision_that_overflows_is_computed_in_float32(caplog):
    state = random_state(small())
    # the hidden values of one MLP leave the range of float16, the output does not
    for side, factor in (("fc1", 3e4), ("fc2", 1 / 3e4)):
        state[f"{PREFIX}imencoder.layers.1.blocks.0.mlp.{side}.weight"] *= factor
    picture = random_picture(50, 50)
    half = loader.from_state({key: value.clone() for key, value in state.items()}, "a", "fp16")
    with caplog.at_level("INFO", logger="palimpsest"):
        out = half.encode(picture)
    assert torch.isfinite(out).all() and relative(out, loader.from_state(state, "b").encode(picture)) < 1e-2
    assert any("encoded in float32" in line for line in caplog.messages)


def test_values_that_are_never_finite_are_refused():
    state = random_state(small())
    state[f"{PREFIX}imdecoder.level_embed"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        loader.from_state(state, "a").encode(random_picture(40, 40))


def test_other_files_are_named(tmp_path):
    refusal("no SeeCoder: it holds an IP-Adapter", {"image_proj.proj.weight": torch.ones(2), "ip_adapter.1.to_k_ip.weight": torch.ones(2)})
    refusal("no SeeCoder: it holds a CLIP vision model", {"vision_model.embeddings.class_embedding": torch.ones(2)})
    refusal("no SeeCoder: it holds a whole checkpoint", {"model.diffusion_model.out.2.weight": torch.ones(2)})
    refusal("no SeeCoder: its first tensor is called", {"something": torch.ones(2)})
    refusal("no SeeCoder: it holds no tensor", {})
    refusal("holds no table of tensors", {"epoch": 3})
    parts = {key: value for key, value in random_state(small()).items() if "imencoder" in key}
    refusal("no SeeCoder: parts of SeeCoder are missing", parts)


def test_damaged_files_are_refused_in_one_sentence(tmp_path):
    state = random_state(small())
    lacking = {key: value for key, value in state.items() if not key.endswith("blocks.1.mlp.fc2.bias")}
    refusal("lacks 4 tensors, imencoder.layers.0.blocks.1.mlp.fc2.bias first", lacking)
    refusal("besides what belongs to it 1 tensor, imdecoder.output_layers.x", {**state, f"{PREFIX}imdecoder.output_layers.x": torch.ones(1)})
    wrong = {**state, f"{PREFIX}imencoder.norm2.weight": torch.ones(5)}
    refusal("in another shape than the rest of it asks for 1 tensor, imencoder.norm2.weight", wrong)
    path = tmp_path / "cut.safetensors"
    whole = open(write(tmp_path / "whole.safetensors", random_state(small())), "rb").read()
    path.write_bytes(whole[: len(whole) // 2])
    for damaged in (path, tmp_path / "empty.safetensors", tmp_path / "empty.pth"):
        if not damaged.exists():
            damaged.write_bytes(b"")
        with pytest.raises(ValueError, match="cannot be read") as error:
            loader.load(str(damaged))
        assert "\n" not in str(error.value)


def test_a_file_is_loaded_once_and_let_go(tmp_path):
    path = write(tmp_path / "a.safetensors", random_state(small()))
    first = loader.load(path)
    assert loader.load(path) is first and loader.load(path, "fp16") is not first
    key = next(key for key, value in loader._loaded.items() if value is first)
    del first
    gc.collect()
    assert key not in loader._loaded, "nobody holds it any more"
    other = loader.load(path)
    write(tmp_path / "a.safetensors", random_state(small(), seed=5))
    assert loader.load(path) is not other, "the file has changed"


@torch.inference_mode()
def test_a_file_that_is_overwritten_in_place_does_not_change_the_loaded_model(tmp_path):
    """Regression: weights stayed mapped to the file, so a new download over it changed or killed the running server."""
    path, picture = tmp_path / "a.safetensors", random_picture(40, 40)
    model = loader.load(write(path, random_state(small())))
    before = model.encode(picture)
    content = (tmp_path / "b.safetensors")
    write(content, random_state(small(), seed=5))
    with open(path, "r+b") as file:
        file.write(content.read_bytes())
    assert torch.equal(model.encode(picture), before)
    with open(path, "r+b") as file:
        file.truncate(10)
    assert torch.equal(model.encode(picture), before)


def test_other_safetensors_files_are_refused_by_their_names_alone(tmp_path, monkeypatch):
    """A checkpoint of seven gigabytes must not be read to be refused."""
    path = write(tmp_path / "model.safetensors", {"model.diffusion_model.out.0.weight": torch.ones(3), "model.diffusion_model.out.0.bias": torch.ones(3)})
    monkeypatch.setattr(loader, "from_state", lambda *_: pytest.fail("read"))
    with pytest.raises(ValueError, match="model.safetensors is no SeeCoder: it holds a whole checkpoint"):
        loader.load(path)


def test_weights_beyond_half_precision_are_refused_there():
    state = random_state(small())
    state[f"{PREFIX}imdecoder.level_embed"][0, 0] = 1e6
    with pytest.raises(ValueError, match="beyond the range of fp16: set precision to fp32"):
        loader.from_state(state, "a", "fp16")


def test_sizes_that_cannot_be_run_are_refused():
    refusal("5 stages", random_state(small(depths=(1, 1, 1, 1, 1), heads=(1, 2, 4, 8, 8), mlp=(8,) * 5)))
    refusal("2 query layers, which cannot be run", random_state(small(query_layers=2)))
    state = random_state(small())
    state[f"{PREFIX}imdecoder.level_embed"] = state[f"{PREFIX}imdecoder.level_embed"].long()
    refusal("which cannot be run", state)


def test_the_host_counts_and_frees_it():
    import comfy.model_management as mm

    model = loader.from_state(random_state(small()), "a")
    model.encode(random_picture(33, 33))
    assert any(loaded.model is model.patcher for loaded in mm.current_loaded_models)
    assert model.patcher.model_size() >= 4 * sum(parameter.numel() for parameter in model.network.parameters())
    patcher = model.patcher
    del model
    gc.collect()
    mm.unload_all_models()
    assert not any(loaded.model is patcher for loaded in mm.current_loaded_models)


def test_dead_weights_are_not_kept():
    state = random_state(small())
    stored = sum(value.numel() for value in state.values())
    model = loader.from_state(state, "a")
    assert state == {}, "the caller's table does not hold the tensors any longer"
    assert sum(parameter.numel() for parameter in model.network.parameters()) < stored


FULL = """
import gc, os, runpy, sys, time
from pathlib import Path
root = Path(sys.argv[1])
runpy.run_path(str(root / "devtools" / "run.py"))["register_pack"]()
from palimpsest.devtools.inprocess import put_host_on_path
put_host_on_path(Path(sys.argv[2]), ["--cpu"])
import psutil, torch
import comfy.model_management, comfy.model_patcher, comfy.ops, comfy.utils
from palimpsest.seecoder import loader
from palimpsest.tests.helpers.seecoder import random_picture
picture = random_picture(512, 512)
before, peak = psutil.Process().memory_info().rss, 0
model = loader.load(sys.argv[3])
def tick():
    global peak
    peak = max(peak, psutil.Process().memory_info().rss)
with torch.inference_mode():
    tokens = model.encode(picture, tick=tick)
assert tokens.shape == (1, 148, 768) and bool(torch.isfinite(tokens).all())
# the high-water mark sees what happens between the ticks too; that of getrusage would be the parent's where that was larger
status = Path("/proc/self/status")
marks = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")] if status.exists() else []
peak = max([peak, *(int(mark) * 1024 for mark in marks)])
print("growth", (peak - before) / 2**30)
"""


@pytest.mark.slow
@pytest.mark.parametrize("position", [False, True])
def test_a_file_of_official_size_loads_strictly_and_stays_small(tmp_path, root, host, position):
    from palimpsest.tests.helpers.seecoder import OFFICIAL
    from dataclasses import replace

    sizes = replace(OFFICIAL, position=position)
    state = random_state(sizes)
    assert len(state) == (622 if position else 616)
    assert sum(value.nbytes for value in state.values()) == (1_185_414_864 if position else 1_180_441_296)
    plain = without_prefix(state)
    assert read_sizes(plain) == sizes
    check_tensors(plain, sizes)
    if not position:
        return
    path = write(tmp_path / "seecoder-pa-v1-0.safetensors", state)
    del state, plain
    gc.collect()
    done = subprocess.run([sys.executable, "-c", FULL, str(root), str(host), path], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.split("growth")[-1]) < 1.7
