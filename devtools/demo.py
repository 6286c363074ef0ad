"""`dev.py demo`: every sample graph through the real server, pictures and a contact sheet to output/."""
import argparse
import os
import re
import sys
from pathlib import Path

from . import graphs, reading
from .client import GraphError, Interrupted
from .devices import accelerator
from .server import Server, ServerError
from .sheet import Row, rows_of, write_sheet

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "output"


class Progress:
    """One changing line on a terminal, nothing on a pipe."""

    def __init__(self, label: str, graph: dict) -> None:
        self.label, self.graph, self.shown = label, graph, sys.stdout.isatty()

    def __call__(self, node_id: str, value: int | None, maximum: int | None) -> None:
        if self.shown:
            count = "" if value is None else f" {value}/{maximum}"
            print(f"\r{self.label}{self.graph.get(node_id, {}).get('class_type', '')}{count}\033[K", end="", flush=True)

    def done(self, text: str) -> None:
        print(f"\r{self.label}{text}\033[K" if self.shown else f"{self.label}{text}", flush=True)


def heading(stem: str) -> str:
    """A file name as a title: `mini-pnp-recolour` -> `mini pnp recolour`."""
    return re.sub(r"[-_]+", " ", stem)


def save_outputs(server: Server, stem: str, graph: dict, result, folder: Path) -> tuple[list[Path], list[Row]]:
    """Fetch a graph's pictures into `folder`; returns the files and the rows of the contact sheet."""
    files, outputs = [], []
    for node_id, node in graph.items():
        if node["class_type"].startswith("Palimpsest"):
            continue  # what our nodes show on themselves is for the canvas; the graph saves what belongs on the sheet
        role, pictures = graphs.role(node), []
        for number, picture in enumerate(result.images(node_id)):
            data = server.view(picture)
            name = re.sub(r"[^a-z0-9]+", "-", f"{role.name} {role.row}".lower()).strip("-") + (f"-{number + 1}" if number else "")
            path = folder / f"{stem}-{name}{Path(picture['filename']).suffix}"
            if path in files:  # two nodes with one title
                path = path.with_stem(f"{path.stem}-node{node_id}")
            path.write_bytes(data)
            files.append(path)
            pictures.append(data)
        text = result.text(node_id)
        if pictures or text:
            outputs.append((role, pictures, text))
    if stem.startswith("mini-"):
        outputs += reading.scores(outputs)
    return files, rows_of(heading(stem), outputs)


def run_graphs(server: Server, paths: list[Path], folder: Path) -> tuple[list[Path], list[Row], list[str]]:
    """Run the graphs one after the other; returns files, rows and the sentences of what failed."""
    offered = server.object_info()
    models = [server.host / "models", server.base / "models"]
    files, rows, failures = [], [], []
    for index, path in enumerate(paths, 1):
        label = f"[{index}/{len(paths)}] {path.stem}: "
        try:
            graph = graphs.load_graph(path)
            missing = graphs.missing_models(graph, offered, models)
            if missing and not path.stem.startswith("mini-"):
                print(f"{label}skipped: needs {', '.join(map(str, missing))}", flush=True)
                continue
            if missing:
                raise ValueError(f"{path.name} needs {', '.join(map(str, missing))}, which this checkout should hold")
            progress = Progress(label, graph)
            result = server.run(graph, progress)
            new_files, new_rows = save_outputs(server, path.stem, graph, result, folder)
            if not new_files:
                raise ValueError(f"{path.name} made no picture: it needs a SaveImage or PreviewImage node")
        except (GraphError, Interrupted, ValueError) as error:
            print(f"{label}failed: {error}", flush=True)
            failures.append(f"{path.stem}: {error}")
            continue
        progress.done(f"{result.seconds:.1f} s, {len(new_files)} picture{'s' * (len(new_files) != 1)}")
        files += new_files
        rows += new_rows
    return files, rows, failures


def main(argv: list[str]) -> int:
    """Exit status 0 if every graph that could run did."""
    options = argparse.ArgumentParser(prog="dev.py demo", description=__doc__)
    options.add_argument("graph", nargs="*", help="only graphs whose name holds one of these words")
    options.add_argument("--cpu", action="store_true", help="do not use the graphics card")
    chosen = options.parse_args(argv)
    paths = graphs.in_order([path for path in graphs.api_graphs() if not chosen.graph or any(word in path.stem for word in chosen.graph)])
    if not paths:
        which = f"whose name holds {' or '.join(chosen.graph)}" if chosen.graph else "(they belong to the checkout)"
        print(f"There are no graphs in workflows/api {which}, so there is nothing to run.")
        return 1
    OUTPUT.mkdir(exist_ok=True)
    try:
        print("Starting ComfyUI ...", end=" ", flush=True)
        with Server(Path(os.environ["COMFYUI_PATH"]), ["--disable-api-nodes"], cpu=chosen.cpu or not accelerator()) as server:
            print(f"ready at {server.address}", flush=True)
            files, rows, failures = run_graphs(server, paths, OUTPUT)
    except ServerError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    if rows:
        write_sheet(rows, OUTPUT / "contact-sheet.png")
        files.append(OUTPUT / "contact-sheet.png")
    print("\n".join(["", *(path.relative_to(ROOT).as_posix() for path in files)]))
    if failures:
        print(f"\n{len(failures)} of {len(paths)} graphs failed:\n  " + "\n  ".join(failures), file=sys.stderr)
    return 1 if failures else 0
