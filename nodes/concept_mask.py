"""Concept Mask (SAM): schema and wiring."""

from __future__ import annotations

from comfy_api.latest import io

from ..common.pictures import rgb
from ..inversion.display import show
from ..sam import files, loader, predict, preview
from ..sam.prompts import make_prompt

CORNER = "{} edge of the box in pixels of the picture, from its {}. All four zero: no box."


class ConceptMaskSAM(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        names = files.choices()
        return io.Schema(
            node_id="PalimpsestConceptMaskSAM",
            display_name="Concept Mask (SAM)",
            category="Palimpsest/concept",
            description=(
                "Cuts a thing out of a picture by Segment Anything: put a box around it, or click points on it, and get its mask, for MRSA Concept or any node that "
                "takes a MASK. Needs the package segment-anything (python -m pip install segment-anything) and a SAM file in models/sams."
            ),
            inputs=[
                io.Image.Input("image", tooltip="The picture, any size, one or several; the same box and points are used for all of them."),
                io.Combo.Input(
                    "sam_name",
                    options=names,
                    default=names[0],
                    tooltip="File in models/sams (or where extra_model_paths.yaml says): sam_vit_b (375 MB, quick), sam_vit_l (1.2 GB) or sam_vit_h (2.6 GB, best). "
                    "Which one it is is read from the file, not from its name.",
                ),
                io.Int.Input("x1", default=0, min=0, max=16384, step=1, tooltip=CORNER.format("Left", "left")),
                io.Int.Input("y1", default=0, min=0, max=16384, step=1, tooltip=CORNER.format("Upper", "top")),
                io.Int.Input("x2", default=0, min=0, max=16384, step=1, tooltip=CORNER.format("Right", "left")),
                io.Int.Input("y2", default=0, min=0, max=16384, step=1, tooltip=CORNER.format("Lower", "top")),
                io.String.Input(
                    "points",
                    default="",
                    multiline=True,
                    tooltip="Points in pixels of the picture, separated by semicolons: x, y, + lies on the concept, x, y, - does not. Example: 120, 80, +; 40, 200, -. "
                    "Alone, or beside a box to correct it.",
                ),
                io.Combo.Input(
                    "choice",
                    options=list(predict.CHOICES),
                    default=predict.BEST,
                    tooltip="SAM proposes three masks, often a part, a larger part and the whole. best score: the one it trusts most. smallest, largest: by area. "
                    "index: the one you name. single: SAM's one answer for a clear prompt, such as a box with several points.",
                ),
                io.Int.Input("index", default=0, min=0, max=2, step=1, tooltip='Which of the three masks, counted from 0; used when choice is "index". The report lists them.'),
            ],
            outputs=[
                io.Mask.Output("mask", display_name="mask", tooltip="White where the concept is, one mask per picture, at the picture's size."),
                io.Image.Output("preview", display_name="preview", tooltip="The picture, dark outside the mask, with the box and the points."),
                io.String.Output("report", display_name="report", tooltip="What SAM proposed, how large and how good it thinks each mask is, and which was taken."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, image, sam_name, x1, y1, x2, y2, points, choice, index, **kwargs) -> io.NodeOutput:
        height, width = image.shape[1:3]
        prompt = make_prompt((x1, y1, x2, y2), points, width, height)
        pictures = rgb(image)
        loader.package()  # missing, it is named before a file is asked for
        model = loader.load(files.find(sam_name))
        masks, proposals = predict.segment_pictures(model, pictures, prompt, choice, index)
        sheet = preview.previews(pictures, masks, prompt)
        lines = [f"SAM {model.kind} from {model.name}: {prompt.describe()}"]
        lines += [f"picture {number}: {found.describe()}" if len(proposals) > 1 else found.describe() for number, found in enumerate(proposals, 1)]
        report = "\n".join(lines)
        return io.NodeOutput(masks, sheet, report, ui=show(cls, report, sheet))

    @classmethod
    def validate_inputs(cls, sam_name):
        """A name that is not in the list, and an empty list, are explained by `execute`."""
        return True

    @classmethod
    def fingerprint_inputs(cls, sam_name=None, **kwargs):
        """A file that was replaced is read anew."""
        return files.stamp(sam_name)


NODES = [ConceptMaskSAM]
