"""Text outputs of Versatile Diffusion: loaders of the text diffuser and of Optimus, empty latent, encode, edit and decode: schema and wiring."""

from __future__ import annotations

import functools

import comfy.model_management
import folder_paths
import torch
from comfy_api.latest import io

from ..inversion.display import show
from ..versatile_diffusion import files, loader, optimus, optimus_files, sources, text_unet_loader
from ..versatile_diffusion.optimus_sockets import OptimusType
from ..versatile_diffusion.optimus_words import REPEATS
from ..versatile_diffusion.text_unet import TEXT_LATENT
from .versatile_context import CATEGORY
from .versatile_diffusion import FROM_MODEL, PICKERS, picked



def listed(find, name: str | None) -> bool | str:
    """What `validate_inputs` returns for a file's name: where files belong, in place of the host's "value not in list"."""
    if name is None:  # linked from another node, known only when it runs
        return True
    try:
        find(name)
    except ValueError as error:
        return str(error)
    return True


def stamp(find, name: str | None) -> str:
    """Changes when the file or folder does; empty for one that is linked or gone."""
    try:
        return files.stamp(find(name))
    except (ValueError, OSError, TypeError, AttributeError):
        return ""


class VersatileTextLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        names = files.choices()
        return io.Schema(
            node_id="PalimpsestVersatileTextLoader",
            display_name="Versatile Text Model Loader",
            category=CATEGORY,
            description=(
                "Loads Versatile Diffusion's text diffuser, which samples the latent of a text: a caption of a picture (image-to-text) or a variation of a text. "
                "A MODEL of its own, so that picture flows never load its 3.4 GB. The CLIP that text variation needs comes with it."
            ),
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=names,
                    default=names[0],
                    tooltip="The same files as in Versatile Diffusion Loader: a four-flow file or a folder with text_unet (and image_unet, for captions). Nothing is downloaded.",
                ),
                io.Combo.Input(
                    "contexts",
                    options=list(text_unet_loader.CONTEXTS),
                    default=text_unet_loader.BOTH,
                    tooltip="Attention sets to load. image: captions of pictures. text: variations of texts. both: 0.5 GB more at fp16.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(text_unet_loader.PRECISIONS),
                    default="auto",
                    tooltip="Number format of the weights. auto: what ComfyUI takes for this device. fp16 is what the authors' demo runs.",
                ),
                io.Combo.Input(
                    "attention_sets",
                    options=list(sources.CROSSINGS),
                    default=sources.AUTO,
                    tooltip="As in Versatile Diffusion Loader: crossed exchanges the sets of texts and pictures, auto reads model_index.json of a folder. "
                    "A file of one set that ComfyUI saved: as stored if it reads texts, crossed if it reads pictures.",
                ),
                io.Combo.Input(
                    "clip_name",
                    options=[FROM_MODEL, *folder_paths.get_filename_list(PICKERS["clip"])],
                    default=FROM_MODEL,
                    tooltip="The text encoder for text variation, as in Versatile Diffusion Loader: text_encoder of the diffusers folder or the original "
                    f"CLIP ViT-L/14 with text_projection. Files of models/{PICKERS['clip']}; the official .pth holds none. Captions need none.",
                ),
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="For KSampler with Versatile Empty Text Latent: ddim, ddim_uniform, 50 steps, cfg 7.5."),
                io.String.Output("report", display_name="report", tooltip="What was found and loaded."),
                io.Clip.Output("clip", display_name="clip", tooltip="For CLIP Text Encode: what it gives are text contexts, the prompts of text variation."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model_name, contexts, precision, attention_sets, clip_name, **kwargs) -> io.NodeOutput:
        path = picked("clip", clip_name)
        source = text_unet_loader.recognise(files.find(model_name), attention_sets)
        text_unet_loader.chosen_sets(source, contexts)  # a set that is not there is refused before the CLIP is read
        clip = loader.load_extra("clip", source, path)
        model = text_unet_loader.load_model(source, contexts, precision)
        report = text_unet_loader.describe(source, model, clip)
        return io.NodeOutput(model, report, clip, ui=show(cls, report))

    @classmethod
    def validate_inputs(cls, model_name):
        return listed(files.find, model_name)

    @classmethod
    def fingerprint_inputs(cls, model_name=None, clip_name=None, **kwargs):
        """Files that were replaced are loaded anew."""
        return f"{stamp(files.find, model_name)} {stamp(functools.partial(picked, 'clip'), clip_name)}".strip()


class VersatileEmptyTextLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PalimpsestVersatileEmptyTextLatent",
            display_name="Versatile Empty Text Latent",
            category=CATEGORY,
            description="Empty latents of texts, [batch, 768, 1, 1], for KSampler with the text diffuser: one text per latent.",
            inputs=[
                io.Int.Input(
                    "batch_size", default=4, min=1, max=256, step=1,
                    tooltip="Number of texts, 1 to 256. 4 is what the authors sample at once; captions are loose, so choose among several.",
                ),
            ],
            outputs=[io.Latent.Output("latent", display_name="latent", tooltip="For KSampler, denoise 1.")],
        )

    @classmethod
    def execute(cls, batch_size, **kwargs) -> io.NodeOutput:
        return io.NodeOutput({"samples": torch.zeros(batch_size, TEXT_LATENT, 1, 1, device=comfy.model_management.intermediate_device())})


class VersatileOptimusLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        names = optimus_files.choices()
        return io.Schema(
            node_id="PalimpsestVersatileOptimusLoader",
            display_name="Versatile Optimus Loader",
            category=CATEGORY,
            description="Loads Optimus, the text VAE of Versatile Diffusion: a BERT that encodes a text to one vector, and a GPT-2 that writes a text from it.",
            inputs=[
                io.Combo.Input(
                    "optimus_name",
                    options=names,
                    default=names[0],
                    tooltip="optimus-vae.pth in models/optimus. The vocabularies of GPT-2 and BERT go beside it; the help page says which files. Nothing is downloaded.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(optimus.PRECISIONS),
                    default="auto",
                    tooltip="Number format of weights and computation. auto: fp16 on graphics cards that like it (0.5 GB instead of 1 GB), else fp32.",
                ),
            ],
            outputs=[
                OptimusType.Output("optimus", display_name="optimus", tooltip="For Versatile Optimus Decode, Encode and Edit."),
                io.String.Output("report", display_name="report", tooltip="What was loaded."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, optimus_name, precision, **kwargs) -> io.NodeOutput:
        model = optimus.load(optimus_files.find(optimus_name), precision)
        return io.NodeOutput(model, model.describe(), ui=show(cls, model.describe()))

    @classmethod
    def validate_inputs(cls, optimus_name):
        return listed(optimus_files.find, optimus_name)

    @classmethod
    def fingerprint_inputs(cls, optimus_name=None, **kwargs):
        """A file that was replaced is loaded anew."""
        return stamp(optimus_files.find, optimus_name)


class VersatileOptimusEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PalimpsestVersatileOptimusEncode",
            display_name="Versatile Optimus Encode",
            category=CATEGORY,
            description=(
                "A text as one latent of Optimus: to be noised and sampled again by the text diffuser (KSampler with denoise below 1), edited, or decoded. "
                "This is not a prompt; prompts of Versatile Diffusion come from CLIP Text Encode."
            ),
            inputs=[
                OptimusType.Input("optimus", tooltip="From Versatile Optimus Loader; needs its encoder."),
                io.String.Input("text", multiline=True, default="", tooltip="English, up to 77 word pieces (about 60 words), lower-cased before it is read."),
                io.Boolean.Input("one_per_line", default=False, tooltip="Off: one latent of the whole text. On: a batch with one latent per line, blank lines left out."),
            ],
            outputs=[io.Latent.Output("latent", display_name="latent", tooltip="[batch, 768, 1, 1], unscaled, the mean of the posterior.")],
        )

    @classmethod
    def execute(cls, optimus, text, one_per_line, **kwargs) -> io.NodeOutput:
        lines = [line for line in text.splitlines() if line.strip()] if one_per_line else []
        return io.NodeOutput({"samples": optimus.encode(lines or [text])})


class VersatileOptimusEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PalimpsestVersatileOptimusEdit",
            display_name="Versatile Optimus Edit",
            category=CATEGORY,
            description=(
                "Takes a phrase out of text latents and puts another in, z - (z . n) n + p with n the unit vector of the phrase to lose: the authors' way to edit a picture by "
                "way of its caption (2022 code, later switched off by them as not good enough)."
            ),
            inputs=[
                OptimusType.Input("optimus", tooltip="From Versatile Optimus Loader; needs its encoder."),
                io.Latent.Input("latent", tooltip="Text latents: from KSampler with the text diffuser, or Versatile Optimus Encode."),
                io.String.Input("negative", default="", tooltip="Phrase to take out, a few words; empty takes nothing out."),
                io.String.Input("positive", default="", tooltip="Phrase to put in, a few words; empty puts nothing in."),
            ],
            outputs=[io.Latent.Output("edited", display_name="latent", tooltip="For Versatile Optimus Decode.")],
        )

    @classmethod
    def execute(cls, optimus, latent, negative, positive, **kwargs) -> io.NodeOutput:
        return io.NodeOutput({**latent, "samples": optimus.edit(latent["samples"], negative, positive)})


class VersatileOptimusDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PalimpsestVersatileOptimusDecode",
            display_name="Versatile Optimus Decode",
            category=CATEGORY,
            description="Writes the texts of latents with Optimus and shows them on the node: the last step of image-to-text and text variation.",
            inputs=[
                OptimusType.Input("optimus", tooltip="From Versatile Optimus Loader."),
                io.Latent.Input("latent", tooltip="Text latents [batch, 768, 1, 1], from KSampler with the text diffuser or Versatile Optimus Encode."),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, step=1, control_after_generate=True,
                    tooltip="Words are drawn at random; text i of the batch draws with seed + i, whatever else is in the batch. Without meaning at temperature 0.",
                ),
                io.Float.Input("temperature", default=1.0, min=0.0, max=5.0, step=0.05, tooltip="1 is published, lower is safer and duller, 0 always takes the likeliest word."),
                io.Int.Input("top_k", default=0, min=0, max=1000, step=1, tooltip="Draw only from this many likeliest words; 0 (published) from all."),
                io.Float.Input("top_p", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="Draw only from the likeliest words of this probability together; 1 (published): all."),
                io.Int.Input(
                    "max_tokens", default=30, min=3, max=256, step=1,
                    tooltip="Longest text in word pieces, its two markers counted; 30 is published (about 25 words). Optimus was trained on single sentences.",
                ),
                io.Combo.Input(
                    "repeats", options=list(REPEATS), default=REPEATS[0],
                    tooltip="Repetitions that are taken out: phrases (2023: of one word, two words, and so on), words (2022: single words), keep (none).",
                ),
            ],
            outputs=[
                io.String.Output("text", display_name="text", tooltip="All texts, one per line."),
                io.String.Output("texts", display_name="texts", is_output_list=True, tooltip="The same as a list: what is connected runs once per text."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, optimus, latent, seed, temperature, top_k, top_p, max_tokens, repeats, **kwargs) -> io.NodeOutput:
        texts = optimus.decode(
            latent["samples"], length=max_tokens, seed=seed, temperature=temperature, top_k=top_k, top_p=top_p, repeats=repeats,
        )
        return io.NodeOutput("\n".join(texts), texts, ui=show(cls, "\n".join(texts)))


NODES = [VersatileTextLoader, VersatileEmptyTextLatent, VersatileOptimusLoader, VersatileOptimusEncode, VersatileOptimusEdit, VersatileOptimusDecode]
