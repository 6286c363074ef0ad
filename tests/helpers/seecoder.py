"""SeeCoder files with random weights, named and shaped as the official ones."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ...seecoder.sizes import PREFIX, Sizes, expected_shapes
from ...seecoder.swin import relative_index

SMALL = Sizes(embed=32, depths=(2, 2, 2, 2), heads=(1, 2, 4, 8), window=6, mlp=(128, 256, 512, 1024), width=96, decoder_hidden=80, decoder_layers=2,
              queries=148, query_hidden=112, query_layers=9, position=False)
OFFICIAL = Sizes(embed=192, depths=(2, 2, 18, 2), heads=(6, 12, 24, 48), window=12, mlp=(768, 1536, 3072, 6144), width=768, decoder_hidden=1024, decoder_layers=6,
                 queries=148, query_hidden=2048, query_layers=9, position=False)


def small(position: bool = False, **changes) -> Sizes:
    return replace(SMALL, position=position, **changes)


def random_state(sizes: Sizes, seed: int = 0, prefix: str = PREFIX, dtype: torch.dtype = torch.float32, buffers: bool = True) -> dict[str, torch.Tensor]:
    """A state dict of these sizes whose layers keep the variance, index buffers included."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in expected_shapes(sizes).items():
        if name.endswith(("level_embed", "level_embed.weight", "query.weight", "embedding.weight", "bias_table")):
            value = torch.randn(shape, generator=generator) * 0.7
        elif len(shape) > 1:
            value = torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
        else:
            value = 0.1 * torch.randn(shape, generator=generator) + float(name.endswith("weight"))
        state[prefix + name] = value.to(dtype)
    if buffers:
        for stage, depth in enumerate(sizes.depths):
            for block in range(depth):
                state[f"{prefix}imencoder.layers.{stage}.blocks.{block}.attn.relative_position_index"] = relative_index(sizes.window)
    return state


def random_picture(height: int, width: int, batch: int = 1, channels: int = 3, seed: int = 0) -> torch.Tensor:
    """IMAGE [batch, height, width, channels] in 0..1 with structure at several scales."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.zeros(batch, channels, height, width)
    for cells in (2, 7, 31):
        coarse = torch.rand(batch, channels, cells, cells, generator=generator)
        out += torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)
    return (out / 3).clamp(0, 1).movedim(1, -1).contiguous()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative L2 error of a against b."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def empty_folders(monkeypatch, models_dir) -> None:
    """Point the host at a models folder of the test's own, without our folders in the registry and without the shipped encoder."""
    import folder_paths

    from ...seecoder import files

    monkeypatch.setattr(folder_paths, "models_dir", str(models_dir))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {k: v for k, v in folder_paths.folder_names_and_paths.items() if k not in files.FOLDERS})
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(files, "SHIPPED", {})
