"""How times and memory are compared: interleaved rounds with a control, and peaks in a process of their own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Callable

SEED = 0
VALID = 0.02  # a run whose A/A control is further off than this is marked invalid
ROOT = Path(__file__).resolve().parent.parent


def host_arguments(cuda: bool) -> list[str]:
    """The host's arguments for a measurement.

    On a CPU the host's own choice of attention writes maps out (1 GB a layer at 64 x 64), and its chunks depend on what memory is free; on graphics cards
    it takes torch's, as here.
    """
    return [] if cuda else ["--cpu", "--use-pytorch-cross-attention"]


def interleaved(timed: dict[str, Callable[[], float]], rounds: int, warm_up: int) -> list[dict[str, list[float]]]:
    """Seconds by name, round by round: all of `timed` in order, then the first of them once more."""
    first = next(iter(timed))
    for _ in range(warm_up):
        for once in timed.values():
            once()
    found = []
    for _ in range(rounds):
        seconds = {name: [once()] for name, once in timed.items()}
        seconds[first].append(timed[first]())
        found.append(seconds)
    return found


def compared(rounds: list[dict[str, list[float]]], measured: str, reference: str) -> dict:
    """Leaf: seconds of `measured` over those of `reference`, from the rounds of `interleaved` that hold both.

    The value is the median of the rounds; p10 and p90 lie beside it, and the control (second over first time of what every round starts with, in all rounds).
    """
    mean = statistics.fmean
    ratios = [mean(seconds[measured]) / mean(seconds[reference]) for seconds in rounds if measured in seconds and reference in seconds]
    off = statistics.median(last / first for first, last in (next(iter(seconds.values())) for seconds in rounds))
    deciles = statistics.quantiles(ratios, n=10, method="inclusive")
    return {"value": statistics.median(ratios), "p10": deciles[0], "p90": deciles[-1], "control": off, "valid": abs(off - 1) <= VALID, "n": len(ratios), "seeds": [SEED]}


def ratio(measured: Callable[[], float], reference: Callable[[], float], rounds: int, warm_up: int) -> dict:
    """Leaf: seconds of `measured` over those of `reference`, in rounds of reference, measured, reference."""
    return compared(interleaved({"reference": reference, "measured": measured}, rounds, warm_up), "measured", "reference")


def peak_in_child(module: str, cuda: bool, *arguments: str) -> dict:
    """Leaf: what `peak_here(*arguments)` of benchmarks/<module>.py measures in a process of its own, in MB."""
    return {"value": float(in_child(module, cuda, "peak_here", *arguments)) / 2**20, "n": 1, "seeds": [SEED]}


def in_child(module: str, cuda: bool, function: str, *arguments: str):
    """What a function of benchmarks/<module>.py returns in a process of its own, which hands all its memory back; must be JSON. Raises RuntimeError when it fails."""
    done = subprocess.run([sys.executable, str(Path(__file__).resolve()), module, str(int(cuda)), function, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def highest(run: Callable[[], object], cuda: bool) -> float:
    """Peak bytes allocated while `run` runs, above what was allocated before."""
    import torch

    if cuda:
        torch.cuda.reset_peak_memory_stats()
        resident = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - resident
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    memory = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0)
    total = top = 0
    for _, size in memory:
        total += size
        top = max(top, total)
    return top


if __name__ == "__main__":
    # `in_child`: the pack and the host are found as devtools/run.py and devtools/bench.py find them
    import importlib
    import runpy

    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    runpy.run_path(str(ROOT / "devtools" / "run.py"))["register_pack"]()
    from palimpsest.devtools.inprocess import put_host_on_path

    put_host_on_path(Path(os.environ["COMFYUI_PATH"]), host_arguments(bool(int(sys.argv[2]))))
    print(json.dumps(getattr(importlib.import_module(f"palimpsest.benchmarks.{sys.argv[1]}"), sys.argv[3])(*sys.argv[4:])))
