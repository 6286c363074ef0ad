"""Reference concepts: encoding, chaining, what is refused, and what people are shown."""

import pytest
import torch

from palimpsest.attention_patches import mrsa_view
from palimpsest.attention_patches.mrsa_concept import Concept, Concepts, describe, encode_concept, latent_concept, one_mask
from palimpsest.attention_patches.mrsa_masks import AREA, CROP, PUBLISHED, SQUASH, WHOLE
from palimpsest.mini import checkpoint
from palimpsest.mini.storage import read_weights
from palimpsest.tests.helpers.models import tiny_cond

COND = tiny_cond()


@pytest.fixture(scope="module")
def vae():
    return checkpoint.load_vae(read_weights(checkpoint.WEIGHTS / "autoencoder.safetensors")[0])


class Pool:
    """Stands in for a VAE where only its calls matter: the mean of every 8 x 8 pixels."""

    def __init__(self):
        self.encoded = []

    def encode(self, pixels):
        self.encoded.append(pixels)
        return torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8).repeat(1, 2, 1, 1)[:, :4]

    def decode(self, latent):
        return torch.nn.functional.interpolate(latent[:, :3], scale_factor=8).movedim(1, -1)


def picture(height=96, width=160, channels=3, batch=1, seed=0):
    return torch.rand(batch, height, width, channels, generator=torch.Generator().manual_seed(seed))


def mask(height=96, width=160, top=0, left=80, bottom=96, right=160):
    out = torch.zeros(1, height, width)
    out[:, top:bottom, left:right] = 1
    return out


def encode(image=None, vae=None, of=None, weight=3.0, conditioning=COND, size=(128, 128), **options):
    return encode_concept(picture() if image is None else image, vae or Pool(), mask() if of is None else of, conditioning, weight, size=size, **options)


def refusal(message, call, *args, **options):
    with pytest.raises(ValueError, match=message) as error:
        call(*args, **options)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


@torch.inference_mode()
def test_a_real_vae_encodes_what_is_cut_out(vae):
    image = picture(96, 160)
    concept, chosen = encode(image, vae)
    assert (chosen.top, chosen.left, chosen.height, chosen.width) == (0, 64, 96, 96), "the right part, where the mask is"
    assert concept.latent.shape == (1, 4, 16, 16) and concept.size == (16, 16) and concept.picture.shape == (128, 128, 3)
    assert torch.equal(concept.latent, vae.encode(concept.picture[None]).float())
    assert concept.sizes == [(16, 16), (8, 8), (4, 4), (2, 2)]
    # masked from column 80 of 160, cut at 64: from a sixth of the width on
    assert concept.layer_mask((16, 16)).sum(1).tolist() == [13.0] * 16 and concept.selection((8, 8)).bias.unique().tolist() == [3.0]


@pytest.mark.parametrize("resize, size", [(CROP, (16, 24)), (WHOLE, (15, 25)), (SQUASH, (16, 24))])
@pytest.mark.parametrize("policy", [AREA, PUBLISHED])
def test_every_way_to_resize_and_every_mask_policy(resize, size, policy):
    concept, chosen = encode(resize=resize, policy=policy, size=(128, 192))
    assert concept.size == size and concept.picture.shape == (size[0] * 8, size[1] * 8, 3) and concept.policy == policy
    assert concept.mask.shape == ((128, 128) if policy == PUBLISHED else tuple(concept.picture.shape[:2]))
    share = float(mask()[0, :, chosen.left : chosen.left + chosen.width].mean())
    for level in concept.sizes:
        assert concept.layer_mask(level).shape == level and abs(float(concept.layer_mask(level).mean()) - share) <= 1 / level[1]


def test_the_mask_may_have_another_size_than_the_picture():
    same, _ = encode()
    small, _ = encode(of=mask(48, 80, 0, 40, 48, 80))
    assert torch.equal(same.mask, small.mask)


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_transparent_pictures(channels):
    pool = Pool()
    encode(picture(channels=channels), pool)
    assert pool.encoded[0].shape == (1, 128, 128, 3)


