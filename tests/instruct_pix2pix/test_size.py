"""The size rule in whole numbers, and pictures and masks brought to it."""

from fractions import Fraction

import pytest
import torch

from palimpsest.instruct_pix2pix.size import edit_size, fit_mask, fit_picture, kept_size

# what the authors' program gives where floating point does not misround it
PUBLISHED = {(1024, 768): (512, 384), (1920, 1080): (512, 320), (1000, 390): (640, 256), (600, 590): (512, 512), (700, 467): (512, 384), (300, 200): (576, 384),
             (2000, 500): (512, 128), (640, 513): (512, 448), (512, 512): (512, 512)}


@pytest.mark.parametrize("given", PUBLISHED)
def test_published_sizes(given):
    assert edit_size(*given) == PUBLISHED[given]
    assert edit_size(*given[::-1]) == PUBLISHED[given][::-1]


def test_no_size_is_misrounded():
    """Regression of the published program: 277 x 319 comes out 64 px narrower there. Against exact fractions, over a grid of sizes."""
    assert edit_size(277, 319) == (448, 512)
    for width in range(256, 1400, 37):
        for height in range(256, 1400, 41):
            factor = Fraction(512, max(width, height))
            cells = Fraction(min(width, height)) * factor / 64
            short = -((-cells.numerator) // cells.denominator) * 64
            scale = Fraction(short, min(width, height))
            sides = [int(side * scale / 64) * 64 for side in (width, height)]
            assert edit_size(width, height) == tuple(sides)


def test_other_sides_and_refusals():
    assert edit_size(1600, 1200, 1024) == (1024, 768) and edit_size(128, 128, 128) == (128, 128)
    with pytest.raises(ValueError, match="longer_side is 32 px"):
        edit_size(512, 512, 32)
    with pytest.raises(ValueError, match="5000 x 100 px is too narrow.*3200 px long"):
        edit_size(5000, 100)
    assert kept_size(517, 300, 8) == (512, 296)
    with pytest.raises(ValueError, match="too small"):
        kept_size(7, 300, 8)


def stripes(height, width):
    """Columns of their own brightness, rows too."""
    image = torch.zeros(1, height, width, 3)
    image[..., 0] = torch.linspace(0, 1, width)
    image[..., 1] = torch.linspace(0, 1, height)[:, None]
    return image


def test_a_picture_keeps_its_middle_and_its_shape():
    fitted = fit_picture(stripes(300, 900), (512, 256), True)
    assert fitted.shape == (1, 256, 512, 3)
    # 900 x 300 into 2 : 1 loses a sixth on either side and nothing above and below
    assert abs(float(fitted[0, 128, 0, 0]) - 1 / 6) < 0.01 and abs(float(fitted[0, 128, -1, 0]) - 5 / 6) < 0.01
    assert float(fitted[0, 0, 256, 1]) < 0.01 and float(fitted[0, -1, 256, 1]) > 0.99


def test_what_need_not_be_resampled_is_not():
    image = torch.rand(2, 64, 128, 3)
    assert torch.equal(fit_picture(image, (128, 64), True), image)
    assert torch.equal(fit_picture(image, (120, 64), False), image[:, :, 4:124])


def test_resampling_rounds():
    """Regression: the host's Lanczos cuts fractions of 1/255 off, which darkens."""
    image = torch.full((1, 100, 100, 3), 100.7 / 255)
    assert torch.equal((fit_picture(image, (64, 64), True) * 255).round(), torch.full((1, 64, 64, 3), 101.0))


@pytest.mark.parametrize("shape", [(300, 900), (150, 450), (64, 64)])
def test_a_mask_follows_its_picture_whatever_its_own_size(shape):
    mask = torch.zeros(1, *shape)
    mask[:, :, shape[1] // 2 :] = 1
    fitted = fit_mask(mask, (900, 300), (512, 256), True)
    assert fitted.shape == (1, 256, 512) and float(fitted[0, :, :250].max()) == 0 and float(fitted[0, :, 262:].min()) == 1
    kept = fit_mask(mask, (900, 300), (896, 296), False)
    assert kept.shape == (1, 296, 896) and float(kept[0, :, :430].max()) == 0 and float(kept[0, :, 466:].min()) == 1
