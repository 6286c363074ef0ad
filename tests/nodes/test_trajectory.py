"""Save Trajectory and Load Trajectory as nodes, in the host's own folders."""

import os
from pathlib import Path

import pytest
import torch
from palimpsest.inversion.trajectory import Trajectory
from palimpsest.nodes.trajectory import FILES, LoadTrajectory, SaveTrajectory
from safetensors.torch import save_file

pytestmark = pytest.mark.usefixtures("folders")


def example(**changes):
    parts = dict(
        sigmas=torch.tensor([0.0, 1.0, 14.6]),
        latents=torch.randn(3, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        conditioning=[],
        architecture="SDXL",
        prediction="eps",
        fingerprint="abc:AAA=",
    )
    return Trajectory(**{**parts, **changes})


def saved(prefix="trajectories/one", **changes):
    return SaveTrajectory.execute(example(**changes), prefix)


def test_save_then_load():
    out = saved()
    name = out.args[0]
    assert name == "trajectories/one_00001_.trajectory.safetensors [output]"
    assert name in FILES.names()
    assert LoadTrajectory.validate_inputs(name) is True
    trajectory, report = LoadTrajectory.execute(name).args
    assert torch.equal(trajectory.latents, example().latents)
    assert "SDXL" in report and "2 steps" in report
    assert "0.0 MB" in out.ui["text"][0] or "MB" in out.ui["text"][0]


def test_saving_again_counts_up():
    saved()
    assert saved().args[0] == "trajectories/one_00002_.trajectory.safetensors [output]"


def test_without_a_subfolder():
    assert saved("one").args[0] == "one_00001_.trajectory.safetensors [output]"


def test_what_was_left_out_is_said():
    out = saved(conditioning=[[torch.ones(1, 77, 8), {"control": object()}]])
    assert "control" in out.ui["text"][0]
    assert "control" in LoadTrajectory.execute(out.args[0]).args[1]


def test_the_list_holds_input_files_and_saved_trajectories_but_no_saved_checkpoints(folders):
    saved()
    save_file({"w": torch.ones(1)}, str(folders / "output" / "checkpoint.safetensors"))
    save_file({"w": torch.ones(1)}, str(folders / "input" / "mine.safetensors"))
    assert FILES.names() == ["mine.safetensors", "trajectories/one_00001_.trajectory.safetensors [output]"]


def test_the_list_does_not_walk_through_all_folders(folders, monkeypatch):
    """Regression: every look at the node read the whole input and output trees."""
    name = saved("elsewhere/deep/one").args[0]
    (folders / "input" / "sub").mkdir()
    save_file({"w": torch.ones(1)}, str(folders / "input" / "sub" / "mine.safetensors"))
    monkeypatch.setattr(os, "walk", lambda *_, **__: pytest.fail("walked"))
    assert FILES.names() == []
    assert LoadTrajectory.validate_inputs(name) is True, "API users may still name it"
    assert torch.equal(LoadTrajectory.execute(name).args[0].latents, example().latents)


def test_the_list_of_a_host_without_those_folders_is_empty(folders):
    for name in ("input", "output"):
        (folders / name).rmdir()
    assert FILES.names() == []


def test_a_changed_file_is_read_again():
    name = saved().args[0]
    before = LoadTrajectory.fingerprint_inputs(name)
    assert LoadTrajectory.fingerprint_inputs(name) == before
    path = FILES.resolve(name)
    os.utime(path, ns=(1, 1))
    assert LoadTrajectory.fingerprint_inputs(name) != before


@pytest.mark.parametrize("name", ["../secret.safetensors", "../output/x.safetensors [output]", "a/../../b.safetensors [input]", "/etc/passwd"])
def test_names_that_leave_the_folders_are_refused(folders, name):
    (folders / "secret.safetensors").write_bytes(b"x")
    with_refusal = LoadTrajectory.validate_inputs(name)
    if name.startswith("../output"):
        assert "does not exist" in with_refusal
        return
    assert "outside" in with_refusal
    with pytest.raises(ValueError, match="outside"):
        LoadTrajectory.execute(name)


def test_missing_file_is_one_sentence():
    assert "does not exist" in LoadTrajectory.validate_inputs("none.safetensors")
    assert "no trajectory file yet" in LoadTrajectory.validate_inputs("none found")
    assert LoadTrajectory.fingerprint_inputs("none.safetensors") == "none.safetensors"


def test_other_file_is_one_sentence(folders):
    save_file({"w": torch.ones(1)}, str(folders / "input" / "mine.safetensors"))
    with pytest.raises(ValueError, match="not a trajectory"):
        LoadTrajectory.execute("mine.safetensors")


def test_saving_outside_the_output_folder_is_the_hosts_refusal(folders):
    with pytest.raises(Exception, match="outside the output folder"):
        saved("../escaped/one")
    assert not Path(folders / "escaped").exists()
