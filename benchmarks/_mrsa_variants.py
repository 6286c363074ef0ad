"""Ways of computing one guided step with R reference pictures that a benchmark compares: floor, ours, published.

Floor: the same UNet calls, rows and early stop as ours, without patches or store: 2 + R plain rows. Published: the way of the authors' code, 2 (1 + R) rows in
one call, every attention map made in float32, masks as -inf on the logits. It exists only for comparison, and is kinder than the original: maps of all rows are let go
before the composed one is made, biases are added in place, and what style fidelity 1 multiplies by zero (the negative half's composition) is not computed.
"""

from __future__ import annotations

import math

import comfy.patcher_extension as extension
import torch
from torch import Tensor

from ..attention_patches import host
from ..attention_patches.blocks import attention_points, unet_layers
from ..attention_patches.concept_run import FIXED, noise_like
from ..attention_patches.mrsa import PRESETS, compose
from ..tests.helpers.concepts import concept, concepts
from ._protocol import SEED
from ._variants import OneSource, floor_of

COVERED = 0.18  # of the picture, the median of the authors' masks
WEIGHT = 3.0  # in most of their configurations


def logits(q: Tensor, k: Tensor) -> Tensor:
    """Scaled products [..., queries, keys]."""
    return (q * q.shape[-1] ** -0.5) @ k.mT


class Variants:
    """Models for one Bench and a number of references. All see the same noise of the references, fixed by a seed."""

    def __init__(self, run, count: int):
        self.run = run
        self.items = [concept(number, weight=WEIGHT, size=(run.setting.size,) * 2, share=COVERED) for number in range(count)]
        self.layers = unet_layers(run.model)
        self.places = attention_points("preset default", self.layers, presets=PRESETS)

    def ours(self):
        """The pack's own edit with the published settings."""
        return compose(self.run.model, concepts(*self.items), noise=FIXED, seed=SEED)[0]

    def plain(self):
        """The host alone."""
        return self.run.model

    def floor(self):
        """A call of one row for every reference, stopped where ours stops, then the user's."""
        last = max(self.places, key=lambda point: point.order)
        return floor_of(self.run.model, [OneSource(self.run.trajectory) for _ in self.items], last)

    def published(self):
        """One call of two halves, without and with text, each of the picture and all references; the call of two is replaced by its rows of the picture."""
        rows, texts = 1 + len(self.items), []
        process = self.run.model.get_model_object("latent_format").process_in

        def plain(q, k, v, options):
            q, k, v = (x.unflatten(-1, (options["n_heads"], -1)).transpose(1, 2).float() for x in (q, k, v))
            return q, k, v, torch.softmax(logits(q, k), -1) @ v

        def joined(out, like):
            return out.transpose(1, 2).flatten(2).to(like)

        def attention(q, k, v, options):
            return joined(plain(q, k, v, options)[-1], q)

        def composed(q, k, v, options):
            split_q, split_k, split_v, out = plain(q, k, v, options)
            own = split_q[rows]
            parts = [logits(own, split_k[rows])]
            for number, item in enumerate(self.items, 1):
                weighted = item.selection(options["activations_shape"][-2:]).weighted.to(own)
                parts.append(logits(own, split_k[rows + number]))
                parts[-1] += torch.where(weighted != 0, weighted, -math.inf)
            whole = torch.cat(parts, -1)
            out[rows] = torch.softmax(whole, -1) @ torch.cat(list(split_v[rows:]), -2)
            return joined(out, q)

        replace = {kind: {point[1:]: composed if point in self.places else attention for point in self.layers.points(kind)} for kind in ("attn1", "attn2")}

        def apply(executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
            if not texts:
                entries = [host.process_alone(item.conditioning, executor.class_obj, torch.zeros_like(x[:1]), x.device)[0] for item in self.items]
                texts.extend(entry["model_conds"]["c_crossattn"].cond.to(c_crossattn) for entry in entries)
            noised = [(process(item.latent) + float(t[0]) * noise_like(item.latent, SEED, place, None)).to(x) for place, item in enumerate(self.items)]
            positive, negative = (transformer_options["cond_or_uncond"].index(role) for role in (0, 1))
            latents = torch.cat([x[negative, None], *noised, x[positive, None], *noised])
            words = torch.cat([c_crossattn[negative, None].expand(rows, -1, -1), c_crossattn[positive, None], *texts])
            out = executor(latents, t[:1].repeat(2 * rows), c_concat, words, control, {**transformer_options, "patches_replace": replace}, **kwargs)
            # in the order in which the host put its two
            return out[[0, rows] if negative < positive else [rows, 0]]

        clone = self.run.model.clone()
        clone.add_wrapper_with_key(extension.WrappersMP.APPLY_MODEL, "published", apply)
        return clone
