"""The focus of an image context: the original's numbers, its table of weights, what it keeps."""

import pytest
import torch
from safetensors.torch import load_file

from palimpsest.tests.helpers.versatile import context, relative
from palimpsest.versatile_diffusion.focus import focus, singular_weights

SEMANTIC = {0: (0, 0), 0.1: (0, 0.1289), 0.2: (0, 0.2862), 0.25: (0, 0.3775), 0.3: (0, 0.4785), 0.4: (0.4265, 0.7132), 0.48: (0.8759, 0.9380)}
STYLE = {  # w_5, w_6, w_10, w_19
    0.52: (0.975, 0.949, 0.848, 0.620), 0.55: (0.935, 0.869, 0.608, 0.021), 0.6: (0.863, 0.725, 0.175, 0), 0.7: (0.695, 0.389, 0, 0), 0.75: (0.597, 0.195, 0, 0),
    0.8: (0.490, 0, 0, 0), 0.9: (0.239, 0, 0, 0), 1: (0, 0, 0, 0),
}


@pytest.mark.parametrize("level", ["0.25", "0.60"])
def test_equal_to_the_original(oracles, level):
    stored = load_file(oracles / "vd" / "focus_io.safetensors")
    out = focus(stored["context"], float(level))
    assert relative(out, stored[f"focus_{level}"]) < 1e-4
    assert relative(stored[f"focus_{level}"], stored["context"]) > 0.01


@pytest.mark.parametrize("level", SEMANTIC)
def test_weights_toward_semantics(level):
    weights = singular_weights(level)
    assert weights[:2].tolist() == pytest.approx(SEMANTIC[level], abs=6e-5) and bool((weights[2:] == 1).all())


@pytest.mark.parametrize("level", STYLE)
def test_weights_toward_style(level):
    weights = singular_weights(level)
    assert weights[[5, 6, 10, 19]].tolist() == pytest.approx(STYLE[level], abs=6e-4) and bool((weights[:5] == 1).all())


def test_the_middle_is_the_very_same_tensor():
    tokens = context(257, width=96)
    assert focus(tokens, 0.5) is tokens
    assert bool((singular_weights(0.5) == 1).all())


@pytest.mark.parametrize("level", [0.0, 0.3, 0.7, 1.0])
def test_class_row_and_spread_stay_and_pictures_do_not_mix(level):
    tokens = context(257, width=96, rows=2)
    out = focus(tokens, level)
    assert out.shape == tokens.shape and out.dtype == tokens.dtype
    assert torch.equal(out[:, 0], tokens[:, 0])
    assert torch.allclose(out[:, 1:].flatten(1).std(1), tokens[:, 1:].flatten(1).std(1), rtol=1e-5)
    assert torch.allclose(out[1:], focus(tokens[1:], level), atol=1e-6)


def test_style_keeps_the_leading_components_alone():
    tokens = context(257, width=96)
    local = focus(tokens, 1.0)[0, 1:].double()
    values = torch.linalg.svdvals(local - local.mean(1, keepdim=True))
    assert float(values[4]) > 0.1 and float(values[5] / values[0]) < 1e-5
    kept = focus(tokens, 0.0)[0, 1:].double()
    before = torch.linalg.svdvals((tokens[0, 1:] - tokens[0, 1:].mean(1, keepdim=True)).double())
    after = torch.linalg.svdvals(kept - kept.mean(1, keepdim=True))
    assert torch.allclose(after[:-2] / after[0], before[2:] / before[2], atol=1e-4), "the two leading ones are gone, the rest stays"


def test_half_precision_and_flat_pictures():
    tokens = context(257, width=96)
    half = focus(tokens.half(), 0.3)
    assert half.dtype == torch.float16 and relative(half, focus(tokens, 0.3)) < 5e-3
    assert torch.isfinite(focus(torch.ones(1, 257, 96), 0.3)).all() and torch.isfinite(focus(torch.zeros(1, 257, 96), 1.0)).all()


@pytest.mark.parametrize("arguments", [(-0.1,), (1.1,), (float("nan"),), (0.3, 20, 20), (0.7, 20, 1, 20), (0.7, 2, 1, 5)])
def test_what_makes_no_sense_is_refused(arguments):
    with pytest.raises(ValueError) as error:
        focus(context(257), *arguments)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
