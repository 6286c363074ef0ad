"""Null-Text Optimize: schema and wiring."""

from __future__ import annotations

from comfy_api.latest import io

from ..inversion.display import say, show
from ..inversion.null_text import Settings
from ..inversion.null_text_report import describe, plot
from ..inversion.null_text_run import CHECKPOINTING, run_null_text
from ..inversion.sockets import TrajectoryType
from ..inversion.trajectory import start_latent

DEFAULTS = Settings()


class NullTextOptimize(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PalimpsestNullTextOptimize",
            display_name="Null-Text Optimize",
            category="Palimpsest/inversion",
            description=(
                "Null-text inversion: trains the empty prompt of every step until sampling with cfg returns to the inverted picture. Give negative and "
                "latent to a stock sampler with the same cfg, steps and scheduler, euler or ddim, and no added noise. Slow; see the help page for the free alternatives."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model that made the trajectory, from before any editing node of this pack. LoRA and other patches are allowed."),
                TrajectoryType.Input("trajectory", tooltip="From DDIM Invert (guidance 1) or Load Trajectory. With several pictures, each gets its own prompts."),
                io.Conditioning.Input("negative", tooltip="The empty prompt: CLIP Text Encode with no text. Training starts from it."),
                io.Float.Input(
                    "guidance",
                    default=DEFAULTS.guidance,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    round=0.01,
                    tooltip="cfg of the sampler that will use the result, no unit; it is good for this value only. 5 to 10 is usual, 7.5 is published; 1 is refused.",
                ),
                io.Int.Input(
                    "inner_steps",
                    default=DEFAULTS.inner_steps,
                    min=1,
                    max=100,
                    step=1,
                    tooltip="Trainings per step at most, 1 to 100. Each costs about three model calls. 10 is published; fewer are quicker and repair less.",
                ),
                io.Float.Input(
                    "early_stop",
                    default=DEFAULTS.early_stop,
                    min=0.0,
                    max=1.0,
                    step=0.000001,
                    round=False,
                    tooltip="A step is done when its mean squared error (latent, unit variance) falls below this, 2e-5 more per step later on. 1e-5 is published; "
                    "0 to 1e-4 is the useful range, lower is more exact and slower.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=DEFAULTS.learning_rate,
                    min=0.00001,
                    max=1.0,
                    step=0.0001,
                    round=False,
                    tooltip="Adam's step size at the first step, falling by 1 % of itself per step, to no less than a hundredth. 0.01 is published; "
                    "0.001 to 0.05 is a safe range, larger ones overshoot.",
                ),
                io.Combo.Input(
                    "checkpointing",
                    options=list(CHECKPOINTING),
                    default=DEFAULTS.checkpointing,
                    tooltip="Gradient checkpointing: a fraction of the memory for about a third more time, same result. auto: on when memory is short.",
                ),
                io.Conditioning.Input("positive", optional=True, tooltip="Replaces the prompt stored in the trajectory; it must be the one the picture was inverted with."),
            ],
            outputs=[
                io.Conditioning.Output("optimised", display_name="negative", tooltip="One prompt per step, each limited to its part of the run: the sampler's negative."),
                io.Latent.Output("start", display_name="latent", tooltip="The inversion's noise: start the sampler from it, with added noise switched off."),
                io.String.Output("report", display_name="report", tooltip="Trainings, loss per step, reconstruction before and after, time."),
                io.Image.Output("loss_plot", display_name="loss_plot", tooltip="Loss after each step, before and after training, logarithmic; one picture per latent."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model, trajectory, negative, guidance, inner_steps, early_stop, learning_rate, checkpointing, positive=None, **kwargs
    ) -> io.NodeOutput:
        settings = Settings(guidance, inner_steps, early_stop, learning_rate, checkpointing)
        result = run_null_text(model, trajectory, negative, positive, settings, say=lambda text: say(cls, text))
        report, picture = describe(result), plot(result)
        # run_null_text has checked that the model is the trajectory's
        latent = start_latent(trajectory, model, check=False)
        # outside a mask the host keeps the sampler's latent, and that is noise here
        latent.pop("noise_mask", None)
        return io.NodeOutput(result.conditioning, latent, report, picture, ui=show(cls, report, picture))


NODES = [NullTextOptimize]
