"""Trajectories in files: everything comes back, nothing bad gets in, nothing half-written stays."""

import json
import os
import pickle
import sys

import pytest
import torch
from palimpsest.common import files
from palimpsest.inversion.storage import load_trajectory, save_trajectory
from palimpsest.inversion.trajectory import Trajectory
from safetensors.torch import load_file, save_file


def example(**changes):
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(1, 77, 16, generator=generator)
    conditioning = [
        [
            context,
            {
                "pooled_output": torch.randn(1, 8, generator=generator),
                "area": ("percentage", 0.5, 1.0, 0.0, 0.25),
                "strength": 0.8,
                "set_area_to_bounds": False,
                "mask": torch.rand(1, 64, 64, generator=generator),
                "start_percent": 0.1,
                "width": 512,
                "clip_vision": None,
                "nested": {"reference": [torch.ones(2, dtype=torch.bfloat16), "text"]},
            },
        ],
        [context, {}],
    ]
    parts = dict(
        sigmas=torch.tensor([0.0, 1.0, 14.6]),
        latents=torch.randn(3, 2, 4, 8, 6, generator=generator),
        conditioning=conditioning,
        architecture="SD1.x",
        prediction="v_prediction",
        fingerprint="abc:AAA=",
        guidance=1.5,
        info={"scheduler": "karras", "steps": 2, "notes": ["one"], "step_error_refined": None},
        noise_mask=torch.rand(1, 64, 48, generator=generator),
    )
    return Trajectory(**{**parts, **changes})


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "deep" / "one.trajectory.safetensors")


def test_everything_comes_back(path):
    before = example()
    assert save_trajectory(before, path) == []
    after = load_trajectory(path)
    for name in ("sigmas", "latents", "noise_mask", "conditioning", "architecture", "prediction", "fingerprint", "guidance", "info"):
        assert same(getattr(before, name), getattr(after, name)), name


def test_without_mask_and_conditioning(path):
    save_trajectory(example(noise_mask=None, conditioning=[]), path)
    after = load_trajectory(path)
    assert after.noise_mask is None and after.conditioning == []


def test_what_no_file_can_hold_is_named(path):
    context = torch.ones(1, 77, 16)
    conditioning = [[context, {"control": object(), "hooks": object(), "both": [torch.ones(1), object()], "strength": float("inf"), "pooled_output": context[0]}]]
    assert save_trajectory(example(conditioning=conditioning), path) == ["both", "control", "hooks", "strength"]
    after = load_trajectory(path)
    assert list(after.conditioning[0][1]) == ["pooled_output"]
    assert after.info["left_out"] == ["both", "control", "hooks", "strength"]
    assert not [name for name in load_file(path) if name.startswith("conditioning.") and load_file(path)[name].numel() == 1]


def test_header_says_what_the_file_is(path):
    save_trajectory(example(), path, {"prompt": "{}"})
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "palimpsest_trajectory" and metadata["scaling"] == "sampler" and metadata["prompt"] == "{}"
    assert json.loads(metadata["schedule"]) == {"scheduler": "karras", "steps": 2}


def write_pickle(path):
    with open(path, "wb") as file:
        pickle.dump({"latents": [1, 2, 3]}, file)


def write_torch(path):
    torch.save({"latents": torch.ones(3)}, path)


def write_truncated(path):
    with open(path, "rb") as file:
        data = file.read()
    with open(path, "wb") as file:
        file.write(data[: len(data) * 2 // 3])


def write_header_only(path):
    with open(path, "r+b") as file:
        file.truncate(20)


def write_empty(path):
    open(path, "wb").close()


def write_garbage(path):
    with open(path, "wb") as file:
        file.write(bytes(range(256)) * 16)


def write_other(path):
    save_file({"weight": torch.ones(3)}, path)


def rewrite(**changes):
    """The same file with metadata or tensors changed; a tensor that becomes None is dropped."""

    def write(path):
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        for name, value in changes.items():
            if name in tensors:
                tensors.pop(name)
                if value is not None:
                    tensors[name] = value
            else:
                metadata[name] = value
        save_file(tensors, path, metadata=metadata)

    return write


@pytest.mark.parametrize(
    "write, words",
    [
        (write_pickle, "not a readable safetensors file"),
        (write_torch, "not a readable safetensors file"),
        (write_truncated, "not a readable safetensors file"),
        (write_header_only, "not a readable safetensors file"),
        (write_empty, "not a readable safetensors file"),
        (write_garbage, "not a readable safetensors file"),
        (write_other, "not a trajectory"),
        (rewrite(version="99"), "version 99"),
        (rewrite(scaling="latent"), "latent scaling"),
        (rewrite(latents=None), "damaged"),
        (rewrite(latents=torch.ones(2, 1, 4, 8, 8)), "damaged"),
        (rewrite(latents=torch.full((3, 2, 4, 8, 6), float("nan"))), "damaged"),
        (rewrite(sigmas=torch.tensor([3.0, 2.0, 1.0])), "damaged"),
        (rewrite(info="{"), "damaged"),
        (rewrite(info="[]"), "damaged"),
        (rewrite(fingerprint="abc"), "damaged"),
        (rewrite(fingerprint="abc:AAAA"), "damaged"),
        (rewrite(fingerprint="abc:!"), "damaged"),
        (rewrite(fingerprint="abc:\u00e4"), "damaged"),
        (rewrite(conditioning="[{}]"), "damaged"),
        (rewrite(**{"conditioning.0": None}), "damaged"),
    ],
)
def test_bad_files_are_one_sentence(path, write, words):
    save_trajectory(example(), path)
    write(path)
    with pytest.raises(ValueError, match=words) as refused:
        load_trajectory(path)
    assert "\n" not in str(refused.value) and os.path.dirname(path) not in str(refused.value)
    assert str(refused.value).count(": ") <= 1, "one remedy"


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_trajectory(str(tmp_path / "none.safetensors"))


def test_a_pickle_under_its_own_name_is_never_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (sys.exit, ("the pickle was run",))

    trap = tmp_path / "trap.pt"
    with open(trap, "wb") as file:
        pickle.dump(Trap(), file)
    with pytest.raises(ValueError, match="is a .safetensors file"):
        load_trajectory(str(trap))


def test_a_failed_save_leaves_the_old_file_and_no_other(path, monkeypatch):
    save_trajectory(example(), path)
    before = open(path, "rb").read()

    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", disk_full)
    with pytest.raises(ValueError, match="No space left on device") as refused:
        save_trajectory(example(guidance=3.0), path)
    assert "\n" not in str(refused.value)
    assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]
    assert open(path, "rb").read() == before


@pytest.mark.skipif(os.name == "nt", reason="file modes are POSIX's")
def test_saved_files_are_readable_like_any_other(path, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(b"")
    save_trajectory(example(), path)
    assert os.stat(path).st_mode == os.stat(other).st_mode
