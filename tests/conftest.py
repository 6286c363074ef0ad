"""What every test needs: the host on sys.path, the checkout as package `palimpsest`, the shared fixtures.

The host is ComfyUI's source folder: COMFYUI_PATH, else `.host/comfyui-0.3.75` (made by `python dev.py test`).
Tests import the pack, their helpers and the developer tools alike:

    from palimpsest.inversion import ...
    from palimpsest.tests.helpers.models import ...
"""
import atexit
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOST = Path(os.environ.get("COMFYUI_PATH") or ROOT / ".host" / "comfyui-0.3.75").resolve()


def put_host_on_path() -> None:
    """Make `import comfy` work as it does in the server: arguments parsed, CPU, nothing written to the host's folder."""
    if not (HOST / "comfy" / "cli_args.py").is_file():
        pytest.exit(f"No ComfyUI at {HOST}: run `python dev.py test`, or set COMFYUI_PATH to a ComfyUI folder.", 4)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if str(HOST) not in sys.path:
        sys.path.insert(0, str(HOST))
    base = tempfile.mkdtemp(prefix="palimpsest-tests-")
    atexit.register(shutil.rmtree, base, ignore_errors=True)
    for folder in ("custom_nodes", "input", "output", "temp", "models"):
        (Path(base) / folder).mkdir()
    import comfy.options

    comfy.options.enable_args_parsing()
    # the host reads its arguments once, when cli_args is first imported; pytest's own must not be there then
    argv, sys.argv = sys.argv, ["main.py", "--cpu", "--base-directory", base]
    try:
        import comfy.cli_args  # noqa: F401
    finally:
        sys.argv = argv


def register_pack() -> None:
    """Import the checkout as `palimpsest`, whatever its folder is called. Its root never goes on sys.path: `nodes/` would hide the host's nodes.py."""
    if "palimpsest" in sys.modules:
        return
    spec = importlib.util.spec_from_file_location("palimpsest", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    sys.modules["palimpsest"] = module
    spec.loader.exec_module(module)


put_host_on_path()
register_pack()


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def host() -> Path:
    """The ComfyUI folder under test."""
    return HOST


@pytest.fixture(scope="session")
def oracles() -> Path:
    """Folder of oracle tensors: PALIMPSEST_ORACLES, else a sibling `shared/oracles`, else the test is skipped."""
    named = os.environ.get("PALIMPSEST_ORACLES")
    folder = Path(named) if named else ROOT.parent / "shared" / "oracles"
    if not folder.is_dir():
        pytest.skip(f"no oracle tensors at {folder.name if not named else named} (set PALIMPSEST_ORACLES)")
    return folder
