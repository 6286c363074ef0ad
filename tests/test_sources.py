"""Rules for the sources themselves."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

from palimpsest.devtools.graphs import ROOT

try:
    FILES = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
except (OSError, subprocess.CalledProcessError):  # an unpacked archive
    FILES = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py") if not path.relative_to(ROOT).parts[0].startswith(".")]
SOURCES = sorted(name for name in FILES if name.endswith(".py") and (ROOT / name).is_file())
# what users load; the rest is for developers
PACK = [name for name in SOURCES if name.split("/")[0] not in ("tests", "benchmarks", "devtools", "dev.py")]


def test_ruff_finds_nothing():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", *SOURCES], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", SOURCES)
def test_source_is_ascii_and_not_too_long(name):
    """Windows reads sources in its own code page where Python is told nothing else."""
    content = (ROOT / name).read_bytes()
    assert content.isascii()
    assert content.count(b"\n") <= 350


@pytest.mark.parametrize("name", PACK)
def test_pack_source_keeps_the_registrys_and_our_rules(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.search(r"^\s*(import|from) (subprocess|requests|urllib|pickle|timm)\b", text, re.M)
    # a bare tensor in a .pth is the one thing that the host's own safe loader cannot read
    assert not re.search(r"torch\.load\((?!.*weights_only=True)|\.cuda\(|\beval\(|\bexec\(|NODE_CLASS_MAPPINGS", text.replace("model.eval(", "").replace(".eval(", ""))
    assert not re.search(r"^\s*from comfy\S* import .*\b_[a-z]", text, re.M), "a private name of the host"


def test_no_repository_address_outside_pyproject():
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    address = re.search(r'^Repository = "(.*)"', pyproject, re.M)[1]
    if address:
        assert not [name for name in FILES if name and name != "pyproject.toml" and Path(ROOT / name).suffix in (".py", ".md", ".toml")
                    and address in (ROOT / name).read_text(encoding="utf-8")]
