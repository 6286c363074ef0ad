"""Cost of multi-reference self-attention against what cannot be avoided and against the published way.

A guided step with R = 1, 2, 3 references (r1, r2, r3) whose masks cover 18 % of them, at 64x64 latents: the UNet of SD1.5, fp32 on CPU, fp16 on CUDA.
ratio_to_floor: over 2 + R plain rows in the same UNet calls, with the same early stop. time_ratio_to_published, memory_ratio_to_published: over 2 (1 + R) rows in one call
with explicit logits. seconds, peak_mb: of a step, memory above the weights; peak_mb.plain is the host without references, and the floor's too, which runs one reference at a time.
"""

from __future__ import annotations

import statistics
from dataclasses import replace

from ._protocol import SEED, compared, highest, in_child, peak_in_child

COUNTS, TARGET = (1, 2, 3), 2
STEP = 0  # of 50; the references are seen at all of them
FEW = 3  # rounds on a CPU for the published way and for other counts than TARGET: on two cores a round of all counts takes minutes


def setting(quick: bool, cuda: bool):
    """The protocol's setting for this device; `quick` only checks that measuring works."""
    import torch

    from ._step import Setting

    chosen = Setting(size=64, dtype=torch.float16) if cuda else Setting(size=64, warm_up=1)
    return replace(chosen, width=32, size=16, rounds=2, warm_up=1) if quick else chosen


def bench(quick: bool) -> dict:
    """Figures for the device the host runs on (see the module's docstring for the keys)."""
    import comfy.model_management

    cuda = comfy.model_management.get_torch_device().type == "cuda"
    found: dict = {"peak_mb": {"plain": peak("plain", 1, quick, cuda)}}
    # every measurement in a process of its own: what the maps of fewer references leave behind in pieces does not fit those of more
    peaks = {count: {name: peak(name, count, quick, cuda) for name in ("ours", "published")} for count in COUNTS}
    print("  memory done", flush=True)
    for count in COUNTS:
        times = in_child("mrsa", cuda, "times_here", str(count), str(int(quick)), str(int(cuda)))
        found[f"r{count}"] = {"peak_mb": peaks[count], **memory_ratio(**peaks[count]), **times}
        print(f"  {count} of {len(COUNTS)}: time {times['time_ratio_to_published']['value']:.3f} of the published way's", flush=True)
    return found


def memory_ratio(ours: dict, published: dict) -> dict:
    """Figure of two peaks."""
    return {"memory_ratio_to_published": {**ours, "value": ours["value"] / published["value"]}}


def measure(run, count: int, cuda: bool) -> dict:
    """Times with `count` references."""
    from ._mrsa_variants import Variants

    variants, chosen = Variants(run, count), run.setting
    models = {name: getattr(variants, name)() for name in ("floor", "ours", "published")}
    few = chosen.rounds if cuda else min(FEW, chosen.rounds)
    rounds = run.rounds(models, run.sigma(STEP), few, chosen.warm_up)
    if count == TARGET:
        del models["published"]
        rounds += run.rounds(models, run.sigma(STEP), chosen.rounds - few, 0)
    return {
        "ratio_to_floor": compared(rounds, "ours", "floor"),
        "time_ratio_to_published": compared(rounds, "ours", "published"),
        "seconds": {name: typical([second for seconds in rounds for second in seconds.get(name, [])]) for name in ("floor", "ours", "published")},
    }


def times_here(count: str, quick: str, cuda: str) -> dict:
    """`measure` in this process (see `_protocol.in_child`)."""
    from ._step import Bench

    return measure(Bench(setting(bool(int(quick)), bool(int(cuda)))), int(count), bool(int(cuda)))


def typical(seconds: list[float]) -> dict:
    """Leaf: the median."""
    return {"value": statistics.median(seconds), "n": len(seconds), "seeds": [SEED]}


def peak(variant: str, count: int, quick: bool, cuda: bool) -> dict:
    """Leaf: peak MB allocated above the resident weights during one step."""
    return peak_in_child("mrsa", cuda, variant, str(count), str(int(quick)), str(int(cuda)))


def peak_here(variant: str, count: str, quick: str, cuda: str) -> float:
    """Bytes, in this process (see `_protocol.peak_in_child`)."""
    from ._mrsa_variants import Variants
    from ._step import Bench

    run = Bench(setting(bool(int(quick)), bool(int(cuda))))
    model = getattr(Variants(run, int(count)), variant)()
    run.step(run.model, run.sigma(STEP))  # loads the weights and what torch keeps for good
    return highest(lambda: run.step(model, run.sigma(STEP)), bool(int(cuda)))
