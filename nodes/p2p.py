"""P2P Controller, P2P Local Blend, P2P Mask Preview: schema and wiring."""

from __future__ import annotations

import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..attention_patches.heat import sheet
from ..inversion.display import show
from ..inversion.sockets import TrajectoryType
from ..inversion.trajectory import start_latent
from ..p2p.apply import SEPARATOR, Settings, apply_p2p
from ..p2p.local import add_blend
from ..p2p.picture import draw
from ..p2p.sockets import BlendMasksType

MODES = ["auto", "replace", "refine", "reweight"]
NO_START = "The P2P Controller has no TRAJECTORY, so it has no latent to start from: connect Empty Latent Image to the sampler."


def _fraction(name: str, default: float, tooltip: str):
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, tooltip=tooltip)


def repeated(latent: dict, times: int) -> dict:
    """A LATENT of one picture as a batch of so many; others as they are."""
    if latent["samples"].shape[0] > 1 or times == 1:
        return latent
    return {**latent, **{key: latent[key].expand(times, *latent[key].shape[1:]).clone() for key in ("samples", "noise_mask") if key in latent and latent[key].shape[0] == 1}}


class P2PController(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PalimpsestP2PController",
            display_name="P2P Controller",
            category="Palimpsest/attention",
            description=(
                "Prompt-to-Prompt: generates the picture of an edit prompt with the attention of a source prompt, so that only what the words change "
                "changes. Connect model and positive to a stock KSampler. With a trajectory it edits an inverted picture."
            ),
            inputs=[
                io.Model.Input("model", tooltip="SD1.x, SD2.x or SDXL, with or without LoRA and other patches, before or after this node."),
                io.Clip.Input("clip", tooltip="Text encoder of the same checkpoint; both prompts are encoded with it."),
                io.String.Input(
                    "source_prompt",
                    multiline=True,
                    default="",
                    tooltip="What the picture shows before the edit. For an inverted picture: the prompt it was inverted with.",
                ),
                io.String.Input(
                    "edit_prompt",
                    multiline=True,
                    default="",
                    tooltip=f"The same text with words swapped, added or removed. Several edits: one per latent of the batch, separated by a line {SEPARATOR}.",
                ),
                io.Combo.Input(
                    "mode",
                    options=MODES,
                    default="auto",
                    tooltip="replace: swapped words take the attention of those they replace (same number of words). refine: common words keep the source's attention, new "
                    "words have their own. reweight: same prompt, word_weights only. auto: chooses, and the report says what. Weights work in every mode.",
                ),
                _fraction("cross_start", 0.0, "Where word attention begins to be the source's, as a share of the run from the noisy end (0 to 1). 0 is published."),
                _fraction("cross_end", 0.8, "Where word attention becomes the edit's own (0 to 1). 0.8 is published; 0.4 to 0.8 is useful, lower gives new words more freedom."),
                _fraction("self_start", 0.0, "Where self-attention begins to be the source's (0 to 1). 0 is published."),
                _fraction(
                    "self_end",
                    0.4,
                    "Where self-attention becomes the edit's own (0 to 1). 0.2 to 0.7 is useful: this holds shapes and layout most; lower it to change a shape or pose.",
                ),
                io.String.Input(
                    "word_schedule",
                    default="",
                    tooltip="Windows of single words of the edit prompt in place of cross_start and cross_end: lion: 0.4, jungle: 0.1-0.6. Separated by commas.",
                ),
                io.String.Input(
                    "word_weights",
                    default="",
                    tooltip="Factors on the attention to words of the edit prompt: smiling: x3, pink: 0.5, hat: -1. 0 removes a word's effect, 0.5 to 5 is useful.",
                ),
                io.Float.Input(
                    "self_limit",
                    default=0.25,
                    min=0.0,
                    max=1.0,
                    step=0.125,
                    tooltip="Largest self-attention maps that are taken over, as a share of the latent's sides: 0.25 (published, 16 x 16 at 512 px), 0.5 (null-text, holds "
                    "finer structure). Maps up to 8 x 8 always are.",
                ),
                io.Combo.Input(
                    "tail",
                    options=["aligned", "published"],
                    default="aligned",
                    tooltip="replace only, when a swapped word has another number of tokens: aligned keeps the words after it on their own tokens; "
                    "published leaves them shifted, as the authors' code does.",
                ),
                TrajectoryType.Input(
                    "trajectory",
                    optional=True,
                    tooltip="An inverted picture to edit (DDIM Invert, Load Trajectory). Not connected: the source is generated beside the edit, from the same noise.",
                ),
                io.Conditioning.Input(
                    "source",
                    optional=True,
                    tooltip="Encoding of the source prompt to use instead of the node's own, to give the source a ControlNet, say.",
                ),
                io.Combo.Input(
                    "bank_device",
                    options=["auto", "gpu", "cpu"],
                    default="auto",
                    tooltip="Where the source's features wait within a step. auto: on the GPU while they take less than a quarter of its free memory.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    "edited_model",
                    display_name="model",
                    tooltip="The model with the edit. euler and ddim are exact; without a trajectory samplers that add noise are refused.",
                ),
                io.Conditioning.Output("positive", display_name="positive", tooltip="The edit prompt: the sampler's positive, directly or through ControlNet and area nodes."),
                io.Conditioning.Output("source_conditioning", display_name="source", tooltip="The source prompt, for DDIM Invert or as negative (negative-prompt inversion)."),
                io.Latent.Output("start", display_name="latent", tooltip="With a trajectory: its noise, to start the sampler from."),
                io.String.Output("report", display_name="report", tooltip="How the words were aligned and what is edited until when."),
                io.Image.Output("alignment", display_name="alignment", tooltip="The two prompts token over token, with lines between aligned words and their windows."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model, clip, source_prompt, edit_prompt, mode, cross_start, cross_end, self_start, self_end, word_schedule, word_weights, self_limit, tail, bank_device,
        trajectory=None, source=None, **kwargs,
    ) -> io.NodeOutput:
        settings = Settings(mode, (cross_start, cross_end), (self_start, self_end), word_schedule, word_weights, self_limit, tail)
        found = apply_p2p(model, clip, source_prompt, edit_prompt, settings, trajectory=trajectory, source_conditioning=source, bank_device=bank_device)
        pictures = [draw(plan) for plan in found.plans]
        height, width = (max(picture.shape[side] for picture in pictures) for side in (1, 2))
        # pictures of one batch are of one size; the ground goes on below the shorter ones
        ground = float(pictures[0][0, 0, 0, 0])
        alignment = torch.cat([torch.nn.functional.pad(picture, (0, 0, 0, width - picture.shape[2], 0, height - picture.shape[1]), value=ground) for picture in pictures])
        # apply_p2p has checked that the model is the trajectory's
        start = ExecutionBlocker(NO_START) if trajectory is None else repeated(start_latent(trajectory, model, check=False), len(found.plans))
        return io.NodeOutput(found.model, found.positive, found.source, start, found.report, alignment, ui=show(cls, found.report, alignment))


class P2PLocalBlend(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PalimpsestP2PLocalBlend",
            display_name="P2P Local Blend",
            category="Palimpsest/attention",
            description=(
                "Limits the edit of a P2P Controller to where its words are in the picture; everything else stays the source's. "
                "Samplers euler and ddim."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model of a P2P Controller."),
                io.String.Input("words", default="", tooltip="Words of the edit prompt whose place may change: lion, mane. Not needed with a mask."),
                io.String.Input("source_words", default="", tooltip="The words of the source prompt that stood there: cat. Empty: those of words that the source prompt has too."),
                io.String.Input("subtract", default="", tooltip="Words of either prompt whose place must not change, cut out of the mask: grass, sky."),
                _fraction("threshold", 0.3, "Share of a word map's maximum above which a place belongs to it (0 to 1). 0.3 is published; higher makes the mask smaller."),
                _fraction("subtract_threshold", 0.3, "The same for subtracted words (0 to 1)."),
                _fraction("start", 0.2, "Share of the run, from the noisy end, that is not blended yet, because word maps need some steps to settle (0 to 1). 0.2 is published."),
                io.Boolean.Input("pooling", default=True, tooltip="Widen the mask by the published 3 x 3 maximum over the word map."),
                io.Mask.Input("mask", optional=True, tooltip="Where the picture may change, in place of words; stretched to the latent's size, grey blends."),
            ],
            outputs=[
                io.Model.Output("blended_model", display_name="model", tooltip="The model with the blend."),
                BlendMasksType.Output("masks", display_name="masks", tooltip="The masks of each step, for P2P Mask Preview."),
            ],
        )

    @classmethod
    def execute(cls, model, words, source_words, subtract, threshold, subtract_threshold, start, pooling, mask=None, **kwargs) -> io.NodeOutput:
        return io.NodeOutput(*add_blend(model, words, source_words, subtract, (threshold, subtract_threshold), start, pooling, mask))


class P2PMaskPreview(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PalimpsestP2PMaskPreview",
            display_name="P2P Mask Preview",
            category="Palimpsest/attention",
            description="Shows where P2P Local Blend let the picture change, step by step, after the sampler has run.",
            inputs=[
                BlendMasksType.Input("masks", tooltip="From P2P Local Blend."),
                io.Latent.Input("latent", tooltip="The sampler's result: makes this node run after it."),
                io.Image.Input("image", tooltip="The decoded result, drawn under the masks."),
                io.Int.Input("columns", default=8, min=1, max=32, step=1, tooltip="Steps shown, spread evenly over the run."),
            ],
            outputs=[
                io.Image.Output("preview", display_name="preview", tooltip="The picture under the mask of each step shown."),
                io.Mask.Output("last", display_name="mask", tooltip="The last step's mask [B, H, W] at latent size."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, masks, latent, image, columns, **kwargs) -> io.NodeOutput:
        found = masks.read()
        steps = sorted(found)
        shown = sorted({steps[round(i * (len(steps) - 1) / max(1, columns - 1))] for i in range(min(columns, len(steps)))})
        stacked = torch.cat([found[step] for step in shown], 1).float()
        preview = sheet(image[: len(stacked)], stacked, [f"step {step + 1}" for step in shown], columns=min(columns, len(shown)) + 1)
        last = found[steps[-1]][:, 0].float()
        share = 100 * float(last.mean())
        return io.NodeOutput(preview, last, ui=show(cls, f"{len(steps)} steps blended; at the last one {share:.0f} % of the picture may change", preview))


NODES = [P2PController, P2PLocalBlend, P2PMaskPreview]
