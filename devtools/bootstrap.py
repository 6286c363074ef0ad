"""`dev.py` itself: makes the environment, gets the host, then runs the command inside. Standard library only."""
import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from . import browsers, hosts
from .steps import ROOT, SetupError, need_disk, pip, step

VENV = ROOT / ".venv"
REQUIREMENTS = ROOT / "devtools" / "requirements.txt"
TEST_REQUIREMENTS = ROOT / "devtools" / "requirements-test.txt"
# glibc hands memory back after every sampling step and small machines then lose their time to page faults
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "268435456"}
WORKERS = 4  # of the test suite at most: each takes up to 4 GB
COMMANDS = {
    "demo": "run every sample graph whose models are there and write the pictures and a contact sheet to output/",
    "test": "run the test suite; what follows goes to pytest",
    "serve": "start ComfyUI with its page and this pack, and print the address",
    "score": "recompute quality scores on the mini models (mini/scores.json)",
    "bench": "measure speed and memory (benchmarks/results/)",
    "workflows": "rewrite the canvas workflows from the API graphs; with --pictures also thumbnails and pictures",
    "train": "train a mini model: train NAME --minutes N",
}


def venv_python(venv: Path = VENV) -> Path:
    """The environment's interpreter."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def pins(file: Path) -> str:
    """Hash of a requirement file: what the stamp holds."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def make_venv(venv: Path = VENV) -> Path:
    """Make the environment if it is not there; returns its interpreter. Raises SetupError."""
    python = venv_python(venv)
    if python.is_file():
        return python
    need_disk(venv.parent, 8, "Setting up")
    with step(f"Making the Python environment {venv.name}"):
        made = subprocess.run([sys.executable, "-m", "venv", str(venv)], capture_output=True, text=True)
        if made.returncode:
            if "ensurepip" in made.stdout + made.stderr:
                raise SetupError("This Python cannot make environments because its venv module is incomplete: install it (Debian, Ubuntu: apt-get install python3-venv).")
            raise SetupError(f"No Python environment could be made in {venv}: {(made.stderr or made.stdout).strip().splitlines()[-1]}")
    return python


def install(python: Path, files: dict[str, Path], stamp: Path) -> None:
    """Install what `files` (role -> requirement file) name, less those that the stamp says were the last ones of their role.

    One hash per role: after another file of the same role, the first one's pins are no longer what is installed.
    Raises SetupError.
    """
    try:
        done = json.loads(stamp.read_text(encoding="utf-8")) if stamp.is_file() else {}
    except ValueError:
        done = {}  # half-written by a machine that went down: install again
    if not isinstance(done, dict):
        done = {}
    todo = {role: file for role, file in files.items() if done.get(role) != pins(file)}
    if not todo:
        return
    # what an install that breaks off leaves behind is neither the old state nor the new
    stamp.write_text(json.dumps({role: digest for role, digest in done.items() if role not in todo}), encoding="utf-8")
    with step("Installing the requirements (the first time about 6 GB)"):
        listed = [argument for file in todo.values() for argument in ("-r", str(file))]
        pip(python, ["install", *listed], "the requirements", VENV / "setup.log")
    stamp.write_text(json.dumps({**done, **{role: pins(file) for role, file in todo.items()}}, sort_keys=True), encoding="utf-8")


def own_requirements(host: Path) -> Path:
    """A user's ComfyUI brings its own pins: its requirements without the torch packages, written beside our log."""
    lines = (host / "requirements.txt").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.strip() and not line.lstrip().startswith(("#", "torchaudio"))]
    target = VENV / "requirements-host.txt"
    target.write_text("\n".join([*kept, "requests", ""]), encoding="utf-8")
    return target


def environment(host: Path, own: bool) -> dict[str, str]:
    """The environment of the command that runs inside. own: the host is the user's, so the tests cannot ask for our second one."""
    env = {**os.environ, "COMFYUI_PATH": str(host), "PALIMPSEST_OWN_HOST": "1" if own else ""}
    if sys.platform == "linux":
        env = {**MALLOC, **env}
    return env


def parser() -> argparse.ArgumentParser:
    """Options of dev.py; what it does not know goes on to the command."""
    top = argparse.ArgumentParser(prog="dev.py", description="Palimpsest's commands.", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                                  epilog="commands:\n" + "\n".join(f"  {name:9} {text}" for name, text in COMMANDS.items()))
    top.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    top.add_argument("--comfyui", metavar="PATH", default=os.environ.get("COMFYUI_PATH"), help="use this ComfyUI (also COMFYUI_PATH) instead of getting one")
    top.add_argument("--no-venv", action="store_true", help="use the Python that runs dev.py as it is and install nothing")
    top.add_argument("--system-packages", action="store_true", help="install the distribution's Chromium where that is possible (for the browser tests)")
    return top


def set_up(options: argparse.Namespace) -> tuple[Path, Path]:
    """Interpreter and host folder for the command, made ready. Raises SetupError."""
    testing = options.command == "test"
    chosen = hosts.check_host(Path(options.comfyui)) if options.comfyui else None
    python = Path(sys.executable) if options.no_venv else make_venv()
    host = chosen or hosts.get_host(python).resolve()
    if not options.no_venv:
        files = {"host": REQUIREMENTS if chosen is None else own_requirements(chosen)}
        if testing:
            files["test"] = TEST_REQUIREMENTS
        install(python, files, VENV / "palimpsest-setup.json")
    if testing and chosen is None:
        hosts.get_host(python, hosts.OLDEST)
        hosts.get_overlay(python)
    if testing and options.system_packages:
        browsers.install_chromium()
    return python, host


def script(python: Path, name: str) -> Path | None:
    """A console script of that Python, None if it has none: beside it in an environment, on Windows in a folder of its own."""
    asked = subprocess.run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('scripts'))"], capture_output=True, text=True)
    file = f"{name}.exe" if os.name == "nt" else name
    places = [python.parent, *(Path(line) for line in asked.stdout.splitlines()[:1])]
    return next((place / file for place in places if (place / file).is_file()), None)


def workers(arguments: list[str]) -> list[str]:
    """Options that spread the test files over the processor's cores, unless `arguments` say how many workers there are to be (-n 0: none)."""
    if any(argument.startswith(("-n", "--numprocesses")) for argument in arguments):
        return ["--dist", "loadfile"]
    return ["-n", str(min(os.cpu_count() or 1, WORKERS)), "--dist", "loadfile"]


def main(argv: list[str] | None = None) -> int:
    """Set up, run the command, return its exit status."""
    options, rest = parser().parse_known_args(argv)
    try:
        python, host = set_up(options)
    except SetupError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped; run the command again to go on.", file=sys.stderr)
        return 130
    if options.command == "test":
        # the console script, not `python -m pytest`: that would put the checkout on sys.path, where nodes/ hides the host's nodes.py
        pytest = script(python, "pytest")
        if pytest is None:
            print(f"{python} has no pytest: leave --no-venv out, or install devtools/requirements-test.txt there.", file=sys.stderr)
            return 1
        command = [str(pytest), *workers(rest), *rest]
    else:
        command = [str(python), str(ROOT / "devtools" / "run.py"), options.command, *rest]
    child = subprocess.Popen(command, env=environment(host, bool(options.comfyui)), cwd=ROOT)
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            continue  # the child got the same Ctrl-C and is putting things away
