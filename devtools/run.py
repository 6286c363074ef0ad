"""Runs one of the developer commands inside the environment: `python devtools/run.py demo ...`. Called by dev.py."""
import importlib
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def register_pack() -> None:
    """Import the checkout as `palimpsest`, whatever its folder is called, without its root on sys.path (nodes/ would hide the host's nodes.py)."""
    spec = importlib.util.spec_from_file_location("palimpsest", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    sys.modules["palimpsest"] = module
    spec.loader.exec_module(module)


if __name__ == "__main__":
    # python put this script's folder on the path, where server.py would hide the host's
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    register_pack()
    command = importlib.import_module(f"palimpsest.devtools.{sys.argv[1]}")
    try:
        sys.exit(command.main(sys.argv[2:]))
    except KeyboardInterrupt:
        sys.exit(130)
