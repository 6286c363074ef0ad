"""What an edit looks like to CLIP: its direction between image features, and the text projection that instructions are held against.

Stable Diffusion's text encoder is CLIP ViT-L/14's without its last matrix, the text projection, so that has to come from another file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .instruction import plain
from .objective import direction_between

NONE = "none"
SHIPPED = {"mini_towers (comes with Palimpsest)": Path(__file__).parents[1] / "mini" / "weights" / "towers.safetensors"}
# with the names in files of transformers, of Stability's SDXL and of the mini towers; OpenAI's own, which is the transpose, last
KEYS = ("text_projection.weight", "text_model.text_projection.weight", "conditioner.embedders.0.transformer.text_projection.weight",
        "cond_stage_model.transformer.text_projection.weight", "text_encoders.clip_l.transformer.text_projection.weight",
        "text_encoders.clip_l.text_projection.weight", "text_projection")
OPENAI = "text_projection"


@dataclass(frozen=True, eq=False)
class Direction:
    """The direction term of a run, or why there is none. vector: d [1, P]; projection: [P, C]; both float32 on the CPU, None where it is off."""

    vector: Tensor | None = None
    projection: Tensor | None = None
    reason: str = ""

    @property
    def on(self) -> bool:
        """Whether there is a direction term."""
        return self.vector is not None


def choices() -> list[str]:
    """What can be chosen as the text projection: nothing, the pack's own, the host's text encoder files."""
    import folder_paths

    return [NONE, *(name for name, path in SHIPPED.items() if path.is_file()), *folder_paths.get_filename_list("text_encoders")]


def find(name: str) -> str:
    """Full path of a name from `choices`. Raises ValueError, one sentence, when it is not there (any more)."""
    import folder_paths

    if name in SHIPPED:
        if SHIPPED[name].is_file():
            return str(SHIPPED[name])
        raise ValueError("The mini towers are not part of this version of Palimpsest: choose none, or a file of models/text_encoders.")
    if path := folder_paths.get_full_path("text_encoders", name):
        return path
    raise ValueError(f"There is no file {name} in models/text_encoders: put a full CLIP ViT-L/14 or SDXL's clip_l there, or choose none.")


def read_projection(path: str) -> tuple[Tensor | None, str]:
    """(text projection [P, C] of a file, ""), or (None, why there is none). Raises ValueError, one sentence, for a file that cannot be read."""
    name = os.path.basename(path)
    try:
        found = _tensor(path)
    # whatever the system, safetensors, pickle or zip find wrong
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"The file {name} cannot be read ({reason}): choose another text projection, or none.") from error
    if found is None:
        return None, f"{name} holds no text projection (a full CLIP ViT-L/14 or SDXL's clip_l does)"
    matrix = plain(found)
    if matrix.ndim != 2 or not bool(torch.isfinite(matrix).all()):
        return None, f"the text projection in {name} is no matrix of numbers"
    if matrix.shape[0] == matrix.shape[1] and torch.allclose(matrix, torch.eye(len(matrix)), atol=1e-3):
        return None, f"the text projection in {name} is the identity, which stands for a missing one"
    return matrix, ""


def _tensor(path: str) -> Tensor | None:
    """The first text projection of a file, [P, C], whatever it is called."""
    import comfy.utils
    from safetensors import safe_open

    if path.lower().endswith((".safetensors", ".sft")):
        # one small tensor out of some gigabytes
        with safe_open(path, "pt") as file:
            key = next((key for key in KEYS if key in file.keys()), None)
            found = None if key is None else file.get_tensor(key).clone()
    else:
        state = comfy.utils.load_torch_file(path, safe_load=True)
        key = next((key for key in KEYS if key in state), None)
        found = None if key is None else state[key]
    return found.t() if key == OPENAI and found is not None and found.ndim == 2 else found


def make_direction(clip_vision, name: str, before: Tensor, after: Tensor, width: int) -> Direction:
    """The direction of an edit for instructions of `width` values per token; off, with a reason, where a part is missing.

    clip_vision: the host's CLIP_VISION or None. name: from `choices`. before, after: [N, H, W, 3]. Raises ValueError, one sentence, for a file
    that cannot be read and for parts that do not belong together.
    """
    if clip_vision is None or name == NONE:
        missing = [what for what, absent in (("CLIP_VISION", clip_vision is None), ("text projection", name == NONE)) if absent]
        return Direction(reason=f"there is no {' and no '.join(missing)}")
    projection, reason = read_projection(find(name))
    if projection is None:
        return Direction(reason=reason)
    if projection.shape[1] != width:
        raise ValueError(
            f"The text projection {name} takes {projection.shape[1]} values per token, but the model's text encoder gives {width}: "
            "choose the one that belongs to it, or none."
        )
    features = []
    for image in (before, after):
        embeds = clip_vision.encode_image(image)["image_embeds"]
        if embeds.ndim != 2 or embeds.shape[1] != len(projection):
            raise ValueError(
                f"The CLIP_VISION gives features of shape {list(embeds.shape[1:])}, but the text projection {name} leads to {len(projection)} values: "
                "load the vision model of the same CLIP, or set the text projection to none."
            )
        features.append(embeds)
    # outside the host's inference mode the tower's features carry gradients
    vector = plain(direction_between(*features))
    if not bool(torch.isfinite(vector).all()) or float(vector.norm()) < 0.5:
        return Direction(reason="the CLIP_VISION sees no difference between the pictures")
    return Direction(vector, projection)
