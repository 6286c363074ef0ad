"""What every test needs: the host on sys.path, the checkout as package `palimpsest`, the shared fixtures.

The host is ComfyUI's source folder: COMFYUI_PATH, else `.host/comfyui-0.3.75` (made by `python dev.py test`).
Tests import the pack, their helpers and the developer tools alike:

    from palimpsest.inversion import ...
    from palimpsest.tests.helpers.models import ...
"""
import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOST = Path(os.environ.get("COMFYUI_PATH") or ROOT / ".host" / "comfyui-0.3.75").resolve()


def register_pack() -> None:
    """Import the checkout as `palimpsest`, whatever its folder is called. Its root never goes on sys.path: `nodes/` would hide the host's nodes.py."""
    if "palimpsest" in sys.modules:
        return
    spec = importlib.util.spec_from_file_location("palimpsest", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    sys.modules["palimpsest"] = module
    spec.loader.exec_module(module)


register_pack()

from palimpsest.devtools import hosts  # noqa: E402
from palimpsest.devtools.inprocess import put_host_on_path  # noqa: E402

try:
    put_host_on_path(HOST, ["--cpu"])
except FileNotFoundError as error:
    pytest.exit(str(error), 4)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-snapshot", action="store_true", help="write tests/server/object_info_snapshot.json anew from the running host")


def in_ci() -> bool:
    """Whether a missing browser or host is a failure and not a reason to skip."""
    return os.environ.get("CI", "").lower() in ("1", "true", "yes")


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


@pytest.fixture(scope="session")
def server():
    """The real host with this pack, started once for all tests that are marked `server` or `browser` (see devtools/server.py)."""
    from palimpsest.devtools.server import Server

    # without the API nodes the page's own content policy keeps the browser off the network
    with Server(HOST, ["--disable-api-nodes", "--preview-method", "latent2rgb"]) as running:
        yield running


@pytest.fixture(scope="session")
def oldest_server():
    """The oldest supported ComfyUI with this pack, started once."""
    from palimpsest.devtools.server import Server

    folder, overlay = hosts.host_folder(hosts.OLDEST), hosts.overlay_folder()
    if not folder.is_dir() or not overlay.is_dir():
        reason = f"ComfyUI {hosts.OLDEST} is not in .host (`python dev.py test` without COMFYUI_PATH gets it)"
        pytest.fail(reason) if in_ci() and "COMFYUI_PATH" not in os.environ else pytest.skip(reason)
    with Server(folder, ["--disable-api-nodes"], overlay=overlay) as running:
        yield running


@pytest.fixture
def keeps_serving(server):
    """For tests that make the server fail: afterwards it must still answer and run a stock graph to its picture.

    Use as `with keeps_serving() as failed: server.run(bad graph)`; the block must raise GraphError, found in failed.value.
    """
    from contextlib import contextmanager

    from palimpsest.devtools.client import GraphError
    from palimpsest.tests.helpers.stock import stock_graph

    @contextmanager
    def block():
        with pytest.raises(GraphError) as failed:
            yield failed
        result = server.run(stock_graph())
        assert server.view(result.images("2")[0]).startswith(b"\x89PNG"), "the server no longer makes pictures after the error"

    return block
