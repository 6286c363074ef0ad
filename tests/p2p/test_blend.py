"""P2P Local Blend: where the words are, user masks, first-order samplers only, masks of each step."""

import pytest
import torch

from palimpsest.p2p.apply import Settings, apply_p2p
from palimpsest.p2p.blend import blend_mask, map_halvings
from palimpsest.p2p.local import add_blend
from palimpsest.tests.helpers.sampling import ksampler

SOURCE, SWAP = "a cat on a red sofa", "a dog on a red sofa"
ZERO = torch.zeros(1, 4, 16, 16)


def blend(model, words="dog", before="cat", subtract="", thresholds=(0.3, 0.3), start=0.2, pool=True, mask=None):
    return add_blend(model, words, before, subtract, thresholds, start, pool, mask)


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def found(model, clip):
    return apply_p2p(model, clip, SOURCE, SWAP, Settings())


def test_mask_from_a_known_map():
    maps = torch.zeros(1, 4, 4)
    maps[0, 1, 1], maps[0, 3, 3] = 2.0, 0.5
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[2:4, 2:4] = True
    assert torch.equal(blend_mask(maps, (8, 8), 0.3, False)[0, 0], expected)
    expected[0:6, 0:6] = True  # the 3 x 3 maximum
    assert torch.equal(blend_mask(maps, (8, 8), 0.3, True)[0, 0], expected)
    assert bool(blend_mask(maps, (8, 8), 0.2, False)[0, 0, 6:, 6:].all())
    assert not bool(blend_mask(torch.zeros(1, 4, 4), (8, 8), 0.3, True).any()), "no such word, no mask"


@pytest.mark.parametrize("latent, halvings", [((64, 64), 2), ((64, 96), 2), ((32, 32), 1), ((31, 64), 0), ((48, 48), 1), ((16, 16), 0), ((8, 8), 0), ((4, 4), 0)])
def test_word_maps_are_read_at_a_quarter_but_never_below_sixteen(latent, halvings):
    assert map_halvings(latent) == halvings


@pytest.mark.parametrize("stored", [False, True])
def test_an_empty_mask_gives_the_source_and_a_full_one_the_unblended_edit(model, clip, negative, trajectory, start, stored):
    found = apply_p2p(model, clip, SOURCE, SWAP, Settings(), trajectory=trajectory if stored else None)
    latent, rest = (start, {}) if stored else (ZERO, {})
    unblended = ksampler(found.model, latent, found.positive, negative, **rest)
    nowhere, _ = blend(found.model, mask=torch.zeros(1, 64, 64), start=0.0)
    everywhere, _ = blend(found.model, mask=torch.ones(1, 64, 64), start=0.0)
    assert relative(ksampler(everywhere, latent, found.positive, negative, **rest), unblended) < 1e-6
    result = ksampler(nowhere, latent, found.positive, negative, **rest)
    if stored:
        expected = model.get_model_object("latent_format").process_out(trajectory.latents[0])
    else:
        expected = ksampler(model, ZERO, found.source, negative)
    assert relative(result, expected) < 1e-5


def test_outside_a_user_mask_the_latent_is_the_sources(model, clip, found, negative):
    mask = torch.zeros(1, 128, 128)
    mask[:, :, 64:] = 1.0
    masked, results = blend(found.model, mask=mask, start=0.0)
    out = ksampler(masked, ZERO, found.positive, negative)
    source, edit = ksampler(model, ZERO, found.source, negative), ksampler(found.model, ZERO, found.positive, negative)
    assert relative(out[..., :8], source[..., :8]) < 1e-5
    assert relative(out[..., 8:], source[..., 8:]) > 1e-3 and relative(out, edit) > 1e-4
    masks = results.read()
    assert sorted(masks) == [0, 1, 2, 3] and float(masks[0][..., :8].max()) == 0 and float(masks[0][..., 8:].min()) == 1


def test_words_give_a_mask_per_step_after_the_start(model, found, negative):
    blended, results = blend(found.model, start=0.5)
    out = ksampler(blended, ZERO, found.positive, negative)
    masks = results.read()
    assert sorted(masks) == [2, 3] and all(mask.shape == (1, 1, 16, 16) for mask in masks.values())
    assert 0 < float(masks[3].mean()) <= 1 and torch.isfinite(out).all()
    higher, other = blend(found.model, start=0.5, thresholds=(0.9, 0.3), pool=False)
    ksampler(higher, ZERO, found.positive, negative)
    assert float(other.read()[3].mean()) < float(masks[3].mean())
    without, cut = blend(found.model, start=0.5, subtract="sofa")
    ksampler(without, ZERO, found.positive, negative)
    assert bool((cut.read()[2] <= masks[2]).all()) and float(cut.read()[2].mean()) < float(masks[2].mean())


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "euler_ancestral"])
def test_other_samplers_are_refused_by_name(found, negative, trajectory, model, clip, start, sampler):
    stored = apply_p2p(model, clip, SOURCE, SWAP, Settings(), trajectory=trajectory)
    blended, _ = blend(stored.model)
    with pytest.raises(ValueError, match=f"needs a sampler of first order, but the sampler is {sampler}"):
        ksampler(blended, start, stored.positive, negative, sampler=sampler)


def test_bad_input(model, found):
    with pytest.raises(ValueError, match="the connected model has none"):
        blend(model)
    with pytest.raises(ValueError, match="finds no bird, horse in the edit prompt, which has a, dog, on, red, sofa"):
        blend(found.model, words="dog, bird, horse")
    with pytest.raises(ValueError, match="finds no dog in the source prompt"):
        blend(found.model, before="dog")
    with pytest.raises(ValueError, match="finds no moon in the prompts"):
        blend(found.model, subtract="moon")
    with pytest.raises(ValueError, match="neither words nor a mask"):
        blend(found.model, words="")


def test_nothing_of_a_run_is_left(found, negative):
    blended, _ = blend(found.model)
    first = ksampler(blended, ZERO, found.positive, negative)
    assert torch.equal(ksampler(blended, ZERO, found.positive, negative), first)
