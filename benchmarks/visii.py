"""Cost of a training step of instruction learning against the released code's way.

time_ratio_to_three_rows, memory_ratio_to_three_rows: ours, where the two predictions that do not depend on the instruction need no gradient, over one call of three
rows with gradient; the same gradient, no checkpointing in either. peak_mb: memory above the weights during one step; checkpointed is ours with gradient
checkpointing, and time_ratio_of_checkpointing what that costs. On CPU: the layout of SD1.5 at width 128 (40 %) in fp32, 32x32 latents; on CUDA: SD1.5 itself, fp16 weights, 512 px.
"""

from __future__ import annotations

from dataclasses import replace

from ._protocol import compared, highest, interleaved, peak_in_child

NAMES = ("three_rows", "ours", "checkpointed")


def setting(quick: bool, cuda: bool):
    """The protocol's setting for this device; `quick` only checks that measuring works."""
    import torch

    from ._visii_variants import Setting

    chosen = Setting(width=320, size=64, dtype=torch.float16) if cuda else Setting()
    return replace(chosen, width=32, size=16, rounds=2, warm_up=1) if quick else chosen


def bench(quick: bool) -> dict:
    """Figures for the device the host runs on (see the module's docstring for the keys)."""
    import comfy.model_management

    cuda = comfy.model_management.get_torch_device().type == "cuda"
    # before this process holds a model of its own
    peaks = {name: peak_in_child("visii", cuda, name, str(int(quick)), str(int(cuda))) for name in NAMES}
    from ._visii_variants import Bench, once

    run = Bench(setting(quick, cuda))
    rounds = run.inside(lambda step: interleaved({name: once(run, step, name) for name in NAMES}, run.setting.rounds, run.setting.warm_up))
    return {
        "peak_mb": peaks,
        "memory_ratio_to_three_rows": {**peaks["ours"], "value": peaks["ours"]["value"] / peaks["three_rows"]["value"]},
        "time_ratio_to_three_rows": compared(rounds, "ours", "three_rows"),
        "time_ratio_of_checkpointing": compared(rounds, "checkpointed", "ours"),
    }


def peak_here(variant: str, quick: str, cuda: str) -> float:
    """Bytes, in this process (see `_protocol.peak_in_child`)."""
    from ._visii_variants import Bench, once

    run = Bench(setting(bool(int(quick)), bool(int(cuda))))

    def measure(step) -> float:
        one = once(run, step, variant)
        one()  # what torch keeps for good
        return highest(one, bool(int(cuda)))

    return run.inside(measure)
