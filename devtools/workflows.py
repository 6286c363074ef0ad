"""`dev.py workflows`: put the scores' settings into workflows/api/*.json and rewrite workflows/*.json from there; with --pictures also every picture that the repository shows."""
import argparse
import os
import sys
from pathlib import Path

from . import canvas, demo, graphs, pictures, settings
from .devices import accelerator
from .inprocess import put_host_on_path
from .server import Server, ServerError


def main(argv: list[str]) -> int:
    """Exit status 0 if all was written."""
    options = argparse.ArgumentParser(prog="dev.py workflows", description=__doc__)
    options.add_argument("--pictures", action="store_true", help="run the mini graphs and remake the thumbnails and the pictures of the README and the help pages")
    options.add_argument("--cpu", action="store_true", help="do not use the graphics card")
    chosen = options.parse_args(argv)
    try:
        put_host_on_path(Path(os.environ["COMFYUI_PATH"]), ["--cpu"])
        written = settings.write_all(*settings.from_scores())
        with Server(Path(os.environ["COMFYUI_PATH"]), ["--disable-api-nodes"], cpu=chosen.cpu or not accelerator()) as server:
            written += canvas.write_all(server.object_info())
            if chosen.pictures:
                demo.OUTPUT.mkdir(exist_ok=True)
                found, failures = {}, []
                for path in graphs.in_order([path for path in graphs.api_graphs() if path.stem.startswith("mini-")]):
                    _, found[path.stem], failed = demo.run_graphs(server, [path], demo.OUTPUT)
                    failures += failed
                if failures:
                    print("Nothing was drawn, because a graph failed.", file=sys.stderr)
                    return 1
                written += pictures.write_all(found)
    except (ServerError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(path.relative_to(graphs.ROOT).as_posix() for path in written) or "Every canvas workflow is up to date.")
    return 0
