"""Cost of blending a text and a picture against drawing after each of them.

operations_to_two_single_flows: multiplications of a dual UNet call over those of a text call and a picture call, counted at full size
(without computing them) at 512 px; with 77 and 257 tokens. ratio_to_two_single_flows: time of a guided dual step over that of two guided
single steps. ratio_single_to_plain: a single flow of the dual model over the host's SD1.5. On CPU: fp32 at 32x32 latents; on CUDA: fp16 at
512 px, and at 1024 px under "px1024".
"""

from __future__ import annotations

from dataclasses import replace

from ._protocol import SEED, compared, interleaved

RATIO = 0.5
FLOWS = {"dual": RATIO, "text": 1.0, "image": 0.0, "plain": 1.0}  # share of the text
TOKENS = (77, 257)
FULL = (1, 4, 64, 64)


def bench(quick: bool) -> dict:
    """Figures for the device the host runs on (see the module's docstring for the keys)."""
    import comfy.model_management

    from .pnp import setting

    cuda = comfy.model_management.get_torch_device().type == "cuda"
    found = {"operations_to_two_single_flows": operations(), **measure(setting(quick, cuda))}
    if cuda and not quick:
        found["px1024"] = measure(replace(setting(quick, cuda), size=128))
    return found


def operations() -> dict:
    """Leaf: counted on tensors without memory."""
    unet = full_size()
    dual, text, image = (count(unet, ratio) for ratio in (RATIO, 1.0, 0.0))
    return {"value": dual / (text + image), "n": 1, "seeds": [SEED]}


def full_size():
    """The published UNet with both sets, on the meta device."""
    import comfy.ops
    import torch

    from ..versatile_diffusion.dual import DualUNet
    from ..versatile_diffusion.model import unet_config

    return DualUNet(**unet_config(), num_heads=8, num_head_channels=-1, dtype=torch.float32, device=torch.device("meta"), operations=comfy.ops.disable_weight_init)


def count(unet, ratio: float) -> int:
    """Floating-point operations of one call of `full_size` at a ratio, as torch counts them."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    meta = torch.device("meta")
    x, time = torch.empty(FULL, device=meta), torch.empty(1, device=meta)
    text, image = (torch.empty(1, tokens, 768, device=meta) for tokens in TOKENS)

    def attention(q, k, v, extra_options):
        # written out: the host's own asks the device for its free memory, and this one has none
        q, k, v = (side.unflatten(-1, (extra_options["n_heads"], -1)).transpose(1, 2) for side in (q, k, v))
        return ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2)

    blocks = [("middle", 0), *((part, number) for part in ("input", "output") for number in range(12))]
    options = {"patches_replace": {kind: dict.fromkeys(blocks, attention) for kind in ("attn1", "attn2")}}
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        unet(x, time, context=image if ratio == 0 else text, vd_image=image if 0 < ratio < 1 else None, vd_ratio=ratio, transformer_options=options)
    return counter.get_total_flops()


def measure(setting) -> dict:
    """The times at one size."""
    run = dual_bench(setting)
    sigma = run.sigma(0)
    rounds = interleaved({name: lambda name=name: run.flow(name, sigma)[0] for name in FLOWS}, setting.rounds, setting.warm_up)
    for seconds in rounds:
        seconds["two"] = [seconds["text"][0] + seconds["image"][0]]
    return {"ratio_to_two_single_flows": compared(rounds, "dual", "two"), "ratio_single_to_plain": compared(rounds, "text", "plain")}


def dual_bench(setting):
    """A `_step.Bench` whose `flow(name, sigma)` runs one guided step: "dual", "text", "image" on the dual model, "plain" the host's SD1.5 on the same text."""
    from ..tests.helpers.models import tiny_sd15, tiny_trajectory
    from ..tests.helpers.versatile import dual, tiny
    from ._step import Bench

    class DualBench(Bench):
        def __init__(self):
            self.setting = setting
            self.model = tiny(seed=SEED, width=setting.width, context=768, multipliers=(1, 2, 4, 4), dtype=setting.dtype)
            self.plain = tiny_sd15(seed=SEED, width=setting.width, dtype=setting.dtype)
            self.trajectory = tiny_trajectory(self.model, steps=50, size=(setting.size, setting.size), seed=SEED)
            self.flows = {name: tuple(dual(ratio, *TOKENS, seed=seed, width=768) for seed in (1, 2)) for name, ratio in FLOWS.items() if name != "plain"}
            self.flows["plain"] = tuple([[side[0][0], {}]] for side in self.flows["text"])

        def flow(self, name: str, sigma: float):
            self.prompts = self.flows[name]
            return self.step(self.plain if name == "plain" else self.model, sigma)

    return DualBench()
