"""PnP Injector: schema and wiring."""

from __future__ import annotations

from comfy_api.latest import io

from ..attention_patches.negative import SCHEDULES
from ..attention_patches.pnp import apply_pnp
from ..inversion.display import show
from ..inversion.sockets import TrajectoryType
from ..inversion.trajectory import start_latent


class PnPInjector(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PalimpsestPnPInjector",
            display_name="PnP Injector",
            category="Palimpsest/attention",
            description=(
                "Plug-and-Play: repaints an inverted picture after a new prompt and keeps its layout. Connect model and latent to a stock "
                "KSampler with the steps and scheduler of the inversion, denoise 1, and describe the new picture in the sampler's prompt."
            ),
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model that made the trajectory, with or without LoRA and other patches, before or after this node. SD1.x, SD2.x and SDXL.",
                ),
                TrajectoryType.Input("trajectory", tooltip="The inverted picture, from DDIM Invert or Load Trajectory. One picture for all latents, or one per latent."),
                io.Conditioning.Input(
                    "source",
                    optional=True,
                    tooltip="Prompt the source is run with while its features are read. Not connected: the prompt of the inversion. "
                    "The published method uses an empty prompt. A ControlNet on it affects the source only.",
                ),
                io.String.Input(
                    "feature_layers",
                    default="preset default",
                    tooltip="ResBlocks whose features are injected: u1 = second decoder layer with attention, output4 = the host's block number, "
                    "several with commas, empty for none. Presets: default (the published layer 4), none.",
                ),
                io.String.Input(
                    "attention_layers",
                    default="preset default",
                    tooltip="Self-attention layers that look where the source looks: d0-5, m0, u0-8 (u0-5 on SDXL), u1.0-3 for single transformer blocks. "
                    "Presets: default (the published layers 4 to 11), coarse (without the finest, freer texture), decoder, ctrl-x (SDXL), none.",
                ),
                io.Float.Input(
                    "tau_f",
                    default=0.8,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the run, from the noisy end, with injected features (0 to 1). 0.8 is published; higher keeps more structure and "
                    "lets more of the source's look through, 0.4 to 0.8 is the useful range.",
                ),
                io.Float.Input(
                    "tau_A",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the run, from the noisy end, with injected self-attention (0 to 1). 0.5 is published; lower gives shapes more freedom.",
                ),
                io.Combo.Input(
                    "negative_schedule",
                    options=["off", *SCHEDULES],
                    default="off",
                    tooltip="Mixes the negative with an unconditional prediction, as the authors' first code does: constant, or the negative prompt growing "
                    "stronger towards the end (linear, exp). Little effect on photographs, a large one on silhouettes. Off: plain guidance.",
                ),
                io.Float.Input(
                    "negative_alpha",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the unconditional prediction at the first step (0 to 1), used when negative_schedule is on. Published: 1.0 linear for "
                    "photographs, 0.75 linear for generated sources.",
                ),
                io.Conditioning.Input(
                    "unconditional",
                    optional=True,
                    tooltip="The empty prompt, needed only when negative_schedule is on. Costs one more row per step.",
                ),
                io.Combo.Input(
                    "bank_device",
                    options=["auto", "gpu", "cpu"],
                    default="auto",
                    tooltip="Where the source's features wait within a step. auto: on the GPU while they take less than a quarter of its free memory. "
                    "cpu saves about 15 MB (SD1.5, 512 px, fp16) per step kept and is a little slower.",
                ),
            ],
            outputs=[
                io.Model.Output("edited_model", display_name="model", tooltip="The model with the injection, for any sampler."),
                io.Latent.Output("start", display_name="latent", tooltip="The inversion's noise: start the sampler from it. KSampler's own noise is left out automatically."),
                io.String.Output("report", display_name="report", tooltip="Which layers are injected, at how many steps."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        trajectory,
        feature_layers,
        attention_layers,
        tau_f,
        tau_A,
        negative_schedule,
        negative_alpha,
        bank_device,
        source=None,
        unconditional=None,
        **kwargs,
    ) -> io.NodeOutput:
        edited, report = apply_pnp(
            model,
            trajectory,
            conditioning=source,
            feature_layers=feature_layers,
            attention_layers=attention_layers,
            tau_f=tau_f,
            tau_a=tau_A,
            negative_schedule=negative_schedule,
            negative_alpha=negative_alpha,
            unconditional=unconditional,
            bank_device=bank_device,
        )
        # apply_pnp has checked that the model is the trajectory's
        return io.NodeOutput(edited, start_latent(trajectory, model, check=False), report, ui=show(cls, report))


NODES = [PnPInjector]
