"""The mask over the picture."""

import torch

from palimpsest.sam import preview
from palimpsest.sam.prompts import Prompt

GREY = torch.full((64, 96, 3), 0.5)


def left_half():
    mask = torch.zeros(64, 96)
    mask[:, :48] = 1
    return mask


def test_box_and_points_are_drawn_in_their_colors():
    prompt = Prompt((10.0, 12.0, 60.0, 40.0), ((30.0, 20.0), (80.0, 50.0)), (True, False))
    drawn = (preview.draw_prompt(GREY, prompt) * 255).round().int()
    for x, y in ((10, 12), (59, 12), (59, 39), (10, 30)):
        assert tuple(drawn[y, x].tolist()) == preview.BOX
    assert tuple(drawn[20, 30].tolist()) == preview.WANTED and tuple(drawn[50, 80].tolist()) == preview.UNWANTED
    assert drawn[5, 5].tolist() == [128] * 3


def test_previews_keep_size_and_order():
    pictures = torch.stack([GREY, GREY * 0.5])
    masks = torch.stack([left_half(), 1 - left_half()])
    out = preview.previews(pictures, masks, Prompt(None, ((2.0, 2.0),), (True,)))
    assert out.shape == (2, 64, 96, 3) and out.dtype == torch.float32 and 0 <= out.min() and out.max() <= 1
    assert abs(float(out[0, 60, 20, 0]) - 0.5) < 0.01 and abs(float(out[0, 60, 90, 0]) - 0.15) < 0.01
    assert abs(float(out[1, 60, 90, 0]) - 0.25) < 0.01
