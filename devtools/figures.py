"""Figures in JSON: nested objects whose leaves are {"value", "n", "seeds", "versions"}, keys sorted. Shared by score and bench."""
import importlib.metadata
import json
import math
import os
import platform
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEAF = {"value", "n", "seeds", "versions"}


def versions() -> dict[str, str]:
    """What the figures depend on: pack, ComfyUI, torch, Python."""
    import torch

    host = {}
    version_file = Path(os.environ["COMFYUI_PATH"]) / "comfyui_version.py"
    for line in version_file.read_text(encoding="utf-8").splitlines():
        if line.startswith("__version__"):
            host["comfyui"] = line.split("=", 1)[1].strip().strip("\"'")
    pack = next(line.split("=", 1)[1].strip().strip('"') for line in (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
                if line.startswith("version"))
    return {"palimpsest": pack, **host, "torch": torch.__version__, "transformers": importlib.metadata.version("transformers"), "python": platform.python_version()}


def is_leaf(figure: dict) -> bool:
    """Whether this object is a figure and not a group of them."""
    return "value" in figure


def complete(figures: dict, path: str = "") -> dict:
    """`figures` with versions filled in where a leaf has none. Raises ValueError naming the key of a leaf that lacks n or seeds or is not finite."""
    done = {}
    for key, figure in figures.items():
        name = f"{path}.{key}".lstrip(".")
        if not isinstance(figure, dict):
            raise ValueError(f"{name} is a bare {type(figure).__name__}: a figure is an object with value, n and seeds")
        if not is_leaf(figure):
            done[key] = complete(figure, name)
            continue
        figure = {"versions": versions(), **figure}
        lacking = LEAF - figure.keys()
        if lacking:
            raise ValueError(f"{name} lacks {', '.join(sorted(lacking))}")
        if isinstance(figure["value"], float) and not math.isfinite(figure["value"]):
            raise ValueError(f"{name} is {figure['value']}: nothing was measured")
        done[key] = figure
    return done


def merge(old: dict, new: dict) -> dict:
    """`old` with the figures of `new`; groups are merged, leaves replaced."""
    merged = dict(old)
    for key, figure in new.items():
        both_groups = isinstance(merged.get(key), dict) and not is_leaf(figure) and not is_leaf(merged[key])
        merged[key] = merge(merged[key], figure) if both_groups else figure
    return merged


def leaves(figures: dict, path: str = ""):
    """(dotted key, leaf) of every figure, sorted."""
    for key, figure in sorted(figures.items()):
        name = f"{path}.{key}".lstrip(".")
        if is_leaf(figure):
            yield name, figure
        else:
            yield from leaves(figure, name)


def write(path: Path, figures: dict) -> None:
    """Replace the file, sorted; a crash in between leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    part.replace(path)


def read(path: Path) -> dict:
    """The figures in that file, {} if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def show(figures: dict) -> None:
    """Print every figure on a line."""
    for name, leaf in leaves(figures):
        value = f"{leaf['value']:.4g}" if isinstance(leaf["value"], float) else leaf["value"]
        spread = f"   [{leaf['low']:.4g}, {leaf['high']:.4g}]" if {"low", "high"} <= leaf.keys() else ""
        print(f"  {name} = {value}{spread}   (n = {leaf['n']})")
