"""MRSA Concept: schema and wiring."""

from __future__ import annotations

from comfy_api.latest import io

from ..attention_patches.mrsa_concept import Concepts, describe, encode_concept, latent_concept
from ..attention_patches.mrsa_masks import AREA, CROP, MASK_POLICIES, RESIZES
from ..attention_patches.mrsa_sockets import ConceptType
from ..attention_patches.mrsa_view import sheet
from ..inversion.display import show

SIDE = "{} of the reference in pixels. That of the new picture is usual: 512 for SD1.x, 1024 for SDXL."


class MRSAConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PalimpsestMRSAConcept",
            display_name="MRSA Concept",
            category="Palimpsest/concept",
            description=(
                "One reference for MRSA (FreeCustom): a picture, the mask of the thing you want from it, and a prompt that describes the whole picture "
                "with the thing worn, held or used in it. Chain as many as you like."
            ),
            inputs=[
                io.Mask.Input("mask", tooltip="White where the concept is, from Concept Mask (SAM), the mask editor or any node. An empty mask has no effect."),
                io.Conditioning.Input(
                    "picture_prompt",
                    tooltip="A prompt of its own that describes the reference's whole picture in context, not the thing alone: 'a dog wearing a red hat on a lawn', "
                    "not 'a red hat'. A concept shown worn, held or used carries over well, a bare object does not.",
                ),
                io.Float.Input(
                    "weight",
                    default=3.0,
                    min=-10.0,
                    max=10.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How much the picture looks at this concept, no unit. 2 to 3 is published; 1 is not neutral (it multiplies the concept's share by 2.7), "
                    "0 switches the concept off, negative values weaken it.",
                ),
                io.Combo.Input(
                    "resize",
                    options=list(RESIZES),
                    default=CROP,
                    tooltip="How image becomes width x height. crop: keeps the aspect and cuts around the mask. whole: keeps all of the picture and its aspect, with about as many "
                    "pixels. squash (published): stretches it, nearest pixel, as the authors' code does.",
                ),
                io.Int.Input("width", default=512, min=64, max=4096, step=8, tooltip=SIDE.format("Width")),
                io.Int.Input("height", default=512, min=64, max=4096, step=8, tooltip=SIDE.format("Height")),
                io.Combo.Input(
                    "mask_policy",
                    options=list(MASK_POLICIES),
                    default=AREA,
                    tooltip="How the mask becomes tokens. area: a token is kept when enough of its cell is white. 255 only (published): 128 x 128 nearest pixels, "
                    "pure white only, top left pixel of each cell, as the authors' code does.",
                ),
                io.Float.Input(
                    "mask_threshold",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of a token's cell that has to be white for it to be kept, 0 to 1; used when mask_policy is area. Lower it for thin things; "
                    "0 keeps every cell that is touched.",
                ),
                io.Image.Input("image", optional=True, tooltip="The reference picture, one. Connect this and vae, or latent."),
                io.Vae.Input("vae", optional=True, tooltip="The VAE of the checkpoint that will sample. Encodes image; with latent it only draws the preview."),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="The reference as a latent, used as it is, in place of image. The mask is stretched over it; resize, width and height do nothing.",
                ),
                ConceptType.Input("concept", optional=True, tooltip="Concepts from another MRSA Concept; this one joins behind them."),
            ],
            outputs=[
                ConceptType.Output("concepts", display_name="concept", tooltip="This concept behind the connected ones, for the next MRSA Concept or the composer."),
                io.Image.Output("preview", display_name="preview", tooltip="The picture, and what is kept of it at each attention resolution."),
                io.String.Output("report", display_name="report", tooltip="Size, cut, weight and the number of tokens kept at each resolution."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, mask, picture_prompt, weight, resize, width, height, mask_policy, mask_threshold, image=None, vae=None, latent=None, concept=None, **kwargs,
    ) -> io.NodeOutput:
        if (image is None) == (latent is None):
            found = "neither is" if image is None else "both are"
            raise ValueError(f"A concept comes from an image or a latent, but {found} connected: connect one of them.")
        if image is not None and vae is None:
            raise ValueError("The image has to be encoded, but no VAE is connected: connect the VAE of the checkpoint that will sample.")
        shared = {"policy": mask_policy, "threshold": mask_threshold}
        if image is not None:
            made, chosen = encode_concept(image, vae, mask, picture_prompt, weight, resize=resize, size=(height, width), **shared)
            origin = (chosen, tuple(image.shape[1:3]))
        else:
            made, origin = latent_concept(latent, mask, picture_prompt, weight, vae=vae, **shared), ()
        concepts = (concept or Concepts()).joined(made)
        report = describe(made, len(concepts), *origin, mask=tuple(mask.shape[-2:]))
        preview = sheet(made)
        return io.NodeOutput(concepts, preview, report, ui=show(cls, report, preview))


NODES = [MRSAConcept]
