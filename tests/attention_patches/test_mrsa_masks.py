"""From painted masks to tokens: both policies against plain indexing and means, and the sizes against the host's UNet."""

import pytest
import torch

from palimpsest.attention_patches.mrsa_masks import (
    AREA, CROP, PUBLISHED, SQUASH, WHOLE, Fit, attention_sizes, fit, layer_mask, match, prepare_mask, resize_picture, select,
)
from palimpsest.tests.helpers.models import tiny_cond, tiny_sd15
from palimpsest.tests.helpers.sampling import ksampler


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def blob(height, width, top, left, bottom, right):
    mask = torch.zeros(height, width)
    mask[top:bottom, left:right] = 1
    return mask


def whole(mask):
    return Fit(0, 0, *mask.shape, tuple(mask.shape))


# -- how pictures are fitted ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("picture, size, expected", [
    ((300, 512), (512, 512), (0, 106, 300, 300)), ((512, 300), (512, 512), (106, 0, 300, 300)), ((512, 512), (512, 512), (0, 0, 512, 512)),
    ((600, 600), (512, 768), (100, 0, 400, 600)), ((1, 7), (512, 512), (0, 3, 1, 1)), ((101, 333), (64, 64), (0, 116, 101, 101)),
])
def test_a_crop_is_the_largest_part_of_the_wanted_aspect_in_the_middle(picture, size, expected):
    assert fit(picture, size, CROP) == Fit(*expected, size)


@pytest.mark.parametrize("left, right, start", [(400, 450, 212), (0, 30, 0), (100, 180, 0), (230, 250, 90), (0, 512, 106), (490, 512, 212)])
def test_a_crop_follows_the_mask_and_stays_in_the_picture(left, right, start):
    assert fit((300, 512), (512, 512), CROP, blob(300, 512, 50, left, 100, right)).left == start
    assert fit((512, 300), (512, 512), CROP, blob(300, 512, 50, left, 100, right).T).top == start


def test_faint_grey_does_not_move_the_crop():
    mask = blob(300, 512, 50, 400, 100, 450)
    assert fit((300, 512), (512, 512), CROP, mask + 0.3 * blob(300, 512, 0, 0, 300, 20)).left == 212
    assert fit((300, 512), (512, 512), CROP, torch.zeros(300, 512)).left == 106


@pytest.mark.parametrize("picture", [(300, 512), (900, 600), (64, 1000), (512, 512), (33, 47)])
def test_whole_keeps_the_picture_its_aspect_and_the_amount_of_pixels(picture):
    chosen = fit(picture, (512, 512), WHOLE)
    height, width = chosen.size
    assert chosen[:4] == (0, 0, *picture) and height % 8 == width % 8 == 0
    assert abs(height * width / 512**2 - 1) < 0.06 and abs((height / width) / (picture[0] / picture[1]) - 1) < 0.06


def test_squash_takes_all_of_it_and_an_unknown_way_is_refused():
    assert fit((300, 512), (512, 640), SQUASH) == Fit(0, 0, 300, 512, (512, 640))
    with pytest.raises(ValueError, match='no way to resize called "stretch": choose one of crop, whole, squash'):
        fit((300, 512), (512, 512), "stretch")


def test_a_squashed_picture_is_made_of_nearest_pixels():
    image = random(1, 300, 512, 3)
    rows, columns = torch.arange(512) * 300 // 512, torch.arange(256) * 2
    assert torch.equal(resize_picture(image, fit((300, 512), (512, 256), SQUASH), SQUASH), image[:, rows][:, :, columns])


