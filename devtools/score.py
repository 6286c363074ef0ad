"""`dev.py score [NAME ...]`: quality on the mini models, merged into mini/scores.json.

Every module devtools/scores/NAME.py offers `score(quick: bool) -> dict` (nested figures, see figures.py) and may offer
`QUICK_LIMITS = {"pnp.edit_success": 0.4}`: with --quick a figure below its limit fails the command; and `plot(figures)`,
which draws the committed figures after a full run. Quick figures go to
output/, never into the committed file.
"""
import argparse
import importlib
import os
import sys
import time
from pathlib import Path

from . import figures, readme
from .devices import accelerator
from .inprocess import put_host_on_path

ROOT = Path(__file__).resolve().parent.parent
SCORES_FOLDER = ROOT / "devtools" / "scores"
SCORES_FILE = ROOT / "mini" / "scores.json"


def scores(folder: Path = SCORES_FOLDER) -> list[str]:
    """Names of what can be scored."""
    return sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")


def below_limits(module, found: dict) -> list[str]:
    """Sentences for the figures that miss the module's QUICK_LIMITS."""
    values = {name: leaf["value"] for name, leaf in figures.leaves(found)}
    return [f"{name} = {values.get(name)}, expected at least {limit}" for name, limit in getattr(module, "QUICK_LIMITS", {}).items()
            if not values.get(name, float("-inf")) >= limit]


def main(argv: list[str]) -> int:
    """Exit status 0 if everything was scored (and, with --quick, no figure missed its loose limit)."""
    names = scores()
    parser = argparse.ArgumentParser(prog="dev.py score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", help=f"one of: {', '.join(names) or 'none yet'} (default: all)")
    parser.add_argument("--quick", action="store_true", help="few samples and loose limits, to check that scoring works")
    parser.add_argument("--cuda", action="store_true", help="use the graphics card (committed scores come from the CPU)")
    options = parser.parse_args(argv)
    unknown = set(options.name) - set(names)
    if unknown:
        print(f"There is no score called {', '.join(sorted(unknown))}; there are: {', '.join(names) or 'none yet'}.", file=sys.stderr)
        return 2
    if options.cuda and not accelerator():
        print("torch finds no graphics card here: leave --cuda out.", file=sys.stderr)
        return 2
    put_host_on_path(Path(os.environ["COMFYUI_PATH"]), [] if options.cuda else ["--cpu"])
    target = ROOT / "output" / "scores-quick.json" if options.quick else SCORES_FILE
    missed = []
    for name in options.name or names:
        started = time.monotonic()
        print(f"{name} ...", flush=True)
        module = importlib.import_module(f".scores.{name}", __package__)
        found = figures.complete(module.score(options.quick))
        figures.show(found)
        print(f"{name} done ({time.monotonic() - started:.1f} s)", flush=True)
        if options.quick:
            missed += below_limits(module, found)
        # after each, so that hours of scoring survive a stop
        merged = figures.merge(figures.read(target), found)
        figures.write(target, merged)
        if not options.quick and hasattr(module, "plot"):
            module.plot(merged)
    if not options.quick:
        readme.update()
    for sentence in missed:
        print(f"Too low: {sentence}.", file=sys.stderr)
    return 1 if missed else 0
