"""Cost of encoding a picture with SeeCoder, official sizes, random weights.

time_ratio_to_explicit, memory_ratio_to_explicit: against the plain form (attention maps written out, nothing folded, no parts).
ratio_to_floor: the node's way (loading, layers that cast, progress, cancel) over the bare network on plain layers with the same weights.
seconds, peak_mb: ours, for orientation.
Top level 512 px, "px1024" beside it; fp32 on CPU, fp16 on CUDA.
"""

from __future__ import annotations

import time

from ._protocol import SEED, highest, peak_in_child, ratio

ROUNDS, WARM_UP = 12, 2
ROUNDS_LARGE = 4  # one 1024 px picture takes 12 s on two cores


def bench(quick: bool) -> dict:
    """Figures for the device the host runs on (see the module's docstring for the keys)."""
    import comfy.model_management

    cuda = comfy.model_management.get_torch_device().type == "cuda"
    found = measure(quick, cuda, 96 if quick else 512)
    if not quick:
        found["px1024"] = measure(quick, cuda, 1024)
    return found


def prepare(quick: bool, cuda: bool, size: int, explicit: bool):
    """(function that encodes once and returns its seconds, bare network) for one variant; weights are random."""
    import torch

    import comfy.ops

    from ..seecoder import encode, loader
    from ..seecoder.network import build
    from ..seecoder.sizes import read_sizes, without_prefix
    from ..tests.helpers.seecoder import OFFICIAL, SMALL, random_picture, random_state
    from ._seecoder_explicit import Explicit

    sizes = SMALL if quick else OFFICIAL
    picture = random_picture(size, size)
    device, dtype = (torch.device("cuda"), torch.float16) if cuda else (torch.device("cpu"), torch.float32)
    model = bare = None
    if explicit:
        state = {key: value.to(device, dtype if value.is_floating_point() else None) for key, value in without_prefix(random_state(sizes)).items()}
        plain = Explicit(state, sizes.heads, sizes.depths, sizes.window)
        pixels = picture.movedim(-1, 1).to(device, dtype)
    else:
        model = loader.from_state(random_state(sizes), "random", "fp16" if cuda else "fp32")
        state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in without_prefix(random_state(sizes)).items()}
        bare = build(state, read_sizes(state), comfy.ops.disable_weight_init).to(device)

    @torch.inference_mode()
    def once() -> float:
        began = time.perf_counter()
        out = plain(pixels) if explicit else encode.encode_pictures(model, picture)
        if cuda:
            torch.cuda.synchronize()
        assert bool(torch.isfinite(out).all())
        return time.perf_counter() - began

    return once, bare


def measure(quick: bool, cuda: bool, size: int) -> dict:
    """All figures at one size."""
    import statistics

    import torch

    from ..tests.helpers.seecoder import random_picture

    rounds, warm_up = (2, 1) if quick else (ROUNDS, WARM_UP) if size < 1024 else (ROUNDS_LARGE, 1)
    peaks = {name: peak_in_child("seecoder", cuda, name, str(int(quick)), str(int(cuda)), str(size)) for name in ("ours", "explicit")}
    ours, network = prepare(quick, cuda, size, explicit=False)
    explicit, _ = prepare(quick, cuda, size, explicit=True)
    ours()
    pixels = random_picture(size, size).movedim(-1, 1).to(next(network.parameters()))

    @torch.inference_mode()
    def bare() -> float:
        began = time.perf_counter()
        network(pixels)
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    memory = peaks["ours"]["value"] / peaks["explicit"]["value"]
    return {
        "peak_mb": peaks,
        "memory_ratio_to_explicit": {"value": memory, "n": 1, "seeds": [SEED]},
        "time_ratio_to_explicit": ratio(ours, explicit, rounds, warm_up),
        "ratio_to_floor": ratio(ours, bare, rounds, warm_up),
        "seconds": {"value": statistics.median(ours() for _ in range(3)), "n": 3, "seeds": [SEED]},
    }


def peak_here(variant: str, quick: str, cuda: str, size: str) -> float:
    """Bytes, in this process (see `_protocol.peak_in_child`)."""
    once, _ = prepare(bool(int(quick)), bool(int(cuda)), int(size), variant == "explicit")
    once()
    return highest(once, bool(int(cuda)))
