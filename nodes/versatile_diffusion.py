"""Versatile Diffusion Loader, Dual Context, Empty Image Context and Color Match to Reference: schema and wiring."""

from __future__ import annotations

import folder_paths
import torch
from comfy_api.latest import io

from ..inversion.display import show
from ..versatile_diffusion import contexts, files, loader, sources
from ..versatile_diffusion.color_match import match_colors
from ..versatile_diffusion.model import IMAGE_CONTEXT, WIDTH, check_model
from ..versatile_diffusion.storage import describe
from .versatile_context import CATEGORY, model_to_check

FROM_MODEL = "from the model file"
PICKERS = {"clip": "text_encoders", "clip_vision": "clip_vision", "vae": "vae"}


def picked(kind: str, name: str | None) -> str | None:
    """Full path of a file chosen in one of the loader's pickers, None for the model file itself. Raises ValueError, one sentence."""
    if name is None or name == FROM_MODEL:
        return None
    path = folder_paths.get_full_path(PICKERS[kind], name)
    if path is None:
        raise ValueError(f'There is no file {name} in models/{PICKERS[kind]} any more: choose another, or "{FROM_MODEL}".')
    return path


class VersatileLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        names = files.choices()

        def picker(kind: str, what: str):
            options = [FROM_MODEL, *folder_paths.get_filename_list(PICKERS[kind])]
            return io.Combo.Input(f"{kind}_name", options=options, default=FROM_MODEL, tooltip=f"{what} Files of models/{PICKERS[kind]}; the official .pth holds none.")

        return io.Schema(
            node_id="PalimpsestVersatileLoader",
            display_name="Versatile Diffusion Loader",
            category=CATEGORY,
            description=(
                "Loads Versatile Diffusion: one model that draws after texts, after pictures, and after both at once. Takes the official single files (2022 and 2023) "
                "and diffusers folders, told apart by their content. The MODEL works with stock samplers, LoRA, ControlNet, areas and masks."
            ),
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=names,
                    default=names[0],
                    tooltip="A file or folder (with a slash) in models/versatile_diffusion, or a folder in models/diffusers that has image_unet. Nothing is downloaded.",
                ),
                io.Combo.Input(
                    "flows",
                    options=list(loader.FLOWS),
                    default=loader.ALL,
                    tooltip="Attention sets to load. all: texts, pictures and blends, 2.25 GB at fp16. text or image: one of them, 1.7 GB; contexts of the other are refused.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(loader.PRECISIONS),
                    default="auto",
                    tooltip="Number format of the weights. auto: what ComfyUI takes for this device. fp16 is what the authors' demo runs.",
                ),
                io.Combo.Input(
                    "attention_sets",
                    options=list(sources.CROSSINGS),
                    default=sources.AUTO,
                    tooltip="crossed exchanges the sets of texts and pictures: a diffusers folder saved from a text-to-image pipeline holds them so. "
                    "auto reads model_index.json. If prompts give nonsense, try crossed.",
                ),
                picker("clip", "The text encoder, CLIP ViT-L/14 with text_projection (SD 1.x checkpoints lack it): text_encoder of the diffusers folder or the original."),
                picker("clip_vision", "The vision encoder, CLIP ViT-L/14 at 224 px with visual_projection: image_encoder of the diffusers folder or the original."),
                picker("vae", "The picture VAE: kl-f8.pth, or any VAE of SD 1.x."),
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="For KSampler: ddim, ddim_uniform, 50 steps, cfg 7.5 as the authors sample, at 512 px."),
                io.Clip.Output("clip", display_name="clip", tooltip="For CLIP Text Encode: what it gives are text contexts of this model, not prompts for others."),
                io.ClipVision.Output("clip_vision", display_name="clip_vision", tooltip="For Versatile Image Context."),
                io.Vae.Output("vae", display_name="vae", tooltip="For VAE Decode."),
                io.String.Output("report", display_name="report", tooltip="What was found and loaded."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model_name, flows, precision, attention_sets, clip_name, clip_vision_name, vae_name, **kwargs) -> io.NodeOutput:
        chosen = {kind: picked(kind, name) for kind, name in (("clip", clip_name), ("clip_vision", clip_vision_name), ("vae", vae_name))}
        source = sources.recognise(files.find(model_name), attention_sets)
        loader.chosen_sets(source, flows)  # a set that is not there is refused before gigabytes are read
        extras = {kind: loader.load_extra(kind, source, path) for kind, path in chosen.items()}
        model = loader.load_model(source, flows, precision)
        report = loader.describe(source, model, extras)
        return io.NodeOutput(model, *extras.values(), report, ui=show(cls, report))

    @classmethod
    def validate_inputs(cls, model_name):
        """A name that is not in the list says where files belong, instead of the host's "value not in list"."""
        if model_name is None:  # linked from another node, known only when it runs
            return True
        try:
            files.find(model_name)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, model_name, clip_name=None, clip_vision_name=None, vae_name=None, **kwargs):
        """Files that were replaced are loaded anew."""
        try:
            paths = [picked(kind, name) for kind, name in (("clip", clip_name), ("clip_vision", clip_vision_name), ("vae", vae_name))]
            return " ".join([files.stamp(files.find(model_name)), *map(loader.file_stamp, paths)])
        except (ValueError, OSError, TypeError, AttributeError):  # gone, or linked
            return ""


