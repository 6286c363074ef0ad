"""Channels of pictures, and masks over them."""

import pytest
import torch

from palimpsest.common import pictures

GREY = torch.full((64, 96, 3), 0.5)


def left_half():
    mask = torch.zeros(64, 96)
    mask[:, :48] = 1
    return mask


def test_outside_is_dark_inside_is_as_it_was_and_the_edge_is_drawn():
    lit = pictures.spotlight(GREY, left_half())
    assert torch.allclose(lit[:, :48], GREY[:, :48])
    assert torch.allclose(lit[:, 52:], GREY[:, 52:] * pictures.DIMMED)
    assert torch.allclose(lit[:, 48], torch.tensor(pictures.EDGE).expand(64, 3)), "just outside the mask, which stays visible"


def test_empty_and_full_masks_have_no_edge():
    assert torch.allclose(pictures.spotlight(GREY, torch.zeros(64, 96)), GREY * pictures.DIMMED)
    assert torch.allclose(pictures.spotlight(GREY, torch.ones(64, 96)), GREY)


def test_grey_is_repeated_and_transparency_is_white():
    grey = torch.rand(1, 4, 5, 1)
    assert torch.equal(pictures.rgb(grey), grey.repeat(1, 1, 1, 3))
    color = torch.rand(1, 4, 5, 4)
    color[..., 3] = 0
    assert torch.equal(pictures.rgb(color), torch.ones(1, 4, 5, 3))
    color[..., 3] = 1
    assert torch.equal(pictures.rgb(color), color[..., :3])
    with pytest.raises(ValueError, match="1, 3 or 4 channels, but this one has 2: connect a plain IMAGE.$"):
        pictures.rgb(torch.zeros(1, 4, 4, 2))
