"""Cost of Plug-and-Play against what cannot be avoided.

ratio_to_floor: a step with all layers injected, over the same UNet calls without patches and store. ratio_to_joined: over one
call with all rows. ratio_after_injection: a step after both windows, over the plain host. peak_mb: memory above the weights.
On CPU: the UNet of SD1.5 in fp32 at 32x32 latents; on CUDA: fp16 at 512 px, and at 1024 px under "px1024".
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MEMORY = ("plain", "floor", "ours")
FIRST, LAST = 0, 45  # of 50 steps: everything injected, nothing any more


def setting(quick: bool, cuda: bool, size: int | None = None):
    """The protocol's setting for this device; `quick` only checks that measuring works."""
    import torch

    from ._step import Setting

    chosen = Setting(size=64, dtype=torch.float16) if cuda else Setting()
    chosen = replace(chosen, width=32, size=16, rounds=2, warm_up=1) if quick else chosen
    return replace(chosen, size=size) if size else chosen


def bench(quick: bool) -> dict:
    """Figures for the device the host runs on (see the module's docstring for the keys)."""
    import comfy.model_management

    cuda = comfy.model_management.get_torch_device().type == "cuda"
    found = measure(quick, cuda)
    if cuda and not quick:
        found["px1024"] = measure(quick, cuda, size=128)
    return found


def measure(quick: bool, cuda: bool, size: int | None = None) -> dict:
    """All figures at one size."""
    from ._step import Bench
    from ._variants import VARIANTS

    found: dict = {"peak_mb": {name: peak(name, quick, cuda, size) for name in MEMORY}}
    run = Bench(setting(quick, cuda, size))
    models = {name: make(run.model, run.trajectory) for name, make in VARIANTS.items()}
    found["ratio_to_floor"] = run.ratio(models["ours"], models["floor"], run.sigma(FIRST))
    found["ratio_to_joined"] = run.ratio(models["ours"], models["joined"], run.sigma(FIRST))
    found["ratio_after_injection"] = run.ratio(models["ours"], models["plain"], run.sigma(LAST))
    return found


def peak(variant: str, quick: bool, cuda: bool, size: int | None) -> dict:
    """Leaf: peak MB allocated above the resident weights during one step, measured in a process of its own."""
    arguments = [variant, str(int(quick)), str(int(cuda)), str(size or 0)]
    done = subprocess.run([sys.executable, str(Path(__file__).resolve()), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {variant} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _peak_here(variant: str, quick: bool, cuda: bool, size: int) -> dict:
    import torch

    from palimpsest.benchmarks._step import SEED, Bench
    from palimpsest.benchmarks._variants import VARIANTS
    from palimpsest.benchmarks.pnp import setting as setting_of

    run = Bench(setting_of(quick, cuda, size or None))
    model = VARIANTS[variant](run.model, run.trajectory)
    run.step(model, run.sigma(FIRST))  # loads the weights and what torch keeps for good
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        resident = torch.cuda.memory_allocated()
        run.step(model, run.sigma(FIRST))
        top = torch.cuda.max_memory_allocated() - resident
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            run.step(model, run.sigma(FIRST))
        top = _highest(profile)
    return {"value": top / 2**20, "n": 1, "seeds": [SEED]}


def _highest(profile) -> int:
    """Highest sum of allocations minus frees in a profile, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    memory = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0)
    total = highest = 0
    for _, size in memory:
        total += size
        highest = max(highest, total)
    return highest


if __name__ == "__main__":
    # a child of `peak`: the pack and the host are found as devtools/run.py and devtools/bench.py find them
    import importlib.util
    import os

    spec = importlib.util.spec_from_file_location("palimpsest", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    package = importlib.util.module_from_spec(spec)
    sys.modules["palimpsest"] = package
    spec.loader.exec_module(package)
    from palimpsest.devtools.inprocess import put_host_on_path

    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    on_cuda = bool(int(sys.argv[3]))
    put_host_on_path(Path(os.environ["COMFYUI_PATH"]), [] if on_cuda else ["--cpu"])
    print(json.dumps(_peak_here(sys.argv[1], bool(int(sys.argv[2])), on_cuda, int(sys.argv[4]))))
