"""From source rows to the rows of a UNet call."""

import pytest
import torch

from palimpsest.attention_patches.rows import Area, Feature, LayoutMismatch, expand


def tokens(rows, height, width, channels=2):
    """Tokens that say which row and cell they are."""
    grid = torch.arange(rows * height * width * channels, dtype=torch.float32).reshape(rows, height, width, channels)
    return grid, Feature(grid.flatten(1, 2), (height, width))


def test_one_source_row_goes_to_every_row():
    grid, feature = tokens(1, 2, 3)
    out = expand(feature, (None, None), 3, (4, 6), (2, 3))
    assert out.shape == (6, 6, 2) and all(torch.equal(row, feature.tensor[0]) for row in out)


def test_as_many_source_rows_as_latents_repeat_chunk_by_chunk():
    _, feature = tokens(2, 2, 3)
    out = expand(feature, (None, None, None), 2, (4, 6), (2, 3))
    assert torch.equal(out, torch.cat([feature.tensor] * 3))


def test_the_result_may_be_written_to_in_place():
    """Regression: an expanded view given to a later patch raised 'unsupported operation', a shared one was corrupted."""
    _, feature = tokens(1, 2, 3)
    before = feature.tensor.clone()
    expand(feature, (None,), 1, (4, 6), (2, 3)).add_(1)
    expand(feature, (None,), 2, (4, 6), (2, 3)).add_(1)
    expand(feature, (Area(0, 0, 4, 6),), 2, (4, 6), (2, 3)).add_(1)
    assert torch.equal(feature.tensor, before)


@pytest.mark.parametrize("rank", [3, 4])
def test_an_area_gets_its_own_part_of_the_picture(rank):
    grid, feature = tokens(1, 8, 8)
    if rank == 4:
        feature = Feature(grid.permute(0, 3, 1, 2), (8, 8))
    out = expand(feature, (None, Area(4, 8, 8, 8))[1:], 1, (16, 16), (4, 4))
    cut = grid[:, 2:6, 4:8]
    assert torch.equal(out, cut.permute(0, 3, 1, 2) if rank == 4 else cut.flatten(1, 2))


def test_whole_and_area_chunks_of_equal_size_share_a_call():
    grid, feature = tokens(2, 4, 4)
    out = expand(feature, (Area(0, 0, 4, 8), Area(4, 0, 4, 8)), 2, (8, 8), (2, 4))
    assert torch.equal(out, torch.cat([grid[:, :2].flatten(1, 2), grid[:, 2:].flatten(1, 2)]))


def test_areas_of_odd_pictures_stay_inside():
    _, feature = tokens(1, 9, 6)  # of a 35x21 latent, two levels down
    out = expand(feature, (Area(20, 10, 15, 11),), 1, (35, 21), (4, 3))
    assert out.shape == (1, 12, 2)


@pytest.mark.parametrize("batch, size", [(3, (2, 3)), (2, (2, 2)), (2, (4, 3))])
def test_what_does_not_fit_is_said(batch, size):
    _, feature = tokens(2, 2, 3)
    with pytest.raises(LayoutMismatch):
        expand(feature, (None,), batch, (4, 6), size)
