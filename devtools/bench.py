"""`dev.py bench [NAME ...]`: speed and memory. Every module benchmarks/NAME.py offers `bench(quick: bool) -> dict` (see figures.py).

benchmarks/results/NAME.json holds the CPU run at top level and the CUDA run under "cuda"; each run replaces its own half.
Quick figures go to output/.
"""
import argparse
import importlib
import os
import sys
from pathlib import Path

from . import figures, readme
from .inprocess import put_host_on_path

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"


def benchmarks(folder: Path = BENCHMARKS) -> list[str]:
    """Names of the benchmarks: modules with a function bench (helpers start with an underscore)."""
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_") and "\ndef bench(" in path.read_text(encoding="utf-8"))


def placed(old: dict, found: dict, cuda: bool) -> dict:
    """The result file's new content: this device's half replaced, the other kept."""
    if cuda:
        return {**old, "cuda": found}
    return {**found, **({"cuda": old["cuda"]} if "cuda" in old else {})}


def main(argv: list[str]) -> int:
    """Exit status 0 if everything was measured."""
    names = benchmarks()
    parser = argparse.ArgumentParser(prog="dev.py bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", help=f"one of: {', '.join(names) or 'none yet'} (default: all)")
    parser.add_argument("--quick", action="store_true", help="few rounds, to check that measuring works")
    parser.add_argument("--cuda", action="store_true", help="measure on the graphics card")
    options = parser.parse_args(argv)
    unknown = set(options.name) - set(names)
    if unknown:
        print(f"There is no benchmark called {', '.join(sorted(unknown))}; there are: {', '.join(names) or 'none yet'}.", file=sys.stderr)
        return 2
    if options.cuda:
        import torch

        if not torch.cuda.is_available():
            print("torch finds no CUDA device here: leave --cuda out.", file=sys.stderr)
            return 2
    put_host_on_path(Path(os.environ["COMFYUI_PATH"]), importlib.import_module("palimpsest.benchmarks._protocol").host_arguments(options.cuda))
    for name in options.name or names:
        print(f"{name} ...", flush=True)
        found = figures.complete(importlib.import_module(f"palimpsest.benchmarks.{name}").bench(options.quick))
        figures.show(found)
        target = ROOT / "output" / f"bench-{name}-quick.json" if options.quick else BENCHMARKS / "results" / f"{name}.json"
        figures.write(target, placed(figures.read(target), found, options.cuda))
        if not options.quick:
            readme.update()
        print(f"{name} done: {target.relative_to(ROOT).as_posix()}", flush=True)
    return 0
