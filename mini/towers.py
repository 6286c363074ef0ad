"""The family's image and text towers: what CLIP ViT-L/14 is to Stable Diffusion, for pictures of scenes.

The image tower is the host's CLIP vision transformer at a small width, so the host's own CLIP_VISION holds it. The text tower is the family's text
encoder, as CLIP's is Stable Diffusion's, with a text projection that the encoder itself lacks. One file holds both, with the names of a
full CLIP of transformers.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from .nets import CONTEXT, attention_for_training, initialise
from .storage import read_weights

CONFIG = Path(__file__).with_name("towers_vision.json")
FILE = "towers.safetensors"
TEXT_PROJECTION = "text_projection.weight"


class Towers(torch.nn.Module):
    """Both towers in training. Features are projected and not normalised, as CLIP's image_embeds are."""

    def __init__(self):
        import comfy.ops
        from comfy.clip_model import CLIPVisionModelProjection

        super().__init__()
        config = json.loads(CONFIG.read_text(encoding="utf-8"))
        self.vision = CLIPVisionModelProjection(config, torch.float32, "cpu", comfy.ops.disable_weight_init)
        self.text_projection = torch.nn.Linear(CONTEXT, config["projection_dim"], bias=False)
        initialise(self)
        torch.nn.init.normal_(self.vision.vision_model.embeddings.class_embedding, std=0.02)
        torch.nn.init.normal_(self.vision.vision_model.embeddings.position_embedding.weight, std=0.02)
        # of CLIP's contrastive loss: starts at 1 / 0.07
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.6593))

    def image_tokens(self, pictures: Tensor) -> Tensor:
        """Projected tokens [B, 1 + 64, P] of pictures [B, 3, 128, 128] in 0..1, the whole picture's first: what Versatile Diffusion reads, before its scaling.

        Written out because the host adds to `x` in place, which autograd refuses while a LayerNorm before it still needs `x`.
        """
        vision = self.vision.vision_model

        def attention(q, k, v, heads, mask):
            return attention_for_training(None, q, k, v, heads, mask)

        x = vision.pre_layrnorm(vision.embeddings(pictures * 2 - 1))
        for layer in vision.encoder.layers:
            x = x + layer.self_attn(layer.layer_norm1(x), None, attention)
            x = x + layer.mlp(layer.layer_norm2(x))
        return self.vision.visual_projection(vision.post_layernorm(x))

    def image_features(self, pictures: Tensor) -> Tensor:
        """[B, P] of pictures [B, 3, 128, 128] in 0..1, equal to the vision model's own forward."""
        return self.image_tokens(pictures)[:, 0]

    def text_features(self, states: Tensor) -> Tensor:
        """[B, P] of a text encoder's last states [B, 77, CONTEXT]: the mean of all positions, projected, as instructions are held against pictures."""
        return self.text_projection(states.mean(1))


def file_state(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of `Towers` under the names of a full CLIP of transformers."""
    return {name.removeprefix("vision."): value for name, value in weights.items() if not name.startswith("answers.")}


def from_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `file_state`: names of `Towers`."""
    return {name if name in (TEXT_PROJECTION, "logit_scale") else f"vision.{name}": value for name, value in state.items()}


def load_clip_vision(weights_folder: Path):
    """The shipped image tower as the host's CLIP_VISION. Raises ValueError, one sentence, when its file is missing or damaged."""
    from comfy.clip_vision import ClipVisionModel

    class MiniClipVision(ClipVisionModel):
        """The host's class; says that its tokens are for a Versatile Diffusion of the mini family's width."""

        context_width = CONTEXT

    weights, _ = read_weights(weights_folder / FILE)
    model = MiniClipVision(str(CONFIG))
    vision = {name: value for name, value in weights.items() if name.startswith(("vision_model.", "visual_projection."))}
    try:
        missing, unexpected = model.load_sd(vision)
    except RuntimeError as error:
        raise ValueError(f"The file {FILE} holds other weights than this version of the pack expects; reinstall the pack.") from error
    if missing or unexpected:
        raise ValueError(f"The file {FILE} lacks {(list(missing) + list(unexpected))[0]} or has it besides; reinstall the pack.")
    return model
