"""Colors of a result brought to its reference's."""

import pytest
import torch

from palimpsest.tests.helpers.versatile import picture
from palimpsest.versatile_diffusion.color_match import match_colors


def figures(image):
    return image.mean((1, 2)), image.flatten(1, 2).std(1)


def test_mean_and_spread_become_the_references():
    image = 0.4 + 0.2 * picture(64, 48, batch=2)
    reference = 0.45 + 0.1 * picture(64, 48, seed=5)
    for got, wanted in zip(figures(match_colors(image, reference)), figures(reference)):
        assert torch.allclose(got, wanted.expand_as(got), atol=1e-5)


def test_another_size_is_compared_at_the_results():
    image, reference = 0.4 + 0.2 * picture(64, 64), 0.45 + 0.1 * picture(256, 128, seed=5)
    mean, spread = figures(match_colors(image, reference))
    assert torch.allclose(mean, figures(reference)[0], atol=5e-3) and torch.allclose(spread, figures(reference)[1], atol=5e-3)


def test_strength():
    image, reference = picture(32, 32), picture(32, 32, seed=3)
    assert match_colors(image, reference, 0.0) is image
    full, half = match_colors(image, reference), match_colors(image, reference, 0.5)
    assert torch.allclose(half, (image + full) / 2, atol=1e-6) and not torch.allclose(full, image, atol=1e-3)


def test_the_same_picture_stays_and_values_stay_in_range():
    image = picture(40, 40)
    assert torch.allclose(match_colors(image, image), image, atol=1e-5)
    loud = (torch.rand(1, 40, 40, 3, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    out = match_colors(image, loud)
    assert float(out.min()) >= 0 and float(out.max()) <= 1


def test_a_channel_without_spread_is_only_shifted():
    flat = torch.full((1, 8, 8, 3), 0.2)
    assert torch.allclose(match_colors(flat, picture(8, 8)).std((1, 2)), torch.zeros(3), atol=1e-6)


def test_batches_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="2 references for 3 pictures"):
        match_colors(picture(8, 8, batch=3), picture(8, 8, batch=2))
