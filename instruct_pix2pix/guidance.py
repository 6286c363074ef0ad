"""Guidance by a text scale and an image scale (Brooks et al. 2023, section 3.2.1, equation 3), as a patch of a MODEL.

With e_none = eps(z, no image, no text), e_img = eps(z, image, no text), e_full = eps(z, image, text) and scales s_I, s_T the paper samples with

    eps = e_none + s_I (e_img - e_none) + s_T (e_full - e_img)
        = e_img' + s_T (e_full' - e_img'),  where e' = e + D and D = (s_I - 1) (e_img - e_none).

The last line is ordinary guidance of two shifted predictions. So the host's own step, with the sampler's cfg for s_T, gives the paper's once both
predictions are shifted by D, and everything that builds on them (RescaleCFG, guidances after CFG, every sampler) keeps its meaning. The
coefficients sum to one, so the same holds for denoised predictions, which the host passes around. s_I = 1 is the plain host.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..attention_patches import host
from .checks import check_edit_model
from .guidance_run import KEY, GuidanceRun

NODE = "InstructPix2Pix CFG"
SEPARATE = ("auto", "on", "off")


@dataclass(frozen=True)
class ImageGuidance:
    """The wrappers of one MODEL; immutable, so clones may share it.

    scale: s_I. start, end: share of the schedule, from the noisy end, in which it acts. separate: one of SEPARATE, whether e_none gets a call of its own.
    """

    scale: float
    start: float = 0.0
    end: float = 1.0
    separate: str = "auto"

    def __deepcopy__(self, memo: dict) -> "ImageGuidance":
        return self

    def sampler_sample(self, executor, guider, sigmas, extra_args, *args, **kwargs):
        """Give the sampling run its state, which dies with it; say so when nothing came of it."""
        run = GuidanceRun(self, guider.model_patcher)
        extra_args["model_options"].setdefault("transformer_options", {})[KEY] = run
        samples = executor(guider, sigmas, extra_args, *args, **kwargs)
        run.say_if_idle(sigmas)
        return samples

    def calc_cond_batch(self, executor, model, conds, x_in, timestep, model_options, *args, **kwargs):
        """Hand the host's conditioning batch to the run's state; a call outside a sampler gets a state of its own."""
        run = model_options.get("transformer_options", {}).get(KEY)
        if not isinstance(run, GuidanceRun):
            run = GuidanceRun(self, model.current_patcher)

        def evaluate(lists):
            return executor(model, lists, x_in, timestep, model_options, *args, **kwargs)

        return run.evaluate(evaluate, conds, x_in, float(timestep[0]), model_options)


def add_image_guidance(model, scale: float = 1.5, start: float = 0.0, end: float = 1.0, separate: str = "auto"):
    """A clone of `model` (a ModelPatcher) whose sampling follows the image scale beside the sampler's cfg; in place of one it carried.

    scale: s_I; 1 adds nothing at all, so that such a clone is the plain host, as fast and bit for bit. start, end: see `ImageGuidance`.
    separate: call e_none apart from the two others: "on", "off", or "auto", where attention replacements of other nodes may count on two.
    Raises ValueError, one sentence, when `model` cannot edit by instruction or the window is empty. While it acts a run raises one when no
    picture is attached to the prompts, and logs one warning when there is no negative.
    """
    import comfy.patcher_extension as extension

    check_edit_model(model, NODE)
    if not math.isfinite(scale):
        raise ValueError(f"The image scale is {scale}: set it to a number, 1.5 as published or 1 for none.")
    if start >= end:
        raise ValueError(f"The image scale acts from {start:g} to {end:g} of the run, which is never: set the start before the end.")
    if separate not in SEPARATE:
        raise ValueError(f"There is no separate call {separate}: choose {', '.join(SEPARATE)}.")
    clone = model.clone()
    guidance, on = ImageGuidance(scale, start, end, separate), not math.isclose(scale, 1.0)
    # around edits of ours (PnP, P2P, MRSA), so that they act on all three predictions alike
    host.set_wrapper_outside(clone, extension.WrappersMP.SAMPLER_SAMPLE, KEY, guidance.sampler_sample if on else None)
    host.set_wrapper_outside(clone, extension.WrappersMP.CALC_COND_BATCH, KEY, guidance.calc_cond_batch if on else None)
    if on:
        # at cfg 1 the host leaves the negative out, and the image scale with it
        clone.model_options["disable_cfg1_optimization"] = True
    return clone