@pytest.mark.parametrize("resize", [CROP, WHOLE])
@pytest.mark.parametrize("picture", [(300, 512), (97, 61), (2000, 1500)])
def test_picture_and_mask_stay_together(picture, resize):
    """A picture that is its own mask: what the mask keeps is bright, what it drops is dark."""
    height, width = picture
    mask = blob(height, width, height // 5, width // 2, height // 2, width * 7 // 8)
    chosen = fit(picture, (256, 192), resize, mask)
    resized = resize_picture(mask[None, ..., None].expand(1, *picture, 3), chosen, resize)
    prepared = prepare_mask(mask, chosen)
    assert resized.shape == (1, *chosen.size, 3) and prepared.shape == chosen.size and 0 <= resized.min() and resized.max() <= 1
    assert float((resized[0, ..., 0] - prepared).abs().mean()) < 0.02 and 0.05 < float(prepared.mean()) < 0.9
    kept = layer_mask(prepared, (32, 24)).bool()
    cells = torch.nn.functional.interpolate(resized.movedim(-1, 1), size=(32, 24), mode="area")[0, 0]
    assert float(cells[kept].min()) > 0.4 and float(cells[~kept].max()) < 0.6


def test_a_constant_picture_stays_constant():
    image = torch.full((1, 77, 131, 3), 0.25)
    assert torch.allclose(resize_picture(image, fit((77, 131), (64, 96)), CROP), torch.full((1, 64, 96, 3), 0.25), atol=1e-5)


# -- masks ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("height, width", [(300, 300), (300, 512), (512, 512), (64, 100), (1000, 777)])
def test_published_masks_are_nearest_pixels_that_are_exactly_255(height, width):
    grey = torch.randint(250, 256, (height, width), generator=torch.Generator().manual_seed(1))
    prepared = prepare_mask(grey / 255, Fit(0, 0, height, width, (512, 512)), PUBLISHED)
    expected = (grey[torch.arange(128) * height // 128][:, torch.arange(128) * width // 128] == 255).float()
    assert prepared.shape == (128, 128) and torch.equal(prepared, expected) and 0.05 < float(expected.mean()) < 0.5
    for h, w in ((64, 64), (32, 32), (16, 16), (8, 8), (12, 12), (64, 48), (24, 40)):
        assert torch.equal(layer_mask(prepared, (h, w), PUBLISHED), expected[torch.arange(h) * 128 // h][:, torch.arange(w) * 128 // w])


def test_area_masks_keep_tokens_whose_cell_is_half_covered():
    mask = (random(64, 96) > 0.5).float()
    prepared = prepare_mask(mask, whole(mask))
    assert torch.equal(prepared, mask)
    for h, w in ((32, 48), (16, 24), (8, 12), (64, 96)):
        cells = mask.reshape(h, 64 // h, w, 96 // w).mean((1, 3))
        assert torch.equal(layer_mask(prepared, (h, w)), (cells >= 0.5).float())
        assert torch.equal(layer_mask(prepared, (h, w), AREA, 0.25), (cells >= 0.25).float())
        assert torch.equal(layer_mask(prepared, (h, w), AREA, 0.0), (cells > 0).float())
    assert 0 < float(layer_mask(prepared, (8, 12)).mean()) < 1


@pytest.mark.parametrize("size", [(17, 23), (9, 12), (5, 6), (3, 3), (1, 1)])
@pytest.mark.parametrize("policy", [AREA, PUBLISHED])
def test_odd_sizes_full_and_empty_masks(size, policy):
    full = torch.ones(136, 184)
    for threshold in (0.0, 0.5, 1.0):
        assert torch.equal(layer_mask(prepare_mask(full, whole(full), policy), size, policy, threshold), torch.ones(size))
        assert not layer_mask(prepare_mask(full * 0, whole(full), policy), size, policy, threshold).any()
    half = blob(136, 184, 0, 0, 136, 92)
    kept = layer_mask(prepare_mask(half, whole(half), policy), size, policy)
    assert abs(float(kept.mean()) - 0.5) <= 0.5 / size[1] + 1e-6


def test_a_mask_of_another_size_is_brought_to_its_picture():
    mask = blob(64, 64, 16, 16, 48, 48)
    assert torch.equal(match(mask, (64, 64)), mask)
    assert torch.equal(match(mask, (128, 256)), mask.repeat_interleave(2, 0).repeat_interleave(4, 1))
    soft, hard = match(blob(64, 64, 15, 15, 48, 48), (32, 32)), match(blob(64, 64, 15, 15, 48, 48), (32, 32), PUBLISHED)
    assert float(soft[7, 10]) == 0.5 and set(hard.unique().tolist()) == {0.0, 1.0}


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match='no mask policy "soft": choose one of area, 255 only'):
        prepare_mask(torch.ones(8, 8), whole(torch.ones(8, 8)), "soft")


# -- tokens -----------------------------------------------------------------------------------------------------------------

def test_selection_is_row_by_row_and_weighted():
    mask = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    found = select(mask, 2.5)
    assert found.indices.tolist() == [1, 2, 5] and found.bias.tolist() == [2.5] * 3 and found.weighted.tolist() == [0, 2.5, 2.5, 0, 0, 2.5]
    assert select(mask, -1.0).bias.tolist() == [-1] * 3
    grey = select(torch.tensor([[0.0, 0.25, 1.0]]), 2.0)
    assert grey.indices.tolist() == [1, 2] and grey.bias.tolist() == [0.5, 2.0]
    assert len(select(mask, 0.0).indices) == len(select(mask * 0, 3.0).indices) == 0


@pytest.mark.parametrize("latent", [(16, 16), (17, 23), (9, 24)])
def test_sizes_are_those_at_which_the_unet_attends(latent):
    model = tiny_sd15(channel_mult=(1, 1, 1, 1)).clone()
    seen = []

    def look(n, context, value, extra_options):
        seen.append(tuple(extra_options["activations_shape"][-2:]))
        assert n.shape[1] == seen[-1][0] * seen[-1][1]
        return n, context, value

    model.set_model_attn1_patch(look)
    ksampler(model, torch.zeros(1, 4, *latent), tiny_cond(), tiny_cond(seed=1), steps=1)
    assert list(dict.fromkeys(seen))[:4] == attention_sizes(latent) and set(seen) == set(attention_sizes(latent))


def test_levels_halve_and_round_up():
    assert attention_sizes((64, 64)) == [(64, 64), (32, 32), (16, 16), (8, 8)]
    assert attention_sizes((65, 33), 3) == [(65, 33), (33, 17), (17, 9)]
