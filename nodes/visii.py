"""Visii Learn Instruction, Combine Instruction with Text and Blend Instructions: schema and wiring."""

from __future__ import annotations

from comfy_api.latest import io

from ..instruct_pix2pix.checks import check_edit_model
from ..inversion.display import say, show
from ..inversion.fingerprint import model_fingerprint
from ..inversion.gradients import CHECKPOINTING
from ..visii import compose, direction
from ..visii.learn import CHOICES, Settings
from ..visii.learn_run import NODE, check_settings, run_learn
from ..visii.pairs import encode_pairs
from ..visii.plot import loss_plot, preview_strip
from ..visii.report import describe, information
from ..visii.sockets import InstructionType
from ..visii.start import from_text, null_text

DEFAULTS = Settings()
CATEGORY = "Palimpsest/visii"


def instruction_outputs() -> list:
    """What every node gives that makes an instruction."""
    return [
        io.Conditioning.Output("conditioning", display_name="conditioning", tooltip="Plain CONDITIONING: the positive of InstructPix2Pix Conditioning, with a new picture."),
        InstructionType.Output("result", display_name="instruction", tooltip="The same with what belongs to it: for saving, combining with text and blending."),
    ]


class VisiiLearnInstruction(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        projections = direction.choices()
        return io.Schema(
            node_id="PalimpsestVisiiLearnInstruction",
            display_name=NODE,
            category=CATEGORY,
            description=(
                "Learns an edit instruction from a picture before and after the edit, for use on new pictures: visual instruction inversion. The instruction's words are trained "
                "as vectors on an InstructPix2Pix model, which itself stays as it is. Minutes on a graphics card: 1000 steps of about four model calls each, in float32; "
                "an SD1.5 model in fp16 at 512 px needs by estimate 5 GB beside its weights, 1 GB with checkpointing."
            ),
            inputs=[
                io.Model.Input("model", tooltip="An edit model with 8 input channels (instruct-pix2pix), from before any guidance or editing node. LoRA is allowed."),
                io.Clip.Input("clip", tooltip="The text encoder of that checkpoint."),
                io.Vae.Input("vae", tooltip="The autoencoder of that checkpoint."),
                io.Image.Input("before", tooltip="The picture before the edit, 512 px or what the model was made for. A batch: several pairs that show the same edit."),
                io.Image.Input("after", tooltip="The same picture edited: same size, same framing, same number of pictures."),
                io.String.Input(
                    "start_text",
                    default="",
                    multiline=True,
                    tooltip="Where learning starts: about ten words that describe the edited picture, or an instruction. Only its words' positions are learned, at most 75.",
                ),
                io.Int.Input(
                    "steps",
                    default=DEFAULTS.steps,
                    min=1,
                    max=20000,
                    step=1,
                    tooltip="Steps of the optimiser, each at a timestep of its own. 1000 is published (every timestep once); 300 to 1000 is usual.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=DEFAULTS.learning_rate,
                    min=0.00001,
                    max=1.0,
                    step=0.0001,
                    round=False,
                    tooltip="AdamW's step size, constant. 0.001 is published, for 1000 steps; fewer steps want more. 0.0005 to 0.02 is a safe range.",
                ),
                io.Float.Input(
                    "text_guidance",
                    default=DEFAULTS.text_scale,
                    min=0.1,
                    max=30.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Text guidance during training, no unit: the cfg of the later sampler. 7.5 is published; 4 to 10 is usual.",
                ),
                io.Float.Input(
                    "image_guidance",
                    default=DEFAULTS.image_scale,
                    min=0.0,
                    max=5.0,
                    step=0.05,
                    round=0.01,
                    tooltip="Image guidance during training, no unit: the image scale of the later InstructPix2Pix CFG. 1.5 is published; 1 to 2 is usual, 1 means none.",
                ),
                io.Float.Input(
                    "mse_weight",
                    default=DEFAULTS.mse_weight,
                    min=0.01,
                    max=100.0,
                    step=0.1,
                    round=0.001,
                    tooltip="Weight of the squared error of the predicted noise. 4 is published. Only its ratio to direction_weight matters.",
                ),
                io.Float.Input(
                    "direction_weight",
                    default=DEFAULTS.direction_weight,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    round=0.001,
                    tooltip="Weight of the similarity of instruction and edit as CLIP sees them; needs clip_vision and text_projection. 0.1 is published, 0 only reports it.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    step=1,
                    control_after_generate=True,
                    tooltip="Draws the order of the timesteps, their noise and that of the previews. The same seed learns the same.",
                ),
                io.Combo.Input(
                    "keep",
                    options=list(CHOICES),
                    default=DEFAULTS.choice,
                    tooltip="Which state is the result. validation: the best of 20 looks at a fixed set of noises (4 % more time at 1000 steps, 12 % at 300). "
                    "late average: mean of the last quarter. "
                    "last. lowest step loss: published, close to a random pick.",
                ),
                io.Int.Input(
                    "preview_every",
                    default=DEFAULTS.preview_every,
                    min=0,
                    max=20000,
                    step=10,
                    tooltip="Steps between two previews, which are 20 steps of sampling each; 0 makes none. They go into the strip.",
                ),
                io.Combo.Input(
                    "text_projection",
                    options=projections,
                    default=projections[0],
                    tooltip="For the direction loss: a file of models/text_encoders with CLIP ViT-L/14's text projection (the full CLIP, or SDXL's clip_l). none: off.",
                ),
                io.Combo.Input(
                    "checkpointing",
                    options=list(CHECKPOINTING),
                    default=DEFAULTS.checkpointing,
                    tooltip="Gradient checkpointing: a fraction of the memory for about a fifth more time, same result. auto: on when memory is short.",
                ),
                io.ClipVision.Input("clip_vision", optional=True, tooltip="For the direction loss: the vision model of the same CLIP, ViT-L/14 for SD1.5."),
                InstructionType.Input("start_instruction", optional=True, tooltip="Goes on learning from this one instead of start_text; it must come from the same text encoder."),
            ],
            outputs=[
                *instruction_outputs(),
                io.Image.Output("previews", display_name="previews", tooltip="Before, after, and what the instruction makes of the picture before on the way; the result last."),
                io.Image.Output("loss_plot", display_name="loss_plot", tooltip="Error of each step, its running mean, the validation error, and the state that was chosen."),
                io.String.Output("report", display_name="report", tooltip="What was learned and how it was chosen, errors, direction similarity, time."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model, clip, vae, before, after, start_text, steps, learning_rate, text_guidance, image_guidance, mse_weight, direction_weight, seed, keep, preview_every,
        text_projection, checkpointing, clip_vision=None, start_instruction=None, **kwargs
    ) -> io.NodeOutput:
        settings = Settings(steps, learning_rate, text_guidance, image_guidance, mse_weight, direction_weight, seed, keep, preview_every, checkpointing)
        # what can be refused is refused before anything is computed
        check_settings(settings)
        check_edit_model(model, NODE)
        null = null_text(clip)
        start = from_text(clip, start_text) if start_instruction is None else start_instruction
        pairs = encode_pairs(vae, before, after, model.get_model_object("latent_format").latent_channels)
        way = direction.make_direction(clip_vision, text_projection, pairs.before, pairs.after, start.width)
        result = run_learn(model, pairs, start, null, settings, way, say=lambda text: say(cls, text))
        learned = result.instruction.with_tokens(result.instruction.tokens, info=information(result, model_fingerprint(model)))
        report, strip, plot = describe(result), preview_strip(model, vae, result), loss_plot(result)
        return io.NodeOutput(learned.conditioning, learned, strip, plot, report, ui=show(cls, report, strip))


class VisiiCombineInstruction(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PalimpsestVisiiCombineInstruction",
            display_name="Combine Instruction with Text",
            category=CATEGORY,
            description=(
                "Adds words to a learned instruction, for example another color or animal (hybrid instruction). Sample with a cfg of 8 to 10. "
                "The words follow the learned positions; several of these nodes can follow each other."
            ),
            inputs=[
                InstructionType.Input("instruction", tooltip="From Visii Learn Instruction, Load Instruction or Blend Instructions."),
                io.Clip.Input("clip", tooltip="The text encoder of the checkpoint that the instruction was learned with."),
                io.String.Input(
                    "text", default="", multiline=True, tooltip="Words to add. Words, learned positions and three more must fit into the window of 77 tokens."
                ),
            ],
            outputs=instruction_outputs(),
        )

    @classmethod
    def execute(cls, instruction, clip, text) -> io.NodeOutput:
        combined = compose.combine(instruction, clip, text)
        return io.NodeOutput(combined.conditioning, combined)


class VisiiBlendInstructions(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PalimpsestVisiiBlendInstructions",
            display_name="Blend Instructions",
            category=CATEGORY,
            description="Makes an instruction weaker or stronger, or averages two of one text encoder: learned from other pairs, or other edits.",
            inputs=[
                InstructionType.Input("instruction", tooltip="The first, or the only one."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=3.0,
                    step=0.05,
                    tooltip="How far the result lies from the empty text: 0 says nothing, 1 is the instruction (or average) as it is. 0.5 to 1.3 is a safe range.",
                ),
                io.Float.Input(
                    "share",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Part of the second instruction in the average, 0 to 1; without a second one it does nothing.",
                ),
                InstructionType.Input("second", optional=True, tooltip="Another instruction of the same text encoder. For more than two, chain these nodes."),
            ],
            outputs=instruction_outputs(),
        )

    @classmethod
    def execute(cls, instruction, strength, share, second=None) -> io.NodeOutput:
        mixed = instruction if second is None else compose.blend(instruction, second, share)
        result = compose.strengthen(mixed, strength)
        return io.NodeOutput(result.conditioning, result)


NODES = [VisiiLearnInstruction, VisiiCombineInstruction, VisiiBlendInstructions]
