"""Mini Checkpoint, Mini LoRA, Mini Scene, Mini ControlNet and Mini Outline: schema and wiring."""

from __future__ import annotations

import random

import numpy as np
import torch
from comfy_api.latest import io

from ..inversion.display import show
from ..mini import checkpoint
from ..mini.captions import caption as caption_of
from ..mini.parse import parse, restate, scene_for
from ..mini.scenes import BACKGROUNDS, COLORS, PATTERNS, SHAPES, SIZES, STYLES, Scene, edited, masks, outline, render, sample_scene

DEFAULT = "text_to_image"
EDITS = {"color": COLORS, "color2": COLORS, "pattern": PATTERNS, "background": BACKGROUNDS, "style": STYLES, "shape": SHAPES, "size": SIZES}
OF_SCENE = ("background", "style")
NONE, AUTO = "none", "auto"


def _state(*stems: str) -> str:
    """Time and size of shipped weight files, None for one that is not there."""
    files = (checkpoint.WEIGHTS / f"{stem}.safetensors" for stem in stems)
    return str([(file.stat().st_mtime_ns, file.stat().st_size) if file.is_file() else None for file in files])


class MiniCheckpoint(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        names = checkpoint.names()
        options = sorted(names, key=lambda name: name != DEFAULT) or [DEFAULT]
        return io.Schema(
            node_id="PalimpsestMiniCheckpoint",
            display_name="Mini Checkpoint",
            category="Palimpsest/mini",
            description=(
                "Loads a small text-to-image model that comes with this pack: Stable Diffusion 1.5's layout at a tenth of its width, trained on drawings of "
                "circles, squares, triangles and stars. It samples 128 px pictures in seconds without a graphics card, and takes every node an SD1.5 checkpoint takes."
            ),
            inputs=[
                io.Combo.Input(
                    "name",
                    options=options,
                    default=options[0],
                    tooltip="Which member of the mini family to load. text_to_image draws scenes from captions like 'a red circle on the left', instruct_pix2pix edits "
                    "pictures by instructions, versatile draws after pictures, captions and blends of both. Nothing is downloaded.",
                )
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="The UNet, an SD1.x model to every node. Made for latents of 128 x 128 pixels."),
                io.Clip.Output("clip", display_name="clip", tooltip="The text encoder. It knows the words of Mini Scene's captions and warns about others."),
                io.Vae.Output("vae", display_name="vae", tooltip="The autoencoder, 4 channels at 1/8 size, trained on the same drawings."),
            ],
        )

    @classmethod
    def execute(cls, name) -> io.NodeOutput:
        return io.NodeOutput(*checkpoint.load(name))

    @classmethod
    def fingerprint_inputs(cls, name):
        """Weights that were trained anew are loaded anew."""
        return _state(*checkpoint.stems(name), "autoencoder")


def to_tensor(scene: Scene) -> torch.Tensor:
    """IMAGE [1, 128, 128, 3] of a scene."""
    return torch.from_numpy(np.ascontiguousarray(render(scene)))[None]


def edit_scene(scene: Scene, attribute: str, value: str, index: int, seed: int) -> Scene:
    """The edited twin; "auto" takes a word that shows. Raises ValueError, one sentence, for an edit that this scene cannot have."""
    if attribute == NONE:
        return scene
    if attribute not in EDITS:
        raise ValueError(f"A scene has no {attribute} to edit: set edit to {NONE}, {', '.join(EDITS)}.")
    if attribute not in OF_SCENE and index >= len(scene.objects):
        raise ValueError(f"The scene has {len(scene.objects)} object, so object {index + 1} cannot be edited: set edit_object to 1, or objects to 2.")
    obj = scene.objects[min(index, len(scene.objects) - 1)]
    if attribute == "color2" and obj.pattern == "plain":
        raise ValueError(f"Object {index + 1} is plain and has no second color: edit its pattern, or choose a scene with a pattern.")
    old = getattr(scene if attribute in OF_SCENE else obj, attribute)
    # A pattern in its object's own color would not show.
    taken = {"color": obj.color2, "color2": obj.color}.get(attribute)
    if value == AUTO:
        value = random.Random(seed).choice([word for word in EDITS[attribute] if word not in (old, taken)])
    if value not in EDITS[attribute]:
        raise ValueError(f"'{value}' is no {attribute}: set edit_value to {AUTO}, {', '.join(EDITS[attribute])}.")
    if value == old:
        what = f"The scene's {attribute}" if attribute in OF_SCENE else f"Object {index + 1}'s {attribute}"
        raise ValueError(f"{what} is {value} already, so there is nothing to edit: choose another edit_value, or {AUTO}.")
    if value == taken:
        raise ValueError(f"Object {index + 1} already has {value} as its other color, so the pattern would vanish: choose another edit_value.")
    return edited(scene, attribute, value, index, seed)


