"""SeeCoder Loader, SeeCoder Encode, SeeCoder Compare: schema and wiring."""

from __future__ import annotations

import os

import torch
from comfy_api.latest import io

from ..common.pictures import rgb
from ..inversion.display import show
from ..seecoder import encode, files, loader, view
from ..seecoder.sockets import SeeCoderType

NO_FILE = "none"
RESIZE_TOOLTIP = (
    "Longer side of the reference in pixels before it is encoded; 0 (default) leaves the picture as it is, as the authors do. 512 to 1024 is what "
    "published examples use; time and memory grow with the number of pixels, and another size is another prompt."
)


def stamp(name: str | None) -> str:
    """Changes when the file of this name does; empty for none, a linked or a missing one."""
    try:
        info = os.stat(files.find(name)) if name else None
    except (ValueError, OSError):
        info = None
    return f"{info.st_mtime_ns} {info.st_size}" if info else ""


class SeeCoderLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        names = files.choices()
        return io.Schema(
            node_id="PalimpsestSeeCoderLoader",
            display_name="SeeCoder Loader",
            category="Palimpsest/seecoder",
            description=(
                "Loads a SeeCoder, the encoder of Prompt-Free Diffusion that turns a picture into the tokens of a prompt. Files: seecoder-v1-0, "
                "seecoder-pa-v1-0 (position-aware) or seecoder-anime-v1-0, in models/seecoder. They fit every SD1.x checkpoint."
            ),
            inputs=[
                io.Combo.Input(
                    "seecoder_name",
                    options=names,
                    default=names[0],
                    tooltip="File in models/seecoder or models/seecoders (or where extra_model_paths.yaml says). The variant is read from the file, not from its name.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(loader.PRECISIONS),
                    default="auto",
                    tooltip="Number format of the computation. auto: fp16 on graphics cards that like it (0.6 GB instead of 1.2 GB), fp32 elsewhere and for bf16 files. "
                    "fp16 differs by less than 1 % and is computed again in fp32 where values overflow.",
                ),
            ],
            outputs=[
                SeeCoderType.Output("seecoder", display_name="seecoder", tooltip="For SeeCoder Encode and SeeCoder Compare."),
                io.String.Output("report", display_name="report", tooltip="Which variant it is, its tokens, its number format."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, seecoder_name, precision, **kwargs) -> io.NodeOutput:
        model = loader.load(files.find(seecoder_name), precision)
        return io.NodeOutput(model, model.describe(), ui=show(cls, model.describe()))

    @classmethod
    def validate_inputs(cls, seecoder_name):
        """A name that is not in the list says where files belong, instead of the host's "value not in list"."""
        if seecoder_name is None:  # linked from another node, known only when it runs
            return True
        try:
            files.find(seecoder_name)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, seecoder_name, **kwargs):
        """A file that was replaced is loaded anew."""
        return stamp(seecoder_name)


class SeeCoderEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PalimpsestSeeCoderEncode",
            display_name="SeeCoder Encode",
            category="Palimpsest/seecoder",
            description=(
                "A picture instead of a prompt: takes the place of both CLIP Text Encodes. Sample with cfg around 2 (1.5 to 2.5), ddim and ddim_uniform, as the authors do; "
                "7, as for text, is far too much. For SD1.x checkpoints with the official files."
            ),
            inputs=[
                SeeCoderType.Input("seecoder", tooltip="From SeeCoder Loader."),
                io.Image.Input("image", tooltip="The reference, any size, one or several. Grey and transparent pictures are fine; transparency becomes white."),
                io.Combo.Input(
                    "negative",
                    options=list(encode.NEGATIVES),
                    default="zeros",
                    tooltip="What guidance pushes away from. zeros: published for v1-0 and pa. text: the connected negative text, zero tokens after it. "
                    "anime file: anime_ug.pth, published for the anime encoder. same as positive: no guidance at any cfg.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="Factor on the picture's tokens, 0 to 2. 1 is published; 0 says nothing (equal to zeros).",
                ),
                io.Combo.Input(
                    "batch",
                    options=list(encode.BATCHES),
                    default="one each",
                    tooltip="Several references. one each: latent i is drawn after picture i. blend: the weighted mean of their tokens. concatenate: the model attends to all.",
                ),
                io.String.Input(
                    "weights",
                    default="",
                    tooltip="One number per reference, for example 1, 0.5; empty means 1 each. They scale the tokens; a blend divides by their sum.",
                ),
                io.Int.Input("resize_longer_side", default=0, min=0, max=4096, step=32, tooltip=RESIZE_TOOLTIP),
                io.Combo.Input(
                    "anime_file",
                    options=[NO_FILE, *files.embeddings()],
                    default=NO_FILE,
                    tooltip='File with the negative embedding, used when negative is "anime file": anime_ug.pth (118 kB, from the assets of '
                    "Prompt-Free Diffusion) in models/seecoder.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White regions of the reference speak, black ones are not read. The paper has no mask: the encoder still sees the whole picture around them.",
                ),
                io.Conditioning.Input(
                    "text",
                    optional=True,
                    tooltip="A prompt that speaks beside the picture: the picture's tokens are appended to its tokens. From CLIP Text Encode of an SD1.x checkpoint.",
                ),
                io.Conditioning.Input("negative_text", optional=True, tooltip='Used when negative is "text".'),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Connect the checkpoint to have its token width checked here, before the sampler fails on it. It is not changed.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "positive",
                    display_name="positive",
                    tooltip="148 tokens per picture (official files), for the positive of any sampler, ControlNet or area node.",
                ),
                io.Conditioning.Output("negative_out", display_name="negative", tooltip="The matching negative."),
                io.String.Output("report", display_name="report", tooltip="What was encoded and how."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, anime_file):
        """A workflow saved with a file that is not here still runs where that file is not needed; `execute` says what is missing."""
        return True

    @classmethod
    def fingerprint_inputs(cls, anime_file=None, **kwargs):
        """A file that was replaced is read anew."""
        return stamp(None if anime_file == NO_FILE else anime_file)

    @classmethod
    def execute(
        cls, seecoder, image, negative, strength, batch, weights, resize_longer_side, anime_file,
        mask=None, text=None, negative_text=None, model=None, **kwargs,
    ) -> io.NodeOutput:
        if model is not None:
            encode.check_model(model, seecoder)
        factors = encode.parse_weights(weights, len(image))
        embedding = None
        if negative == "anime file" and anime_file != NO_FILE:
            embedding = encode.read_embedding(files.find(anime_file), seecoder.width)

        def assemble(tokens):
            positive = encode.with_text(encode.combine(tokens, batch, factors) * strength, text)
            return positive, encode.negative_for(negative, positive, negative_text, embedding)

        # once with empty tokens: whatever does not fit together is found before the encoder has run for a minute
        assemble(torch.zeros(len(image), seecoder.sizes.queries, seecoder.width))
        positive, negatives = assemble(encode.encode_pictures(seecoder, image, mask, resize_longer_side))
        height, width = encode.resized(rgb(image[:1]), resize_longer_side).shape[1:3]
        report = (
            f"{seecoder.describe()}\n{len(image)} reference{'s' if len(image) > 1 else ''} of {width} x {height} px"
            f"{' through a mask' if mask is not None else ''}, strength {strength:g}\n"
            f"positive {list(positive[0][0].shape)}{', text first' if text is not None else ''}; negative: {negative}, {list(negatives[0][0].shape)}"
        )
        if len(image) > 1:
            listed = f" with weights {weights.strip()}" if weights.strip() else ""
            needed = f": needs a latent batch of {len(image)}, a smaller one uses the first pictures only" if batch == "one each" else ""
            report += f"\n{batch}{listed}{needed}"
        return io.NodeOutput(positive, negatives, report, ui=show(cls, report))


class SeeCoderCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PalimpsestSeeCoderCompare",
            display_name="SeeCoder Compare",
            category="Palimpsest/seecoder",
            description=(
                "Shows what SeeCoder reads in reference pictures, side by side, to choose among them: where the 144 local queries look at each resolution, "
                "and where the 4 global ones do."
            ),
            inputs=[
                SeeCoderType.Input("seecoder", tooltip="From SeeCoder Loader."),
                io.Image.Input("image", tooltip="References to compare, one row each."),
                io.Int.Input("resize_longer_side", default=0, min=0, max=4096, step=32, tooltip=RESIZE_TOOLTIP),
                io.Mask.Input("mask", optional=True, tooltip="As in SeeCoder Encode: black regions are not read."),
            ],
            outputs=[
                io.Image.Output(
                    "comparison",
                    display_name="comparison",
                    tooltip="One row per reference: the picture, what is read at 1/8, 1/16 and 1/32 size, and by the global queries.",
                ),
                io.String.Output("report", display_name="report", tooltip="How concentrated the reading is."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, seecoder, image, resize_longer_side, mask=None, **kwargs) -> io.NodeOutput:
        readings: list = []
        encode.encode_pictures(seecoder, image, mask, resize_longer_side, readings)
        encoded = encode.resized(rgb(image[:1]), resize_longer_side).shape[1:3]
        sheet = view.comparison(rgb(image), readings, tuple(encoded))
        report = view.describe(readings)
        return io.NodeOutput(sheet, report, ui=show(cls, report, sheet))


NODES = [SeeCoderLoader, SeeCoderEncode, SeeCoderCompare]
