"""What the set-up says when something cannot be had."""
import os
import socket
import sys

import pytest

from palimpsest.devtools import steps
from palimpsest.devtools.steps import SetupError, explain_pip, need_disk, pip


@pytest.mark.parametrize(("output", "word"), [
    ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk is full"),
    ("WARNING: Retrying ... NewConnectionError('<...>: Failed to establish a new connection: [Errno 111]')\nERROR: No matching distribution found for torch", "network"),
    ("ERROR: Could not find a version that satisfies the requirement torch (from versions: none)\nERROR: No matching distribution found for torch", "found no torch for Python 3"),
    ("ERROR: Could not find a version that satisfies the requirement torch (from versions: none)\nERROR: No matching distribution found for torch", "check the network, or"),
    ("ERROR: Could not install packages due to an OSError: [Errno 13] Permission denied: '/usr/lib'", "permissions"),
    ("error: subprocess-exited-with-error", "last lines of"),
])
def test_a_pip_that_failed_is_explained_in_one_sentence(tmp_path, output, word):
    sentence = explain_pip(output, "the requirements", tmp_path / "setup.log")
    assert word in sentence
    assert sentence.endswith(".") and "\n" not in sentence and "the requirements" in sentence.lower()


def test_an_index_that_cannot_be_reached_is_told_as_network(tmp_path, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = probe.getsockname()[1]
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{closed}/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(SetupError, match="index could not be reached.*check the network"):
        pip(sys.executable, ["download", "--no-deps", "--dest", str(tmp_path), "palimpsest-no-such-package"], "a package", tmp_path / "setup.log")
    assert "palimpsest-no-such-package" in (tmp_path / "setup.log").read_text(encoding="utf-8")


def test_too_little_disk_is_told_before_anything_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(steps.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 3.14e9}))
    with pytest.raises(SetupError, match=r"needs about 8 GB .* found 3\.1 GB"):
        need_disk(tmp_path, 8, "Setting up")
    need_disk(tmp_path, 3, "Setting up")
