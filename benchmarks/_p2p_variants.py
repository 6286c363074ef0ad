"""Ways of computing one guided P2P step that a benchmark compares: floor, ours, explicit.

Floor: the same UNet calls, rows and early stop as ours, without patches or store. Explicit: the published way, source and edit as rows of one
call of four, every attention map made, edited after the softmax and multiplied with the values. It exists only for comparison.
"""

from __future__ import annotations

import math

import comfy.patcher_extension as extension
import torch

from ..attention_patches import host
from ..attention_patches.blocks import Point, unet_layers
from ..attention_patches.pnp import BRANCH
from ..attention_patches.reference_pass import add_edit
from ..attention_patches.source import Source
from ..p2p.edit import P2PEdit, small_self_points
from ..p2p.plan import make_plan
from ..p2p.tokens import read_tokens
from ..tests.helpers.prompts import WordClip
from ._variants import OneSource, floor_of

SOURCE, TARGET = "a photo of a cat on a red sofa", "a photo of a fluffy cat on a red sofa with a hat"


def plan():
    """A refinement: the costliest edit, with two maps at every cross-attention."""
    clip = WordClip()
    return make_plan(read_tokens(clip, SOURCE), read_tokens(clip, TARGET), "refine")


class Variants:
    """Models for one Bench. The edit prompt's CONDITIONING is the bench's positive, the source's is the trajectory's."""

    def __init__(self, run):
        self.run, self.plan = run, plan()
        (tokens, extra), negative = run.prompts[0][0], run.prompts[1]
        run.prompts = [[tokens, {**extra, host.MARK: "bench"}]], negative

    def ours(self):
        """The pack's own edit with the published windows."""
        source = Source(self.run.trajectory, ((BRANCH, self.run.trajectory.conditioning),))
        return add_edit(self.run.model, P2PEdit(source=source, plans=(self.plan,), mark="bench", layers=unet_layers(self.run.model), schedule=self.run.trajectory.sigmas))

    def plain(self):
        """The host alone."""
        return self.run.model

    def floor(self):
        """The source's call, stopped where ours stops (before the last cross-attention), then the user's."""
        return floor_of(self.run.model, [OneSource(self.run.trajectory)], Point("attn2", "output", 11))

    def explicit(self):
        """Four rows in one call: without and with text, source before edit; the call of two is replaced by its rows of the edit."""
        trajectory, mapping, kept = self.run.trajectory, *self.plan.step(0, 50)
        layers, entry = unet_layers(self.run.model), []
        largest = math.prod(small_self_points(layers, (self.run.setting.size,) * 2, 0.25)[1])

        def maps(q, k, heads):
            q, k = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k))
            return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1)

        def attention(q, k, v, options, cross):
            found, source, edit = maps(q, k, options["n_heads"]), rows["source"], rows["edit"]
            if cross:
                found[edit] = found[source] @ mapping.to(found) + found[edit] * kept.to(found)
            elif found.shape[-1] <= largest:
                found[edit] = found[source]
            return (found @ v.unflatten(-1, (options["n_heads"], -1)).transpose(1, 2)).transpose(1, 2).flatten(2)

        def replacement(cross):
            return lambda q, k, v, options: attention(q, k, v, options, cross)

        rows: dict[str, int] = {}

        def apply(executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
            latents = trajectory.at(float(t[0])).to(x)
            if not entry:
                entry.append(host.process_alone(trajectory.conditioning, executor.class_obj, latents, x.device)[0])
            order = transformer_options["cond_or_uncond"]
            texts, uncond = c_crossattn, order.index(1)
            source_text = entry[0]["model_conds"]["c_crossattn"].cond.to(texts)
            # the edit's rows stay where the host put them, the source's two follow
            rows.update(edit=order.index(0), source=len(order))
            options = {**transformer_options, "patches_replace": {kind: {point[1:]: replacement(kind == "attn2") for point in layers.points(kind)} for kind in ("attn1", "attn2")}}
            out = executor(
                torch.cat([x, latents, latents]), torch.cat([t, t[:1], t[:1]]), c_concat, torch.cat([texts, source_text, texts[uncond : uncond + 1]]), control, options, **kwargs
            )
            return out[: x.shape[0]]

        clone = self.run.model.clone()
        clone.add_wrapper_with_key(extension.WrappersMP.APPLY_MODEL, "explicit", apply)
        return clone
