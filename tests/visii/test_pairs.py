"""Pictures before and after: what is refused, and how they are encoded."""

import pytest
import torch

from palimpsest.visii.pairs import check_pairs, encode_pairs


def images(count=1, height=16, width=24, channels=3, seed=0):
    return torch.rand(count, height, width, channels, generator=torch.Generator().manual_seed(seed))


class Vae:
    """Means of blocks of 8 pixels, four channels."""

    def __init__(self, channels=4, bad=False):
        self.channels, self.bad = channels, bad

    def encode(self, pixels):
        assert pixels.shape[-1] == 3
        latents = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8).mean(1, keepdim=True).repeat(1, self.channels, 1, 1)
        return latents * float("nan") if self.bad else latents


def test_both_sides_are_encoded_and_may_take_part_in_a_backward_pass():
    with torch.inference_mode():
        pairs = encode_pairs(Vae(), images(2, channels=4), images(2, channels=4, seed=1), 4)
    assert pairs.image.shape == pairs.target.shape == (2, 4, 2, 3) and not torch.equal(pairs.image, pairs.target)
    assert pairs.before.shape == (2, 16, 24, 3), "transparency is laid on white"
    assert not any(tensor.is_inference() for tensor in (pairs.before, pairs.after, pairs.image, pairs.target))


def test_hashes_tell_pictures_apart():
    pairs = encode_pairs(Vae(), images(2), images(2, seed=1), 4)
    assert len(set(pairs.hashes)) == 4 and pairs.hashes == encode_pairs(Vae(), images(2), images(2, seed=1), 4).hashes


@pytest.mark.parametrize(
    "before, after, words",
    [
        (images(height=16), images(height=24, seed=1), "before is 24 x 16 and after 24 x 24 pixels"),
        (images(2), images(1, seed=1), "there are 2 before and 1 after"),
        (images(), None, "after is nothing"),
        (None, images(), "before is nothing"),
        (images(), images(0), "after is"),
        (images(), images(), "are the same"),
    ],
)
def test_bad_pairs_are_one_sentence(before, after, words):
    with pytest.raises(ValueError, match=words) as refused:
        check_pairs(before, after)
    assert str(refused.value).endswith(".") and "\n" not in str(refused.value)


@pytest.mark.parametrize("vae, words", [(Vae(channels=16), r"works on 4 channels"), (Vae(bad=True), "NaN or infinite values")])
def test_bad_latents_are_one_sentence(vae, words):
    with pytest.raises(ValueError, match=words) as refused:
        encode_pairs(vae, images(), images(seed=1), 4)
    assert str(refused.value).endswith(".") and "\n" not in str(refused.value)
