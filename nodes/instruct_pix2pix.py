"""InstructPix2Pix CFG, InstructPix2Pix Conditioning, InstructPix2Pix Loader: schema and wiring."""

from __future__ import annotations

from comfy_api.latest import io

from ..instruct_pix2pix import files
from ..instruct_pix2pix.conditioning import edit_inputs
from ..instruct_pix2pix.guidance import SEPARATE, add_image_guidance
from ..instruct_pix2pix.weights import SETS, load
from ..inversion.display import show

CATEGORY = "Palimpsest/instruct"


class InstructPix2PixCFG(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PalimpsestInstructPix2PixCFG",
            display_name="InstructPix2Pix CFG",
            category=CATEGORY,
            description=(
                "Adds InstructPix2Pix's second guidance scale to an edit model: the sampler's cfg says how far the instruction is followed, image_scale how closely "
                "the picture is kept. Connect model to a stock KSampler, and its prompts through InstructPix2Pix Conditioning."
            ),
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="An edit model: an instruct-pix2pix checkpoint (InstructPix2Pix Loader or Load Checkpoint) or CosXL-Edit, with or without LoRA and other patches.",
                ),
                io.Float.Input(
                    "image_scale",
                    default=1.5,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How closely the picture is kept, s_I of the paper. 1.5 is published, 1.2 to 1.8 is useful; lower it when too little changes, raise it when too "
                    "much does. 1 is off: the plain sampler, without the third evaluation of the model per step.",
                ),
                io.Float.Input(
                    "start",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the schedule, from the noisy end, from which image_scale acts (0 to 1); before it is 1. 0 is published.",
                ),
                io.Float.Input(
                    "end",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the schedule up to which image_scale acts (0 to 1). 1 is published; 0.6 to 0.9 frees the details.",
                ),
                io.Combo.Input(
                    "separate_call",
                    options=list(SEPARATE),
                    default=SEPARATE[0],
                    tooltip="Evaluate the third prediction in a call of its own: slower, for nodes that expect one positive and one negative (IPAdapter). auto: when a node "
                    "has replaced cross-attentions.",
                ),
            ],
            outputs=[io.Model.Output("guided_model", display_name="model", tooltip="The model with image guidance, for any sampler with a positive and a negative.")],
        )

    @classmethod
    def execute(cls, model, image_scale, start, end, separate_call, **kwargs) -> io.NodeOutput:
        return io.NodeOutput(add_image_guidance(model, image_scale, start, end, separate_call))


class InstructPix2PixConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PalimpsestInstructPix2PixConditioning",
            display_name="InstructPix2Pix Conditioning",
            category=CATEGORY,
            description=(
                "Brings the picture that is to be edited to the size an edit model works at, encodes it and attaches it to the prompts. The positive prompt is the "
                "instruction (make it winter), the negative is usually empty."
            ),
            inputs=[
                io.Conditioning.Input("positive", tooltip="The instruction, from CLIP Text Encode: what is to be done, not what the picture shows."),
                io.Conditioning.Input("negative", tooltip="From CLIP Text Encode, empty as published. Words here are what the edit shall not become."),
                io.Vae.Input("vae", tooltip="The VAE of the edit checkpoint."),
                io.Image.Input("image", tooltip="The picture to edit, any size, one or several of one size; each gets a latent of its own."),
                io.Int.Input(
                    "longer_side",
                    default=512,
                    min=0,
                    max=4096,
                    step=64,
                    tooltip="Pixels of the longer side, by the published rule: both sides become multiples of 64, so it may come out longer or shorter. 512 for SD1.x, 1024 for "
                    "SDXL edit models, 128 for the mini one. 0: the picture's own size, cut to multiples of 8.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White may change, black stays as it is. Stretched over the picture and resized with it; one for all pictures, or one for each.",
                ),
            ],
            outputs=[
                io.Conditioning.Output("positive_out", display_name="positive", tooltip="The instruction with the picture: the sampler's positive (DualCFGGuider: cond1)."),
                io.Conditioning.Output("negative_out", display_name="negative", tooltip="The negative with the picture: the sampler's negative (DualCFGGuider: cond2)."),
                io.Conditioning.Output("no_image", display_name="no_image", tooltip="The negative without the picture: DualCFGGuider's negative. InstructPix2Pix CFG needs none."),
                io.Latent.Output("latent", display_name="latent", tooltip="Start the sampler from it at denoise 1: empty, or with a mask the picture and its noise mask."),
                io.Image.Output("picture", display_name="image", tooltip="The picture as it was encoded, to lay beside the result."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, positive, negative, vae, image, longer_side, mask=None, **kwargs) -> io.NodeOutput:
        made = edit_inputs(positive, negative, vae, image, longer_side, mask)
        return io.NodeOutput(made.positive, made.negative, made.no_image, made.latent, made.picture, ui=show(cls, made.describe()))


class InstructPix2PixLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        names = files.choices()
        return io.Schema(
            node_id="PalimpsestInstructPix2PixLoader",
            display_name="InstructPix2Pix Loader",
            category=CATEGORY,
            description=(
                "Loads an edit checkpoint. The official instruct-pix2pix file holds two sets of weights: this loader takes the averaged ones (EMA), with which the authors "
                "sample, where Load Checkpoint takes the others. Only the chosen set is read."
            ),
            inputs=[
                io.Combo.Input(
                    "ckpt_name",
                    options=names,
                    default=names[0],
                    tooltip="File in models/checkpoints: instruct-pix2pix-00-22000.safetensors (7.7 GB), a pruned copy or merge of it, or CosXL-Edit. .ckpt files are read safely.",
                ),
                io.Combo.Input(
                    "weights",
                    options=list(SETS),
                    default=SETS[0],
                    tooltip="ema: the moving average, which the paper samples with. plain: the weights under the usual names, which is all that files of 2 GB hold.",
                ),
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="The edit model, for InstructPix2Pix CFG."),
                io.Clip.Output("clip", display_name="clip", tooltip="Its text encoder, for the instruction."),
                io.Vae.Output("vae", display_name="vae", tooltip="Its VAE, for InstructPix2Pix Conditioning and VAE Decode."),
            ],
        )

    @classmethod
    def execute(cls, ckpt_name, weights, **kwargs) -> io.NodeOutput:
        return io.NodeOutput(*load(files.find(ckpt_name), weights))

    @classmethod
    def validate_inputs(cls, ckpt_name):
        """A name that is not in the list says where files belong, instead of the host's "value not in list"."""
        if ckpt_name is None:  # linked from another node, known only when it runs
            return True
        try:
            files.find(ckpt_name)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, ckpt_name=None, **kwargs):
        """A file that was replaced is loaded anew."""
        return files.stamp(ckpt_name)


NODES = [InstructPix2PixCFG, InstructPix2PixConditioning, InstructPix2PixLoader]
