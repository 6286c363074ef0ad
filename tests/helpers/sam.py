"""Segment Anything for tests: a small one of the real package, and a stand-in for tests that are not about SAM itself.

Both have an image encoder of width 32 and two blocks, which `known` makes the pack take for a kind of SAM.
"""

from __future__ import annotations

import sys
from functools import partial
from types import ModuleType

import numpy as np
import torch
from torch import nn

from ...sam import files, kinds

WIDTH, BLOCKS, SIDE = 32, 2, 64
KIND = "vit_small"


def known(monkeypatch) -> None:
    """Make the pack know the small kind."""
    monkeypatch.setitem(kinds.KINDS, (WIDTH, BLOCKS), KIND)


def empty_folder(monkeypatch, models_dir) -> None:
    """Point the host at a models folder of the test's own, without ours in the registry."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "models_dir", str(models_dir))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {k: v for k, v in folder_paths.folder_names_and_paths.items() if k != files.FOLDER})
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})


class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.Linear(WIDTH, WIDTH)
        self.attn.num_heads = 2
        self.rel_pos_h = nn.Parameter(torch.zeros(7, WIDTH // 2))  # a bare parameter beside a layer, as in the real one

    def forward(self, x):
        return x + self.attn(x)


class _Encoder(nn.Module):
    img_size = SIDE

    def __init__(self):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, SIDE // 16, SIDE // 16, WIDTH))
        self.blocks = nn.ModuleList(_Block() for _ in range(BLOCKS))

    def forward(self, x):
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return x


class StandInSam(nn.Module):
    """The parts, the buffers and the read-only `device` of the real Sam."""

    def __init__(self):
        super().__init__()
        self.image_encoder = _Encoder()
        self.prompt_encoder, self.mask_decoder = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("pixel_mean", torch.zeros(3, 1, 1), False)
        self.register_buffer("pixel_std", torch.ones(3, 1, 1), False)

    @property
    def device(self):
        return self.pixel_mean.device


class StandInPredictor:
    """Proposes the inner half of the box, the box and the whole picture; a point stands for a box of 16 px around it."""

    scores = (0.5, 0.9, 0.7)
    encoded = 0  # pictures, over all predictors

    def __init__(self, sam):
        self.model, self.features = sam, None

    @property
    def device(self):
        return self.model.device

    @torch.no_grad()
    def set_image(self, image):
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        self.size = image.shape[:2]
        self.features = self.model.image_encoder(torch.full((1, SIDE // 16, SIDE // 16, WIDTH), float(image.mean()) / 255))
        type(self).encoded += 1

    def predict(self, point_coords=None, point_labels=None, box=None, multimask_output=True):
        if box is None:
            x, y = point_coords[point_labels == 1][0]
            box = np.array([x - 8, y - 8, x + 8, y + 8])
        x1, y1, x2, y2 = box.round().astype(int).clip(0)
        inner = ((x2 - x1) // 4, (y2 - y1) // 4)
        masks = np.zeros((3, *self.size), bool)
        masks[0, y1 + inner[1] : y2 - inner[1], x1 + inner[0] : x2 - inner[0]] = True
        masks[1, y1:y2, x1:x2] = True
        masks[2] = True
        chosen = slice(0, 3) if multimask_output else slice(1, 2)
        return masks[chosen], np.array(self.scores, np.float32)[chosen], None


def stand_in(monkeypatch) -> type[StandInPredictor]:
    """Put the stand-in in the place of the package; returns its predictor class, fresh."""
    predictor = type("SamPredictor", (StandInPredictor,), {})
    module = ModuleType("segment_anything")
    module.SamPredictor, module.sam_model_registry = predictor, {KIND: StandInSam}
    monkeypatch.setitem(sys.modules, "segment_anything", module)
    known(monkeypatch)
    return predictor


def random_state(sam: nn.Module | None = None, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random tensors under the names and in the shapes of a Sam, default the stand-in."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: value.shape for name, value in (sam or StandInSam()).state_dict().items()}
    return {name: (0.2 * torch.randn(shape, generator=generator)).to(dtype) for name, shape in shapes.items()}


def small_sam() -> nn.Module:
    """A Sam of the real package at small sizes: 64 px, windowed and global attention, three proposals."""
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    cells = (SIDE // 16, SIDE // 16)
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=SIDE, patch_size=16, embed_dim=WIDTH, depth=BLOCKS, num_heads=2, mlp_ratio=2.0, out_chans=WIDTH, qkv_bias=True,
            norm_layer=partial(nn.LayerNorm, eps=1e-6), use_rel_pos=True, window_size=3, global_attn_indexes=(1,),
        ),
        prompt_encoder=PromptEncoder(embed_dim=WIDTH, image_embedding_size=cells, input_image_size=(SIDE, SIDE), mask_in_chans=8),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3, transformer=TwoWayTransformer(depth=2, embedding_dim=WIDTH, num_heads=2, mlp_dim=64), transformer_dim=WIDTH,
            iou_head_depth=3, iou_head_hidden_dim=32,
        ),
    ).eval()
