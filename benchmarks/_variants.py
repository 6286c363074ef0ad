"""Ways of computing one guided step that a benchmark compares: plain, floor, ours, joined.

Floor is the work that cannot be avoided: the same UNet calls, rows and early stop as ours, without patches or store. Joined is the
other form of the reference pass, source rows that ride in the user's call; it exists only for comparison.
"""

from __future__ import annotations

import comfy.patcher_extension as extension
import torch

from ..attention_patches import host
from ..attention_patches.blocks import Point, unet_layers
from ..attention_patches.pnp import PnPEdit, apply_pnp
from ..attention_patches.reference_pass import edits_of


class Stop(Exception):
    """Ends the floor's source pass where ours ends."""


def ours(model, trajectory):
    """The pack's own edit with its defaults."""
    return apply_pnp(model, trajectory)[0]


def _edit(model, trajectory) -> PnPEdit:
    return edits_of(ours(model, trajectory))[0]


class OneSource:
    """The source's processed conditioning and latents for the calls of one model."""

    def __init__(self, trajectory):
        self.trajectory = trajectory
        self.entry = None

    def get(self, model, x, sigma):
        latents = self.trajectory.at(sigma).to(x)
        if self.entry is None:
            self.entry = host.process_alone(self.trajectory.conditioning, model, latents, x.device)[0]
        return self.entry, latents


def floor_of(model, sources: list[OneSource], last: Point):
    """The UNet call of every source, one after the other and stopped before the attention `last`, then the user's call."""

    def stop(module, args, kwargs):
        raise Stop

    def wrapper(executor, base, conds, x, timestep, model_options):
        for source in sources:
            entry, latents = source.get(base, x, float(timestep[0]))
            handle = host.attention_module(base, *last).register_forward_pre_hook(stop, with_kwargs=True)
            try:
                executor(base, [[entry]], latents, timestep[:1], model_options)
            except Stop:
                pass
            finally:
                handle.remove()
        return executor(base, conds, x, timestep, model_options)

    clone = model.clone()
    clone.add_wrapper_with_key(extension.WrappersMP.CALC_COND_BATCH, "floor", wrapper)
    return clone


def floor(model, trajectory):
    """The source's UNet call, stopped after the same layer, then the user's call."""
    last = max(_edit(model, trajectory).points(float(trajectory.sigmas[-1])), key=lambda point: point.order)
    return floor_of(model, [OneSource(trajectory)], last)


def joined(model, trajectory):
    """One call with the source as its last row; q, k and features of the others are overwritten by it."""
    edit = _edit(model, trajectory)
    source = OneSource(trajectory)
    assert unet_layers(model).architecture in ("SD1.x", "SD2.x"), "the comparison extends no pooled text"

    def first_rows_from_last(tensor):
        return tensor[-1:].expand_as(tensor).contiguous()

    def attention(kind, n, context, value, extra_options):
        if any(point[1:] == (*extra_options["block"], extra_options["block_index"]) for point in edit.attentions):
            taken = first_rows_from_last(n)
            return taken, taken, value
        return n, context, value

    def apply(executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
        entry, latents = source.get(executor.class_obj, x, float(t[0]))
        context = entry["model_conds"]["c_crossattn"].cond.to(c_crossattn)
        options = host.options_with_attention_patch(transformer_options, attention, {"attn1"})
        hooks = [
            host.residual_convolution(executor.class_obj, point.part, point.number).register_forward_hook(lambda module, args, out: first_rows_from_last(out))
            for point in edit.features
        ]
        try:
            out = executor(torch.cat([x, latents]), torch.cat([t, t[:1]]), c_concat, torch.cat([c_crossattn, context]), control, options, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        return out[: x.shape[0]]

    clone = model.clone()
    clone.add_wrapper_with_key(extension.WrappersMP.APPLY_MODEL, "joined", apply)
    return clone


def plain(model, trajectory):
    """The host alone."""
    return model


VARIANTS = {"plain": plain, "floor": floor, "ours": ours, "joined": joined}