def test_concepts_chain_in_order():
    first, second, third = (encode(weight=float(i))[0] for i in range(3))
    chain = Concepts().joined(first).joined(second)
    longer = chain.joined(third)
    assert list(longer) == [first, second, third] and len(chain) == 2, "the shorter chain stays as it was"
    assert not Concepts() and longer != Concepts(longer.items), "compared by identity"


def test_a_concept_keeps_its_own_copies():
    pool, image, of = Pool(), picture(), mask()
    concept, _ = encode(image, pool, of)
    before = concept.latent.clone(), concept.mask.clone(), concept.picture.clone()
    for given in (pool.encoded[0], image, of):
        given.zero_()
    assert all(torch.equal(kept, now) for kept, now in zip(before, (concept.latent, concept.mask, concept.picture)))
    with pytest.raises(AttributeError):
        concept.weight = 1.0


def test_a_latent_is_used_as_it_is():
    samples = torch.randn(1, 4, 10, 14, generator=torch.Generator().manual_seed(0))
    concept = latent_concept({"samples": samples}, mask(), COND, 2.0)
    assert torch.equal(concept.latent, samples) and concept.picture.shape == (80, 112, 3) and concept.picture.unique().tolist() == [0.5]
    assert concept.layer_mask((10, 14)).sum(1).tolist() == [7.0] * 10
    decoded = latent_concept({"samples": samples}, mask(), COND, 2.0, vae=Pool())
    assert torch.equal(decoded.picture, Pool().decode(samples)[0])


def test_what_is_no_concept_is_refused_before_the_vae_runs():
    class Never:
        encode = decode = staticmethod(lambda tensor: pytest.fail("the VAE ran"))

    refusal("image holds 2: chain one MRSA Concept per picture", encode, picture(batch=2), Never())
    refusal("one mask, but there are 3", encode, None, Never(), mask().expand(3, -1, -1))
    refusal("picture_prompt conditioning is empty", encode, None, Never(), conditioning=[])
    refusal("limited to an area or a mask", encode, None, Never(), conditioning=[[COND[0][0], {"area": (4, 4, 0, 0)}]])
    refusal("picture_prompt conditioning carries hooks", encode, None, Never(), conditioning=[[COND[0][0], {"hooks": object()}]])
    refusal("no mask policy", encode, None, Never(), policy="soft")
    refusal("no way to resize", encode, None, Never(), resize="stretch")
    refusal("has 1, 3 or 4 channels", encode, picture(channels=2), Never())
    latents = {"several": torch.zeros(2, 4, 8, 8), "video": torch.zeros(1, 4, 3, 8, 8), "empty": torch.zeros(1, 4, 0, 8)}
    refusal("there are 2 latents", latent_concept, {"samples": latents["several"]}, mask(), COND, 3.0, vae=Never())
    for name in ("video", "empty"):
        refusal(r"is the latent of a picture, \[1, channels, height, width\], but this one is", latent_concept, {"samples": latents[name]}, mask(), COND, 3.0, vae=Never())


def test_values_that_are_not_finite_are_refused():
    class Broken(Pool):
        def encode(self, pixels):
            return super().encode(pixels) / 0

    refusal("latent holds NaN or infinite values.*--fp32-vae", encode, torch.zeros(1, 96, 160, 3), Broken())
    refusal("weight of a concept is an ordinary number", encode, weight=float("inf"))
    refusal("mask holds NaN", encode, of=mask() * float("nan"))


