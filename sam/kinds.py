"""Which SAM a state dict holds, told by its tensors and never by the file's name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

# (width, blocks) of the image encoder -> name in segment_anything's registry (Kirillov et al., ICCV 2023)
KINDS = {(768, 12): "vit_b", (1024, 24): "vit_l", (1280, 32): "vit_h"}
PARTS = ("image_encoder.", "prompt_encoder.", "mask_decoder.")
WANTED = "choose sam_vit_b_01ec64.pth, sam_vit_l_0b3195.pth or sam_vit_h_4b8939.pth"

# what such a tensor says, though all of SAM's parts may be there as well
RELATIVES = (
    ("it holds a SAM-HQ, which is built otherwise", r"mask_decoder\.(hf_token|hf_mlp|compress_vit_feat|embedding_encoder)\b"),
    ("it holds a SAM 2, which is built otherwise", r"(sam_mask_decoder|sam_prompt_encoder|memory_attention|memory_encoder|image_encoder\.trunk)\b"),
    ("it holds a MobileSAM, which is built otherwise", r"image_encoder\.(layers\.\d|patch_embed\.seq)"),
    ("it holds a SAM with another image encoder", r"image_encoder\.(?!pos_embed|patch_embed|blocks|neck)"),
)
STRANGERS = (
    ("it holds a SAM in the format of transformers", r"(vision_encoder|shared_image_embedding)\."),
    ("it holds a YOLO", r"(model\.)+\d+\.(conv|cv\d|m)\b"),
    ("it holds a Grounding DINO", r"(module\.)?(bert\.|transformer\.level_embed|backbone\.0\.)"),
    ("it holds a CLIP vision model", r"(vision_model|visual)\."),
    ("it holds an IP-Adapter", r"(image_proj|ip_adapter)\."),
    ("it holds a whole checkpoint", r"(model\.diffusion_model|first_stage_model|cond_stage_model)\."),
    ("it holds a ControlNet", r"(control_model\.|controlnet_)"),
    ("it holds a LoRA", r"lora_"),
    ("parts of SAM are missing", "|".join(map(re.escape, PARTS))),
)


def _first_match(names: list[str], table: tuple[tuple[str, str], ...]) -> str | None:
    return next((words for words, pattern in table if any(re.match(pattern, name) for name in names)), None)


def describe_other(names: Iterable[str]) -> str:
    """What a file with tensors of these names, which is no SAM, seems to be; for the error message."""
    keys = [str(name) for name in names]
    return _first_match(keys, RELATIVES + STRANGERS) or (f"its first tensor is called {keys[0]}" if keys else "it holds no tensor")


def recognise(state: Mapping[str, Tensor], name: str) -> str:
    """Registry name of the SAM whose tensors these are: "vit_b", "vit_l" or "vit_h".

    state: only names and shapes are read. name: of the file, for messages. Raises ValueError, one sentence, for
    anything else: SAM-HQ, SAM 2 and other relatives, other models, an encoder of another size.
    """
    keys = list(state)
    whole = "image_encoder.pos_embed" in state and all(any(key.startswith(part) for key in keys) for part in PARTS)
    if not whole or _first_match(keys, RELATIVES):
        raise ValueError(f"The file {name} is no SAM that this node can run: {describe_other(keys)}; {WANTED}.")
    position = state["image_encoder.pos_embed"]
    width = int(position.shape[-1]) if position.ndim else 0
    blocks = 1 + max((int(match[1]) for key in keys if (match := re.match(r"image_encoder\.blocks\.(\d+)\.", key))), default=-1)
    if (width, blocks) not in KINDS:
        raise ValueError(
            f"The file {name} holds a SAM whose image encoder has {blocks} blocks of {width} values, which is none of {', '.join(KINDS.values())}: {WANTED}."
        )
    return KINDS[width, blocks]
