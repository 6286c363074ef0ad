"""Maps and features as views: right numbers, and a picture that stays bit for bit the same."""

import pytest
import torch

from palimpsest.attention_patches.blocks import Point
from palimpsest.attention_patches.heat import colored, over, sheet
from palimpsest.attention_patches.looking import collect_features, collect_maps
from palimpsest.attention_patches.maps import QUERIES_AT_ONCE, average_maps, principal_components, word_maps
from palimpsest.tests.helpers.prompts import WordClip
from palimpsest.tests.helpers.sampling import ksampler

ZERO = torch.zeros(1, 4, 16, 16)
PROMPT = "a cat on a sofa"


@pytest.fixture(scope="module")
def clip():
    return WordClip()


def encoded(clip, text):
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def test_word_maps_are_the_softmax_columns_averaged_over_heads():
    generator = torch.Generator().manual_seed(0)
    heads, dim = 2, 3
    q, k = torch.randn(2, QUERIES_AT_ONCE + 5, heads * dim, generator=generator), torch.randn(2, 6, heads * dim, generator=generator)
    words = torch.zeros(2, 6, 2)
    words[:, 1, 0] = words[:, 4, 0] = words[:, 2, 1] = 1.0
    expected = torch.zeros(2, q.shape[1], 2, dtype=torch.float64)
    for head in range(heads):
        part = slice(head * dim, (head + 1) * dim)
        full = torch.softmax(q[..., part].double() @ k[..., part].double().mT / dim**0.5, -1)
        expected += torch.stack([full[..., 1] + full[..., 4], full[..., 2]], -1) / heads
    assert (word_maps(q, k, words, heads) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_collecting_maps_changes_no_bit_and_counts_every_noise_level_once(model, clip, negative, sampler):
    positive = encoded(clip, PROMPT)
    watched, results, names = collect_maps(model, clip, PROMPT, [], "preset default", 0.0, 1.0)
    assert names == ["a", "cat", "on", "sofa"]
    out = ksampler(watched, ZERO, positive, negative, sampler=sampler)
    assert torch.equal(out, ksampler(model, ZERO, positive, negative, sampler=sampler))
    found = results.read()
    assert len(found) == 4 + 6 and all(steps == 4 for _, steps, _ in found.values())
    means = average_maps(found)
    assert means.shape == (1, 4, 8, 8) and bool((means > 0).all()) and bool((means.sum(1) < 1).all())


def test_only_the_window_is_collected(model, clip, negative):
    watched, results, _ = collect_maps(model, clip, PROMPT, ["cat", "a sofa"], "u0", 0.0, 0.4)
    ksampler(watched, ZERO, encoded(clip, PROMPT), negative, steps=10, scheduler="normal")
    ((maps, steps, _),) = results.read().values()
    assert maps.shape == (1, 4, 4, 2) and 3 <= steps <= 5


def test_collecting_features_changes_no_bit_and_keeps_the_last_step_of_the_window(model, clip, negative):
    positive = encoded(clip, PROMPT)
    plain = ksampler(model, ZERO, positive, negative)
    for what, kind in (("resblock", "resblock"), ("self-attention", "attn1")):
        watched, results = collect_features(model, "u1,m0" if what == "self-attention" else "u1", what, 0.0, 1.0)
        assert torch.equal(ksampler(watched, ZERO, positive, negative), plain)
        found = results.read()
        assert found[next(iter(found))].ndim == 4 and all(point.kind == kind for point in found)
    seen = []
    handle = model.model.diffusion_model.output_blocks[4][0].out_layers[-1].register_forward_hook(lambda *args: seen.append(args[2].clone()))
    watched, results = collect_features(model, "u1", "resblock", 0.0, 1.0)
    try:
        ksampler(watched, ZERO, positive, negative)
    finally:
        handle.remove()
    noted = results.read()[Point("resblock", "output", 4)]
    assert any(torch.equal(noted, row[None]) for row in seen[-1])


def test_unknown_words_layers_and_windows_are_refused(model, clip):
    with pytest.raises(ValueError, match="There is no word dog in the prompt, which has a, cat, on, a, sofa"):
        collect_maps(model, clip, PROMPT, ["cat", "dog"], "preset default", 0.0, 1.0)
    with pytest.raises(ValueError, match="There is no word at all in the prompt, which is empty"):
        collect_maps(model, clip, "", [], "preset default", 0.0, 1.0)
    with pytest.raises(ValueError, match="window goes from 0.5 to 0.5"):
        collect_maps(model, clip, PROMPT, [], "preset default", 0.5, 0.5)
    with pytest.raises(ValueError, match="No layer is chosen"):
        collect_features(model, "", "resblock", 0.0, 1.0)
    with pytest.raises(ValueError, match="There are no attention maps to show"):
        collect_maps(model, clip, PROMPT, [], "preset default", 0.0, 1.0)[1].read()


def test_principal_components_of_known_features():
    """Two orthogonal patterns of different strength come out in that order, whatever the mixing."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.linspace(-1, 1, 8)[:, None].expand(8, 6), torch.linspace(-1, 1, 6)[None].expand(8, 6)
    mixing = torch.linalg.qr(torch.randn(5, 5, generator=generator))[0]
    features = (10 * rows[..., None] * mixing[0] + 3 * columns[..., None] * mixing[1]).movedim(-1, 0)[None] + 7.0
    found = principal_components(features)
    assert found.shape == (1, 8, 6, 3) and float(found.min()) >= 0 and float(found.max()) <= 1
    first, second = ((found[0, ..., i] - 0.5) * 2 for i in (0, 1))
    assert (first.abs() - rows.abs()).abs().max() < 1e-4 and (second.abs() - columns.abs()).abs().max() < 1e-4
    assert bool((found[..., 2] == 0.5).all()), "nothing is left for the third"
    assert torch.equal(found, principal_components(features))
    assert principal_components(torch.randn(2, 2, 3, 3, generator=generator)).shape == (2, 3, 3, 3)


def test_sheets():
    assert torch.allclose(colored(torch.tensor([0.0, 1.0])), torch.tensor([[0.0, 0.0, 0.02], [0.99, 1.0, 0.64]]))
    picture = torch.rand(40, 60, 3)
    hot = over(picture, torch.tensor([[0.0, 1.0]]))
    assert hot.shape == picture.shape and float(hot[:, -1].mean()) > float(hot[:, 0].mean())
    drawn = sheet(picture[None].repeat(2, 1, 1, 1), torch.rand(2, 7, 4, 6), [f"word {i}" for i in range(7)], columns=4)
    assert drawn.ndim == 4 and drawn.shape[0] == 1 and drawn.shape[-1] == 3 and float(drawn.max()) <= 1
