"""The host inside this process (tests, scores, benchmarks, training)."""
import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path


def put_host_on_path(host: Path, arguments: list[str]) -> None:
    """Make `import comfy` work as it does in the server, with these arguments of main.py, writing to a temporary base directory.

    Raises FileNotFoundError if `host` is no ComfyUI folder.
    """
    if not (host / "comfy" / "cli_args.py").is_file():
        raise FileNotFoundError(f"No ComfyUI at {host}: run `python dev.py test`, or set COMFYUI_PATH to a ComfyUI folder.")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if str(host) not in sys.path:
        sys.path.insert(0, str(host))
    base = tempfile.mkdtemp(prefix="palimpsest-")
    atexit.register(shutil.rmtree, base, ignore_errors=True)
    for folder in ("custom_nodes", "input", "output", "temp", "models"):
        (Path(base) / folder).mkdir()
    import comfy.options

    comfy.options.enable_args_parsing()
    # the host reads its arguments once, when cli_args is first imported; our own must not be there then
    argv, sys.argv = sys.argv, ["main.py", "--base-directory", base, *arguments]
    try:
        import comfy.cli_args  # noqa: F401
    finally:
        sys.argv = argv
