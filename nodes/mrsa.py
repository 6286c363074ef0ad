"""MRSA Concept Composer and Concept Attention Preview: schema and wiring."""

from __future__ import annotations

from comfy_api.latest import io

from ..attention_patches.concept_run import NOISES
from ..attention_patches.heat import sheet
from ..attention_patches.maps import average_maps
from ..attention_patches.mrsa import compose
from ..attention_patches.mrsa_attention import RULES
from ..attention_patches.mrsa_sockets import ConceptType, SharesType
from ..inversion.display import show

OF_SAMPLER = -1


class MRSAConceptComposer(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PalimpsestMRSAConceptComposer",
            display_name="MRSA Concept Composer",
            category="Palimpsest/concept",
            description=(
                "FreeCustom: puts several things from reference pictures into one new picture, without training. While the picture is sampled, it looks at the masked "
                "parts of the references as if they were its own. Connect model to a stock KSampler; its prompt describes the new picture."
            ),
            inputs=[
                io.Model.Input("model", tooltip="SD1.x, SD2.x or SDXL (experimental), with or without LoRA and other patches."),
                ConceptType.Input("concepts", tooltip="One or several chained MRSA Concept nodes."),
                io.String.Input(
                    "layers",
                    default="preset default",
                    tooltip="Self-attention layers that see the references: u3-8, u6-8, d0-5. Presets: default (the paper's last two blocks), last (the finest only, weaker), "
                    "all (unnatural pictures).",
                ),
                io.Float.Input(
                    "start",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the schedule, from the noisy end, from which the references are seen (0 to 1). 0 is published.",
                ),
                io.Float.Input(
                    "end",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the schedule up to which they are seen (0 to 1). 1 is published; 0.7 lets details go their own way.",
                ),
                io.Float.Input(
                    "style_fidelity",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="1 (published): only the positive half sees the references, so guidance pulls towards them. Lower: the negative half sees them too, "
                    "for a weaker effect; one more row per concept.",
                ),
                io.Combo.Input(
                    "rule",
                    options=list(RULES),
                    default=RULES[0],
                    tooltip="code: what the authors' program computes, and what weights of 2 to 3 are made for. paper: the printed formula.",
                ),
                io.Combo.Input(
                    "noise",
                    options=list(NOISES),
                    default=NOISES[0],
                    tooltip="The references are noised to each step's level: with new noise every time, or with the same throughout (steadier).",
                ),
                io.Int.Input(
                    "reference_seed",
                    default=OF_SAMPLER,
                    min=OF_SAMPLER,
                    max=0xFFFFFFFF,
                    step=1,
                    tooltip="Of the references' noise; -1: the sampler's seed. Several seeds are worth a try.",
                ),
                io.Boolean.Input("watch", default=False, tooltip="Note where each concept is looked at, for Concept Attention Preview. Costs time and memory at every step."),
                io.Combo.Input(
                    "bank_device",
                    options=["auto", "gpu", "cpu"],
                    default="auto",
                    tooltip="Where the references' features wait within a step. auto: on the GPU while they take less than a quarter of its free memory.",
                ),
                io.Conditioning.Input(
                    "empty_prompt",
                    optional=True,
                    tooltip="An empty prompt replaces the concepts' own ones (the published null reference prompts); usually weaker.",
                ),
                io.String.Input(
                    "watch_layers",
                    optional=True,
                    default="",
                    tooltip="With watch on: which of the layers above to note, in the same notation (u3, u6-8). Empty: all of them.",
                ),
                io.Float.Input(
                    "watch_start",
                    optional=True,
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="With watch on: share of the schedule, from the noisy end, from which shares are noted (0 to 1).",
                ),
                io.Float.Input(
                    "watch_end",
                    optional=True,
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="With watch on: share of the schedule up to which shares are noted (0 to 1). 0.8 to 1 shows the last steps.",
                ),
            ],
            outputs=[
                io.Model.Output("composing_model", display_name="model", tooltip="The model that sees the concepts, for any sampler."),
                SharesType.Output("shares", display_name="shares", tooltip="With watch on: for Concept Attention Preview."),
                io.String.Output("report", display_name="report", tooltip="Layers, window, what of each concept is seen."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model, concepts, layers, start, end, style_fidelity, rule, noise, reference_seed, watch, bank_device, empty_prompt=None,
        watch_layers="", watch_start=0.0, watch_end=1.0, **kwargs,
    ) -> io.NodeOutput:
        composed, shares, report = compose(
            model, concepts, layers=layers, start=start, end=end, fidelity=style_fidelity, rule=rule, noise=noise, seed=None if reference_seed == OF_SAMPLER else reference_seed,
            empty=empty_prompt, watch=watch, bank_device=bank_device, watch_layers=watch_layers, watch_start=watch_start, watch_end=watch_end,
        )
        return io.NodeOutput(composed, shares, report, ui=show(cls, report))


class ConceptAttentionPreview(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PalimpsestConceptAttentionPreview",
            display_name="Concept Attention Preview",
            category="Palimpsest/views",
            description="Where in the new picture each concept is looked at: its share of the attention, as a heat map per concept, after the sampler has run.",
            inputs=[
                SharesType.Input("shares", tooltip="From MRSA Concept Composer, with watch on."),
                io.Latent.Input("latent", tooltip="The sampler's result: makes this node run after it."),
                io.Image.Input("image", tooltip="The decoded result, drawn under the maps."),
            ],
            outputs=[
                io.Image.Output("sheet", display_name="sheet", tooltip="The picture and one heat map per concept, each scaled to its own maximum, which is given."),
                io.Mask.Output("maps", display_name="maps", tooltip="The shares as masks [pictures x concepts, h, w], 1 where all attention goes to the concept."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, shares, latent, image, **kwargs) -> io.NodeOutput:
        if shares is None:
            raise ValueError("MRSA Concept Composer has noted nothing: switch its watch on, and queue again.")
        means = average_maps(shares.read())
        drawn = sheet(image[: len(means)], means, [f"concept {number + 1}" for number in range(means.shape[1])])
        report = ", ".join(f"concept {number + 1}: {100 * float(means[:, number].mean()):.1f} % of the attention" for number in range(means.shape[1]))
        return io.NodeOutput(drawn, means.flatten(0, 1), ui=show(cls, report, drawn))


NODES = [MRSAConceptComposer, ConceptAttentionPreview]