def test_the_report_says_what_was_cut_and_kept():
    concept, chosen = encode(weight=2.5)
    lines = describe(concept, 2, chosen, (96, 160)).splitlines()
    assert lines[0] == "concept 2: 128 x 128 px, weight 2.5, from 160 x 96 px cut to 96 x 96 at 64, 0"
    assert lines[1] == "tokens kept: 208 of 256 at 16 x 16, 56 of 64 at 8 x 8, 12 of 16 at 4 x 4, 4 of 4 at 2 x 2" and len(lines) == 2
    whole, chosen = encode(picture(96, 96), of=mask(96, 96, 0, 0, 96, 96))
    assert describe(whole, 1, chosen, (96, 96)).splitlines()[0] == "concept 1: 128 x 128 px, weight 3, from 96 x 96 px"


def test_the_report_says_what_is_stretched_and_which_prompt_runs():
    concept, chosen = encode()
    assert "mask: 64 x 64 px, stretched to the picture's 160 x 96" in describe(concept, 1, chosen, (96, 160), mask=(64, 64)).splitlines()
    assert all("stretched" not in describe(concept, 1, chosen, (96, 160), mask=size) for size in ((96, 160), (48, 80), (47, 79)))
    latent = latent_concept({"samples": torch.zeros(1, 4, 10, 14)}, mask(), COND, 2.0)
    assert "mask: 160 x 96 px, stretched to the picture's 112 x 80" in describe(latent, 1, mask=(96, 160))
    several = encode(conditioning=[*COND, [COND[0][0], {"area": (4, 4, 0, 0)}], *COND])[0]
    assert "prompt: one entry at a time is run, the first of 2 usable ones that is active at the step (of 3 connected)" in describe(several, 1)


def test_a_concept_without_effect_says_so(caplog):
    with caplog.at_level("WARNING", logger="palimpsest"):
        assert describe(encode(of=mask() * 0)[0], 1).splitlines()[-1].startswith("no effect: its mask keeps no token at any resolution")
        assert describe(encode(weight=0.0)[0], 1).splitlines()[-1] == "no effect: its weight is 0"
    told = [record.getMessage() for record in caplog.records if record.name == "palimpsest"]
    assert len(told) == 2 and "concept 1 has no effect" in told[0]
    thin = mask(96, 160, 40, 100, 46, 110)
    assert "lower mask_threshold" in describe(encode(of=thin)[0], 1) and "lower mask_threshold" not in describe(encode(of=thin, threshold=0.0)[0], 1)


def test_the_sheet_shows_the_picture_and_every_resolution():
    white = torch.ones(1, 96, 160, 3)
    concept, _ = encode(white)
    sheet = mrsa_view.sheet(concept)
    # five tiles of 192 px with one pixel of frame on either side
    assert sheet.shape[0] == 1 and sheet.shape[2] == 5 * 194 and sheet.shape[3] == 3 and 0 <= sheet.min() and sheet.max() <= 1
    tiles = [sheet[0, 1:193, 194 * i + 1 : 194 * i + 193] for i in range(5)]
    assert tiles[0].min() > 0.99
    # at 16 x 16, three columns of twelve pixels are dropped; at 2 x 2 none
    assert abs(float(tiles[1][96, 15, 0]) - 0.3) < 0.05 and tiles[1][96, 60:].min() > 0.9
    assert tiles[4].min() > 0.99


def test_the_sheet_of_an_odd_latent_keeps_its_aspect():
    sheet = mrsa_view.sheet(latent_concept({"samples": torch.zeros(1, 4, 9, 17)}, mask(), COND, 2.0))
    assert sheet.shape[2] == 5 * 194 and 90 < sheet.shape[1] < 140


def test_one_mask_takes_both_forms():
    assert one_mask(torch.full((4, 6), 2.0)).tolist() == [[1.0] * 6] * 4
    assert one_mask(torch.full((1, 4, 6), 0.5)).shape == one_mask(torch.full((1, 1, 4, 6), 0.5)).shape == (4, 6)


def test_concepts_are_of_one_form():
    with pytest.raises(ValueError, match="is the latent of a picture"):
        Concept(torch.zeros(4, 8, 8), torch.ones(64, 64), COND, 1.0, torch.zeros(64, 64, 3))
