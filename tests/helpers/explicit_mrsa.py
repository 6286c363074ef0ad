"""An independent implementation of multi-reference self-attention over a whole UNet: explicit maps, every row in a call of its own."""

from __future__ import annotations

import torch

from ...attention_patches.concept_run import noise_like
from ...attention_patches.mrsa_attention import CODE

SD1_PLACES = tuple(("output", number, 0) for number in range(6, 12))
XL_PLACES = tuple(("output", number, index) for number in range(6) for index in range(2 if number < 3 else 1))


def _heads(tensor, heads):
    return tensor.unflatten(-1, (heads, -1)).transpose(1, 2).double()


@torch.inference_mode()
def explicit_step(model, x, sigma, conds, items, seed, rule=CODE, fidelity=1.0, places=SD1_PLACES):
    """(negative, positive) predictions [1, C, H, W] of one step.

    x: [1, C, H, W]. conds: (positive, negative). items: (place in the chain, Concept) pairs, of any size. The references' pass keeps keys and values of
    every layer; the picture's pass has the masked logits of the published rule, in float64.
    """
    process = model.get_model_object("latent_format").process_in

    def run(latent, cond, attention):
        text, extra = cond[0]
        more = {}
        if "pooled_output" in extra:
            height, width = latent.shape[-2:]
            more["y"] = model.model.encode_adm(pooled_output=extra["pooled_output"], height=height * 8, width=width * 8, device="cpu")
        options = {"patches_replace": {"attn1": {place: attention for place in places}}, "sigmas": torch.tensor([sigma])}
        return model.model.apply_model(latent, torch.full((1,), sigma), c_crossattn=text, transformer_options=options, **more)

    out = []
    for half, share in ((1, 1.0 - fidelity), (0, 1.0)):
        kept = []
        for place, item in items:
            own = {}

            def record(q, k, v, options, own=own):
                heads = options["n_heads"]
                own[(*options["block"], options["block_index"])] = (_heads(k, heads), _heads(v, heads), tuple(options["activations_shape"][-2:]))
                q, k, v = (_heads(t, heads) for t in (q, k, v))
                return (torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v).transpose(1, 2).flatten(2).to(torch.float32)

            run(process(item.latent) + sigma * noise_like(item.latent, seed, place, sigma), conds[1] if half else item.conditioning, record)
            kept.append(own)

        def attention(q, k, v, options, kept=kept, share=share):
            heads = options["n_heads"]
            q, k, v = (_heads(t, heads) for t in (q, k, v))
            scale = q.shape[-1] ** -0.5
            logits, values = [q @ k.mT * scale], [v]
            for (_, item), own in zip(items, kept):
                key, value, size = own[(*options["block"], options["block_index"])]
                weighted = item.layer_mask(size).flatten().double() * item.weight
                raw = q @ key.mT * scale
                logits.append(torch.where(weighted != 0, raw + weighted, torch.full_like(raw, float("-inf"))) if rule == CODE else raw * weighted)
                values.append(value)
            mixed = torch.softmax(torch.cat(logits, -1), -1) @ torch.cat(values, -2)
            plain = torch.softmax(logits[0], -1) @ v
            return (share * mixed + (1 - share) * plain).transpose(1, 2).flatten(2).to(torch.float32)

        out.append(run(x, conds[half], attention))
    return tuple(out)


class Steps:
    """Notes (x, sigma, negative prediction, positive prediction) of every step of a run."""

    def __init__(self):
        self.seen = []

    def on(self, model):
        """A clone of `model` whose steps are noted."""
        clone = model.clone()
        clone.set_model_sampler_post_cfg_function(self._note)
        return clone

    def _note(self, args):
        self.seen.append((args["input"], float(args["sigma"][0]), args["uncond_denoised"], args["cond_denoised"]))
        return args["denoised"]
