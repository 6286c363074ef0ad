"""Cost of Prompt-to-Prompt against what cannot be avoided and against the published way.

A guided step of a refinement with a trajectory, words and small self-attentions edited. ratio_to_floor: over the same UNet calls without patches and
store. time_ratio_to_explicit, memory_ratio_to_explicit: over four rows with explicit attention maps. ratio_after_edit: a step after both windows, over
the plain host. peak_mb: memory above the weights. On CPU: the UNet of SD1.5 in fp32 at 64x64 latents; on CUDA: fp16 at 512 px, and at 1024 px under "px1024".
"""

from __future__ import annotations

from dataclasses import replace

from ._protocol import highest, peak_in_child

MEMORY = ("plain", "floor", "ours", "explicit")
FIRST, LAST = 0, 45  # of 50 steps: everything edited, nothing any more


def setting(quick: bool, cuda: bool, size: int | None = None):
    """The protocol's setting for this device; `quick` only checks that measuring works."""
    import torch

    from ._step import Setting

    chosen = Setting(size=64, dtype=torch.float16 if cuda else torch.float32)
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
    from ._p2p_variants import Variants
    from ._step import Bench

    found: dict = {"peak_mb": {name: peak(name, quick, cuda, size) for name in MEMORY}}
    ours, explicit = (found["peak_mb"][name] for name in ("ours", "explicit"))
    found["memory_ratio_to_explicit"] = {**ours, "value": ours["value"] / explicit["value"]}
    run = Bench(setting(quick, cuda, size))
    variants = Variants(run)
    models = {name: getattr(variants, name)() for name in MEMORY}
    found["ratio_to_floor"] = run.ratio(models["ours"], models["floor"], run.sigma(FIRST))
    found["time_ratio_to_explicit"] = run.ratio(models["ours"], models["explicit"], run.sigma(FIRST))
    found["ratio_after_edit"] = run.ratio(models["ours"], models["plain"], run.sigma(LAST))
    return found


def peak(variant: str, quick: bool, cuda: bool, size: int | None) -> dict:
    """Leaf: peak MB allocated above the resident weights during one step."""
    return peak_in_child("p2p", cuda, variant, str(int(quick)), str(int(cuda)), str(size or 0))


def peak_here(variant: str, quick: str, cuda: str, size: str) -> float:
    """Bytes, in this process (see `_protocol.peak_in_child`)."""
    from ._p2p_variants import Variants
    from ._step import Bench

    run = Bench(setting(bool(int(quick)), bool(int(cuda)), int(size) or None))
    model = getattr(Variants(run), variant)()
    run.step(model, run.sigma(FIRST))  # loads the weights and what torch keeps for good
    return highest(lambda: run.step(model, run.sigma(FIRST)), bool(int(cuda)))