class VersatileDualContext(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PalimpsestVersatileDualContext",
            display_name="Versatile Dual Context",
            category=CATEGORY,
            description=(
                "A text and a picture as one prompt: they are blended inside every attention block of Versatile Diffusion. At ratio 0 or 1 only one of them is computed, "
                "exactly as if it were alone."
            ),
            inputs=[
                io.Conditioning.Input("text", tooltip="From CLIP Text Encode with the CLIP of Versatile Diffusion Loader. Areas, ranges and ControlNets on it stay."),
                io.Conditioning.Input(
                    "image",
                    tooltip="From Versatile Image Context, or Focus, Combine Images or Load Context after it. Areas, masks, ranges, hooks and ControlNets "
                    "on it are dropped: set them on the text.",
                ),
                io.Float.Input(
                    "ratio",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.02,
                    tooltip='Share of the text, 0 to 1 ("text domination" in the authors\' demo, whose examples take 0.5 and 0.7). 0: the picture alone, 1: the text alone.',
                ),
                io.Conditioning.Input(
                    "negative_text",
                    optional=True,
                    tooltip="CLIP Text Encode of an empty text, as published, or of what to avoid. Without it: zero tokens, which are published for pictures only.",
                ),
                io.Conditioning.Input(
                    "negative_image",
                    optional=True,
                    tooltip="From Versatile Empty Image Context; what hangs on it is dropped too. Without it: zeros of the picture's shape, as published.",
                ),
                model_to_check(),
            ],
            outputs=[
                io.Conditioning.Output("positive", display_name="positive", tooltip="For the positive of any sampler."),
                io.Conditioning.Output("negative", display_name="negative", tooltip="The matching negative, at the same ratio."),
                io.String.Output("report", display_name="report", tooltip="What is blended."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, text, image, ratio, negative_text=None, negative_image=None, model=None, **kwargs) -> io.NodeOutput:
        if model is not None:
            check_model(model)
        positive = contexts.dual_conditioning(text, image, ratio)
        # without the text's areas and ControlNets, which belong to the positive
        zero_text = [[torch.zeros_like(text[0][0]), {}]]
        zero_image = contexts.image_conditioning([torch.zeros_like(tokens) for tokens in contexts.picture_contexts(image, "image input")])
        negative = contexts.dual_conditioning(negative_text or zero_text, negative_image or zero_image, ratio)
        sides = ["zeros" if given is None else "connected" for given in (negative_text, negative_image)]
        report = f"{describe(positive)}\nnegative: text {sides[0]}, image {sides[1]}"
        if ratio in (0, 1):
            report += f"\nat ratio {ratio:g} the {'picture' if ratio == 0 else 'text'} alone is computed"
        return io.NodeOutput(positive, negative, report, ui=show(cls, report))


class VersatileEmptyImage(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PalimpsestVersatileEmptyImage",
            display_name="Versatile Empty Image Context",
            category=CATEGORY,
            description=(
                "What guidance pushes away from when a picture is the prompt: zero tokens as published, an encoded empty picture, or a picture of your own as a negative image."
            ),
            inputs=[
                io.Combo.Input(
                    "kind",
                    options=[*contexts.EMPTIES, "picture"],
                    default="zeros",
                    tooltip="zeros: the authors' demo, the most robust. black: their choice for captions. grey: their script of 2022, more contrast. picture: the connected one.",
                ),
                io.ClipVision.Input("clip_vision", optional=True, tooltip="From Versatile Diffusion Loader; needed for all but zeros."),
                io.Image.Input("picture", optional=True, tooltip="What to avoid, for the kind picture: a negative image."),
                io.Conditioning.Input(
                    "like", optional=True,
                    tooltip="The positive: zeros then have its shape, which lets both run in one batch. Without it: one picture of 257 tokens.",
                ),
            ],
            outputs=[io.Conditioning.Output("context", display_name="context", tooltip="For the negative of a sampler, or negative_image of Versatile Dual Context.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, kind, clip_vision=None, picture=None, like=None, **kwargs) -> io.NodeOutput:
        if kind == "zeros":
            tokens = [torch.zeros(1, 257, WIDTH)]
            if like:
                # of a dual context the picture's tokens
                tokens = [torch.zeros_like(like[0][1].get(IMAGE_CONTEXT, like[0][0]))]
            return io.NodeOutput(contexts.image_conditioning(tokens))
        if clip_vision is None:
            raise ValueError(f"An encoded {kind} needs the vision encoder: connect clip_vision of Versatile Diffusion Loader, or choose zeros.")
        if kind == "picture" and picture is None:
            raise ValueError('The kind is "picture", but none is connected: connect one, or choose zeros.')
        shown = picture if kind == "picture" else contexts.empty_picture(kind)
        return io.NodeOutput(contexts.image_conditioning([contexts.encode_pictures(clip_vision, shown)]))


class ColorMatch(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PalimpsestColorMatch",
            display_name="Color Match to Reference",
            category=CATEGORY,
            description="Brings the mean and contrast of each color channel to those of a reference picture, as Versatile Diffusion's demo does after an image variation.",
            inputs=[
                io.Image.Input("image", tooltip="The result, one or several."),
                io.Image.Input("reference", tooltip="The picture whose colors it should have: one for all, or one per result. Compared at the result's size."),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=1.0, step=0.05,
                    tooltip="0 leaves the result, 1 is the demo's adjustment, 0.5 that of the authors' script of 2022.",
                ),
            ],
            outputs=[io.Image.Output("matched", display_name="image", tooltip="The adjusted result, values limited to 0..1.")],
        )

    @classmethod
    def execute(cls, image, reference, strength, **kwargs) -> io.NodeOutput:
        return io.NodeOutput(match_colors(image, reference, strength))


NODES = [VersatileLoader, VersatileDualContext, VersatileEmptyImage, ColorMatch]
