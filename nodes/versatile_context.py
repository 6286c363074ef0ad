"""Versatile Image Context, Focus, Combine Images, Save Context and Load Context: schema and wiring."""

from __future__ import annotations

from comfy_api.latest import io

from ..common.files import workflow_of
from ..common.saved import Kind, saved_line
from ..inversion.display import show
from ..versatile_diffusion import contexts, storage
from ..versatile_diffusion import focus as focusing
from ..versatile_diffusion.focus import DROP, KEEP, MIDDLE, RANK
from ..versatile_diffusion.model import check_model

CATEGORY = "Palimpsest/versatile diffusion"
FILES = Kind("context", "contexts", storage.SUFFIX, storage.EXTENSIONS, "Save Versatile Context")
TOGETHER, EACH = "together", "one each"
SLOTS = 4
FOCUS_TOOLTIP = (
    "0: what the picture shows, 1: how it looks, 0.5: both, untouched (published default). The side of style starts with a jump, as published."
)


def model_to_check():
    """The optional input `model` of nodes that make contexts: a conditioning alone meets the model only while sampling, where an ordinary one takes it for a prompt."""
    return io.Model.Input("model", optional=True, tooltip="Connect the model to have it checked here that it is a Versatile Diffusion. It is not changed.")


class VersatileImageContext(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PalimpsestVersatileImageContext",
            display_name="Versatile Image Context",
            category=CATEGORY,
            description=(
                "A picture as the prompt of Versatile Diffusion: alone it gives variations of the picture, through Versatile Dual Context it is blended with a text. "
                "Takes the place of CLIP Text Encode."
            ),
            inputs=[
                io.ClipVision.Input("clip_vision", tooltip="From Versatile Diffusion Loader, or CLIP ViT-L/14 (224 px) from Load CLIP Vision."),
                io.Image.Input("image", tooltip="The picture, any size, one or several."),
                io.Combo.Input(
                    "crop",
                    options=list(contexts.CROPS),
                    default=contexts.CROPS[0],
                    tooltip="The encoder sees 224 x 224 pixels. squash: the whole picture, its aspect lost, as in the authors' demo. centre: the middle square, as in diffusers.",
                ),
                io.Float.Input(
                    "weight", default=1.0, min=0.0, max=1.0, step=0.02,
                    tooltip="Factor on the tokens, 0 to 1. 1 is published; the demo's examples with several pictures take 0.8 to 0.94.",
                ),
                io.Float.Input("focus", default=MIDDLE, min=0.0, max=1.0, step=0.02, tooltip=FOCUS_TOOLTIP),
                io.Combo.Input(
                    "batch", options=[EACH, TOGETHER], default=EACH,
                    tooltip="Several pictures. one each: latent i is drawn after picture i. together: the model reads all of them at once.",
                ),
                io.Mask.Input("mask", optional=True, tooltip="White regions of the picture are read, black ones are not. One mask for all, or one per picture."),
                model_to_check(),
            ],
            outputs=[
                io.Conditioning.Output(
                    "context", display_name="context",
                    tooltip="For the positive of a sampler, with Versatile Empty Image Context as negative; or for Versatile Dual Context.",
                ),
                io.String.Output("report", display_name="report", tooltip="What was encoded."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, clip_vision, image, crop, weight, focus, batch, mask=None, model=None, **kwargs) -> io.NodeOutput:
        if model is not None:
            check_model(model)
        tokens = focusing.focus(contexts.encode_pictures(clip_vision, image, mask, crop), focus) * weight
        conditioning = contexts.image_conditioning(list(tokens.split(1)) if batch == TOGETHER else [tokens])
        report = f"{storage.describe(conditioning)}\n{crop}{', masked' if mask is not None else ''}, weight {weight:g}, focus {focus:g}"
        return io.NodeOutput(conditioning, report, ui=show(cls, report))


class VersatileFocus(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PalimpsestVersatileFocus",
            display_name="Versatile Focus",
            category=CATEGORY,
            description=(
                "Moves the focus of an image context: toward what the picture shows, or toward how it looks. The tokens are split into components; the leading ones carry style."
            ),
            inputs=[
                io.Conditioning.Input(
                    "context",
                    tooltip="An image context. With several pictures read together, each is treated by itself. Move the focus before weights are given.",
                ),
                io.Float.Input("level", default=MIDDLE, min=0.0, max=1.0, step=0.02, tooltip=FOCUS_TOOLTIP),
                io.Int.Input(
                    "rank", default=RANK, min=2, max=256, step=1,
                    tooltip="Components that are looked at, 2 to 256. 20 is published. Toward style all beyond them is left out.",
                ),
                io.Int.Input(
                    "semantic_drop", default=DROP, min=0, max=64, step=1,
                    tooltip="Toward semantics (below 0.5) this many leading components and one more fade out. 1 is published.",
                ),
                io.Int.Input(
                    "style_keep", default=KEEP, min=0, max=64, step=1,
                    tooltip="Toward style (above 0.5) this many leading components stay while the others fade out. 5 is published.",
                ),
            ],
            outputs=[io.Conditioning.Output("moved", display_name="context", tooltip="The image context with its focus moved; at 0.5 the same.")],
        )

    @classmethod
    def execute(cls, context, level, rank, semantic_drop, style_keep, **kwargs) -> io.NodeOutput:
        pictures = contexts.picture_contexts(context, "context")
        focused = [focusing.focus(one, level, rank, semantic_drop, style_keep) for one in pictures]
        return io.NodeOutput(contexts.with_options(contexts.image_conditioning(focused), context))


class VersatileCombineImages(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        inputs = []
        for i in range(1, SLOTS + 1):
            inputs.append(io.Conditioning.Input(f"context_{i}", optional=i > 1, tooltip=f"Image context {i}, itself of one or several pictures."))
        for i in range(1, SLOTS + 1):
            inputs.append(io.Float.Input(
                f"weight_{i}", default=1.0, min=0.0, max=1.0, step=0.02,
                tooltip=f"Factor on the tokens of context {i}, 0 to 1; the demo's examples take 0.8 to 0.94.",
            ))
        return io.Schema(
            node_id="PalimpsestVersatileCombineImages",
            display_name="Versatile Combine Images",
            category=CATEGORY,
            description="Up to four pictures as one image context: the model attends to the tokens of all of them. Chain two of these nodes for more.",
            inputs=inputs,
            outputs=[io.Conditioning.Output("combined", display_name="context", tooltip="One image context, for a sampler or Versatile Dual Context.")],
        )

    @classmethod
    def execute(cls, context_1, **kwargs) -> io.NodeOutput:
        given = {1: context_1, **{i: kwargs.get(f"context_{i}") for i in range(2, SLOTS + 1)}}
        pictures = [
            tokens * kwargs.get(f"weight_{i}", 1.0) for i, context in given.items() if context is not None for tokens in contexts.picture_contexts(context, f"context {i}")
        ]
        return io.NodeOutput(contexts.with_options(contexts.image_conditioning(pictures), context_1))


class VersatileSaveContext(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PalimpsestVersatileSaveContext",
            display_name="Save Versatile Context",
            category=CATEGORY,
            description="Writes a text, image or dual context to the output folder as safetensors, to be loaded again or worked on by other programs.",
            inputs=[
                io.Conditioning.Input(
                    "context",
                    tooltip="From CLIP Text Encode with the CLIP of Versatile Diffusion, Versatile Image Context or Dual Context. Its first piece is saved.",
                ),
                io.String.Input(
                    "filename_prefix", default=FILES.prefix,
                    tooltip="Folder and beginning of the file name below the output folder; a counter is added. %year%, %month%, %day% and the like are filled in. "
                    "Load Versatile Context lists the folder contexts.",
                ),
            ],
            outputs=[io.String.Output("file", display_name="file", tooltip="Name of the file as Load Versatile Context lists it.")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, context, filename_prefix, **kwargs) -> io.NodeOutput:
        path, listed = FILES.new_file(filename_prefix)
        storage.save_context(context, path, workflow_of(cls))
        return io.NodeOutput(listed, ui=show(cls, f"{saved_line(listed, path)}\n{storage.describe(context)}"))


class VersatileLoadContext(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        options = FILES.options()
        return io.Schema(
            node_id="PalimpsestVersatileLoadContext",
            display_name="Load Versatile Context",
            category=CATEGORY,
            description="Reads a context from a file: one of Save Versatile Context, or your own array of 257 x 768 (picture) or 77 x 768 (text) numbers as .safetensors or .npy.",
            inputs=[
                io.Combo.Input(
                    "file", options=options, default=options[0],
                    tooltip="A file of the input folder, or of output/contexts (marked [output]). Press R to refresh the list.",
                ),
                io.Combo.Input(
                    "flow", options=list(storage.FLOWS), default=storage.AUTO,
                    tooltip="Whether the tokens are a text's or a picture's; of a saved dual context, which of the two to take. auto: as the file says; "
                    "arrays of your own do not say it.",
                ),
                model_to_check(),
            ],
            outputs=[
                io.Conditioning.Output("context", display_name="context", tooltip="For a sampler or Versatile Dual Context."),
                io.String.Output("report", display_name="report", tooltip="What the file holds."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, file, flow, model=None, **kwargs) -> io.NodeOutput:
        if model is not None:
            check_model(model)
        conditioning = storage.load_context(FILES.resolve(file), flow)
        report = storage.describe(conditioning)
        return io.NodeOutput(conditioning, report, ui=show(cls, report))

    @classmethod
    def validate_inputs(cls, file):
        return FILES.check(file)

    @classmethod
    def fingerprint_inputs(cls, file, **kwargs):
        return FILES.stamp(file)


NODES = [VersatileImageContext, VersatileFocus, VersatileCombineImages, VersatileSaveContext, VersatileLoadContext]