class MiniScene(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        words = list(dict.fromkeys(word for table in EDITS.values() for word in table))
        return io.Schema(
            node_id="PalimpsestMiniScene",
            display_name="Mini Scene",
            category="Palimpsest/mini",
            description=(
                "Draws a scene of one or two objects, from a seed or from a caption, with its caption, the silhouette of each object and, if asked for, "
                "a twin that differs in one attribute: a picture to edit, the prompts for it and the truth to compare the result with."
            ),
            inputs=[
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    step=1,
                    control_after_generate=True,
                    tooltip="Draws everything the caption leaves open. The same seed gives the same scene for ever.",
                ),
                io.Combo.Input("objects", options=["auto", "1", "2"], default="auto", tooltip="Number of objects. auto lets the seed choose. A caption's own number goes first."),
                io.String.Input(
                    "caption",
                    default="",
                    multiline=True,
                    tooltip="What to draw, for example 'a large red circle with blue dots on the left and a star, on a beige background, outline sketch'. "
                    "Leave empty to let the seed choose. What is not named is drawn by the seed.",
                ),
                io.Combo.Input(
                    "edit",
                    options=[NONE, *EDITS],
                    default=NONE,
                    tooltip="The attribute in which the edited twin differs. color2 is the color of stripes, dots and checks. none makes the twin equal to the original.",
                ),
                io.Combo.Input(
                    "edit_value",
                    options=[AUTO, *words],
                    default=AUTO,
                    tooltip="The attribute's new value; it must be a word for the chosen attribute, and another than the present one. auto lets the seed choose one that differs.",
                ),
                io.Int.Input(
                    "edit_object",
                    default=1,
                    min=1,
                    max=2,
                    step=1,
                    tooltip="Which object to edit, 1 or 2, in the order of the caption. Background and style belong to the whole scene and ignore this.",
                ),
                io.Boolean.Input(
                    "name_all",
                    default=True,
                    tooltip="On: the captions name every attribute. Off: each is left out with probability 0.3, as in training. "
                    "A caption of your own keeps what it names; the edited attribute is always named.",
                ),
            ],
            outputs=[
                io.Image.Output("image", display_name="image", tooltip="The scene, 128 x 128 pixels."),
                io.Mask.Output("masks", display_name="masks", tooltip="One silhouette per object, in the order of the caption."),
                io.String.Output("source_caption", display_name="caption", tooltip="A caption in words the mini checkpoint knows: the source prompt."),
                io.Image.Output("edited_image", display_name="edited_image", tooltip="The twin with one attribute changed: what a perfect edit would look like."),
                io.String.Output("edited_caption", display_name="edited_caption", tooltip="The twin's caption, the same words but for the edit: the target prompt."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, seed, objects, caption, edit, edit_value, edit_object, name_all) -> io.NodeOutput:
        if caption.strip():
            named, whole = parse(caption)
            scene = scene_for(named, whole, seed)
        else:
            named = whole = None
            scene = sample_scene(seed, None if objects == "auto" else int(objects))
        twin = edit_scene(scene, edit, edit_value, edit_object - 1, seed)
        words = [cls.words(s, seed, named, whole, edit, edit_object - 1, name_all) for s in (scene, twin)]
        silhouettes = torch.from_numpy(masks(scene))
        text = words[0] if edit == NONE else f"{words[0]}\n-> {words[1]}"
        return io.NodeOutput(to_tensor(scene), silhouettes, words[0], to_tensor(twin), words[1], ui=show(cls, text))

    @staticmethod
    def words(scene: Scene, seed: int, named, whole, edit: str, index: int, name_all: bool) -> str:
        """The caption of one of the two twins; both name the same attributes.

        named, whole: what the user's own caption names of each object and of the scene (as `parse` returns them), None
        without one. edit, index: the edited attribute and object, which are always named.
        """
        if named is None:
            # To name a second color is to name its pattern.
            always = () if edit == NONE else ("pattern" if edit == "color2" else edit,)
            return caption_of(scene, seed, 1.0 if name_all else 0.7, always)[0]
        named, whole = [dict(n) for n in named], dict(whole)
        if edit in OF_SCENE:
            whole.setdefault(edit, "")
        elif edit != NONE:
            named[index].setdefault("pattern" if edit == "color2" else edit, "")
        return restate(scene, named, whole, seed)


class MiniLora(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PalimpsestMiniLora",
            display_name="Mini LoRA",
            category="Palimpsest/mini",
            description=(
                "Puts the LoRA 'strips' on the mini checkpoint: trained on strips in which things recur, it lets the model look at one thing to draw another of its "
                "kind, as models of photographs do by themselves. MRSA Concept Composer needs that; what single prompts give hardly changes."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model of Mini Checkpoint (text_to_image); no other fits."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="Share of the LoRA's weights that is added, 0 to 2: 0 leaves the model as it is, 1 is what it was trained for.",
                ),
            ],
            outputs=[io.Model.Output("patched_model", display_name="model", tooltip="The model with the LoRA, for MRSA Concept Composer and a KSampler.")],
        )

    @classmethod
    def execute(cls, model, strength) -> io.NodeOutput:
        return io.NodeOutput(checkpoint.with_lora(model, strength) if strength else model)

    @classmethod
    def fingerprint_inputs(cls, model, strength):
        """Weights that were trained anew are loaded anew."""
        return _state("strips") + str(strength)


class MiniControlNet(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PalimpsestMiniControlNet",
            display_name="Mini ControlNet",
            category="Palimpsest/mini",
            description=(
                "Loads the ControlNet of the mini checkpoint: it draws objects where white outlines on black say. "
                "Connect it to Apply ControlNet with the outline picture of Mini Outline."
            ),
            inputs=[],
            outputs=[io.ControlNet.Output("control_net", display_name="control_net", tooltip="For Apply ControlNet, with the models of Mini Checkpoint only.")],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(checkpoint.load_controlnet())

    @classmethod
    def fingerprint_inputs(cls):
        """Weights that were trained anew are loaded anew."""
        return _state("controlnet")


class MiniOutline(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PalimpsestMiniOutline",
            display_name="Mini Outline",
            category="Palimpsest/mini",
            description="Outlines of silhouettes, white on black: the hint that the mini ControlNet was trained with. Connect the masks of Mini Scene, or a mask of your own.",
            inputs=[io.Mask.Input("masks", tooltip="One silhouette per object, as Mini Scene gives them; all of them are drawn into one hint.")],
            outputs=[io.Image.Output("hint", display_name="hint", tooltip="One picture of the masks' size, for Apply ControlNet.")],
        )

    @classmethod
    def execute(cls, masks) -> io.NodeOutput:
        lines = outline(masks.reshape(-1, *masks.shape[-2:]).cpu().numpy())
        return io.NodeOutput(torch.from_numpy(lines)[None, :, :, None].expand(-1, -1, -1, 3).contiguous())


NODES = [MiniCheckpoint, MiniLora, MiniScene, MiniControlNet, MiniOutline]
