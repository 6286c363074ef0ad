"""dev.py: options, the stamp, clear sentences."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from palimpsest.devtools import bootstrap, hosts
from palimpsest.devtools.steps import SetupError
from palimpsest.tests.helpers.ci import absent


@pytest.fixture
def installs(monkeypatch, tmp_path):
    """The pip calls that install() makes."""
    calls = []
    monkeypatch.setattr(bootstrap, "pip", lambda python, arguments, what, log: calls.append(arguments))
    return calls


def test_an_old_python_is_told_so(root):
    code = "import sys, runpy; sys.version_info = (3, 9, 2); runpy.run_path('dev.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == "Palimpsest needs Python 3.10 or newer, this is 3.9: run dev.py with a newer one."


def test_dev_py_needs_no_package(root):
    """-S -I: a Python without site-packages and without the environment's paths."""
    done = subprocess.run([sys.executable, "-S", "-I", str(root / "dev.py"), "--help"], cwd=root.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in ("demo", "test", "serve", "score", "bench", "train", "--comfyui", "--no-venv", "--system-packages"))


def test_a_folder_that_is_no_comfyui_is_refused_before_anything_is_made(root, tmp_path):
    done = subprocess.run([sys.executable, str(root / "dev.py"), "demo", "--comfyui", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert str(tmp_path) in done.stderr and "main.py" in done.stderr and "Traceback" not in done.stderr


def test_the_second_install_does_nothing(installs, tmp_path):
    pins, stamp = tmp_path / "requirements.txt", tmp_path / "stamp.json"
    pins.write_text("one==1\n")
    bootstrap.install("python", {"host": pins}, stamp)
    bootstrap.install("python", {"host": pins}, stamp)
    assert installs == [["install", "-r", str(pins)]]


def test_a_changed_pin_is_installed_and_an_unchanged_file_is_not(installs, tmp_path):
    pins, tests, stamp = tmp_path / "requirements.txt", tmp_path / "requirements-test.txt", tmp_path / "stamp.json"
    pins.write_text("one==1\n")
    tests.write_text("two==2\n")
    bootstrap.install("python", {"host": pins}, stamp)
    bootstrap.install("python", {"host": pins, "test": tests}, stamp)
    pins.write_text("one==1.1\n")
    bootstrap.install("python", {"host": pins, "test": tests}, stamp)
    assert installs == [["install", "-r", str(pins)], ["install", "-r", str(tests)], ["install", "-r", str(pins)]]


def test_going_back_to_the_first_host_installs_its_pins_again(installs, tmp_path):
    """Regression: the stamp remembered every file ever installed, so after another ComfyUI's pins ours counted as installed."""
    ours, users, stamp = tmp_path / "requirements.txt", tmp_path / "requirements-host.txt", tmp_path / "stamp.json"
    ours.write_text("one==1\n")
    users.write_text("one==2\n")
    for file in (ours, users, ours, ours):
        bootstrap.install("python", {"host": file}, stamp)
    assert [call[-1] for call in installs] == [str(ours), str(users), str(ours)]


def test_an_install_that_failed_half_way_is_done_again(installs, monkeypatch, tmp_path):
    ours, users, stamp = tmp_path / "requirements.txt", tmp_path / "requirements-host.txt", tmp_path / "stamp.json"
    ours.write_text("one==1\n")
    users.write_text("one==2\n")
    bootstrap.install("python", {"host": ours}, stamp)
    with monkeypatch.context() as broken:
        def fail(*_):
            raise SetupError("no network")

        broken.setattr(bootstrap, "pip", fail)
        with pytest.raises(SetupError):
            bootstrap.install("python", {"host": users}, stamp)
    bootstrap.install("python", {"host": ours}, stamp)
    assert len(installs) == 2


@pytest.mark.parametrize("damaged", ["[", "[]", '["0a1b"]'])
def test_a_damaged_stamp_installs_again(installs, tmp_path, damaged):
    pins, stamp = tmp_path / "requirements.txt", tmp_path / "stamp.json"
    pins.write_text("one==1\n")
    stamp.write_text(damaged)
    bootstrap.install("python", {"host": pins}, stamp)
    bootstrap.install("python", {"host": pins}, stamp)
    assert len(installs) == 1


def test_an_install_that_failed_leaves_no_stamp(monkeypatch, tmp_path):
    def fail(*_):
        raise SetupError("no network")

    monkeypatch.setattr(bootstrap, "pip", fail)
    pins, stamp = tmp_path / "requirements.txt", tmp_path / "stamp.json"
    pins.write_text("one==1\n")
    with pytest.raises(SetupError):
        bootstrap.install("python", {"host": pins}, stamp)
    assert not stamp.exists() or json.loads(stamp.read_text()) == {}


def test_a_python_without_ensurepip_is_told_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(bootstrap, "need_disk", lambda *_: None)
    monkeypatch.setattr(bootstrap.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "not created because ensurepip is not available.", ""))
    with pytest.raises(SetupError, match="python3-venv"):
        bootstrap.make_venv(tmp_path / ".venv")


def test_an_environment_that_is_there_is_kept(monkeypatch, tmp_path):
    python = bootstrap.venv_python(tmp_path / ".venv")
    python.parent.mkdir(parents=True)
    python.touch()
    monkeypatch.setattr(bootstrap.subprocess, "run", lambda *_, **__: pytest.fail("made again"))
    assert bootstrap.make_venv(tmp_path / ".venv") == python


@pytest.mark.parametrize(("line", "command", "rest"), [
    ("train pnp --minutes 5", "train", ["pnp", "--minutes", "5"]),
    ("test -x -k word --system-packages", "test", ["-x", "-k", "word"]),
    ("--no-venv bench pnp --quick", "bench", ["pnp", "--quick"]),
])
def test_what_dev_py_does_not_know_goes_to_the_command(line, command, rest):
    options, left = bootstrap.parser().parse_known_args(line.split())
    assert (options.command, left) == (command, rest)


@pytest.mark.parametrize(("cores", "line", "expected"), [(1, "-x", "-n 1"), (2, "tests/nodes", "-n 2"), (64, "", "-n 4"), (None, "", "-n 1"), (8, "-n 0 -s", ""), (8, "-n3", "")])
def test_tests_run_on_all_cores_unless_told_otherwise(monkeypatch, cores, line, expected):
    monkeypatch.setattr(bootstrap.os, "cpu_count", lambda: cores)
    assert bootstrap.workers(line.split()) == [*expected.split(), "--dist", "loadfile"]


def test_a_users_comfyui_brings_its_own_requirements(monkeypatch, tmp_path):
    monkeypatch.setattr(bootstrap, "VENV", tmp_path)
    host = tmp_path / "ComfyUI"
    host.mkdir()
    (host / "requirements.txt").write_text("torch\ntorchaudio\ntorchsde\n\n#optional:\ncomfyui-frontend-package==9.9\n")
    assert bootstrap.own_requirements(host).read_text().split() == ["torch", "torchsde", "comfyui-frontend-package==9.9", "requests"]


def test_with_no_venv_nothing_is_installed(monkeypatch, host):
    monkeypatch.setattr(bootstrap, "pip", lambda *_: pytest.fail("installed"))
    monkeypatch.setattr(bootstrap, "make_venv", lambda *_: pytest.fail("made an environment"))
    options, _ = bootstrap.parser().parse_known_args(["demo", "--no-venv", "--comfyui", str(host)])
    python, found = bootstrap.set_up(options)
    assert str(python) == sys.executable and found == host


def test_the_pins_of_both_hosts_are_those_of_their_own_requirements(root):
    """A new host version brings new pins for its front end; ours must follow."""
    for version, name in ((hosts.CURRENT, "requirements.txt"), (hosts.OLDEST, f"requirements-host-{hosts.OLDEST}.txt")):
        folder = hosts.host_folder(version)
        if not folder.is_dir():
            pytest.skip(f"ComfyUI {version} is not in .host")
        ours = set((root / "devtools" / name).read_text(encoding="utf-8").split("\n"))
        theirs = {line.strip() for line in (folder / "requirements.txt").read_text(encoding="utf-8").splitlines() if line.startswith("comfyui-")}
        assert theirs and theirs <= ours


@pytest.mark.parametrize("own", [True, False])
def test_the_tests_are_told_whether_the_host_is_the_users(tmp_path, monkeypatch, own):
    """Regression: COMFYUI_PATH, which is always set for the tests, was taken for the user's, so in CI a missing host was never a failure."""
    monkeypatch.setenv("PALIMPSEST_OWN_HOST", "left over")
    env = bootstrap.environment(tmp_path, own)
    assert env["COMFYUI_PATH"] == str(tmp_path) and bool(env["PALIMPSEST_OWN_HOST"]) is own


@pytest.mark.parametrize(("ci", "excused", "outcome"), [
    ("true", False, pytest.fail.Exception), ("true", True, pytest.skip.Exception), ("", False, pytest.skip.Exception), ("0", False, pytest.skip.Exception)])
def test_what_is_missing_fails_in_ci_only(monkeypatch, ci, excused, outcome):
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="no host"):
        absent("no host", excused)


def test_scripts_are_found_where_that_python_keeps_them(monkeypatch, tmp_path):
    """Regression: on Windows the scripts of a Python without environment lie in a folder of their own."""
    file = tmp_path / "Scripts" / ("pytest.exe" if os.name == "nt" else "pytest")
    file.parent.mkdir()
    monkeypatch.setattr(bootstrap.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, f"{file.parent}\n", ""))
    python = tmp_path / "python"
    assert bootstrap.script(python, "pytest") is None
    file.touch()
    assert bootstrap.script(python, "pytest") == file


def test_this_pythons_own_pytest_is_found():
    assert bootstrap.script(Path(sys.executable), "pytest").is_file()
