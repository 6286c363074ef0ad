"""What every test needs: the host on sys.path, the checkout as package `palimpsest`, the shared fixtures.

The host is ComfyUI's source folder: COMFYUI_PATH, else `.host/comfyui-0.3.75` (made by `python dev.py test`).
Tests import the pack, their helpers and the developer tools alike:

    from palimpsest.inversion import ...
    from palimpsest.tests.helpers.models import ...
"""
import os
import runpy
from pathlib import Path

import pytest

# Before torch is imported, here and in the servers that tests start. The models of the tests are too small to gain from a second thread; on a busy
# machine threads that wait for each other take most of the time, and the order of their sums, and with it the last digit, changes from run to run.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
HOST = Path(os.environ.get("COMFYUI_PATH") or ROOT / ".host" / "comfyui-0.3.75").resolve()


# the checkout as `palimpsest`, as the developer commands import it
runpy.run_path(str(ROOT / "devtools" / "run.py"))["register_pack"]()

from palimpsest.devtools import hosts  # noqa: E402
from palimpsest.devtools.inprocess import put_host_on_path  # noqa: E402
from palimpsest.tests.helpers.ci import absent  # noqa: E402

try:
    put_host_on_path(HOST, ["--cpu"])
except FileNotFoundError as error:
    pytest.exit(str(error), 4)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-snapshot", action="store_true", help="write tests/server/object_info_snapshot.json anew from the running host")


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
        # dev.py, which always sets COMFYUI_PATH, says whether that ComfyUI is the user's; then it does not get ours
        absent(f"ComfyUI {hosts.OLDEST} is not in .host (`python dev.py test` without --comfyui gets it)", excused=bool(os.environ.get("PALIMPSEST_OWN_HOST")))
    with Server(folder, ["--disable-api-nodes"], overlay=overlay) as running:
        yield running


@pytest.fixture
def folders(tmp_path):
    """The host's input and output folders, empty ones for this test, below the returned path."""
    import folder_paths

    before = folder_paths.get_input_directory(), folder_paths.get_output_directory()
    for name in ("input", "output"):
        (tmp_path / name).mkdir()
    folder_paths.set_input_directory(str(tmp_path / "input"))
    folder_paths.set_output_directory(str(tmp_path / "output"))
    yield tmp_path
    folder_paths.set_input_directory(before[0])
    folder_paths.set_output_directory(before[1])


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
