"""The gradient of a training step is that of the original's three rows, written down plainly on a UNet of the test's own."""

import comfy.ops
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from palimpsest.tests.helpers.visii import WIDTH, random_instruction, random_pairs, tiny_edit
from palimpsest.visii import learn_run
from palimpsest.visii.direction import Direction
from palimpsest.visii.learn import Settings
from palimpsest.visii.objective import fixed_noise

SETTINGS = Settings(steps=1, preview_every=0, choice="last", checkpointing="off", seed=3)


def three_rows(model, pairs, start, timestep, settings, direction=None):
    """Gradient [end - 1, C] by the released code's way: one batch of [text, null, null] with gradient, all in float32."""
    config = {**model.model.model_config.unet_config, "dtype": torch.float32}
    unet = UNetModel(**config, operations=comfy.ops.disable_weight_init)
    unet.load_state_dict({name: value.clone().float() for name, value in model.model.diffusion_model.state_dict().items()})
    abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)[timestep].float()
    pair = timestep % len(pairs.target)
    noise = fixed_noise((1, 4, *pairs.target.shape[2:]), timestep, settings.seed)
    noisy = abar.sqrt() * 0.18215 * pairs.target[pair : pair + 1] + (1 - abar).sqrt() * noise
    picture = pairs.image[pair : pair + 1]
    embeds = torch.cat([start.tokens, start.null, start.null]).requires_grad_()
    rows = torch.cat([noisy.expand(3, -1, -1, -1), torch.cat([picture, picture, torch.zeros_like(picture)])], 1)
    text, image, none = unet(rows, torch.full((3,), float(timestep)), context=embeds).chunk(3)
    predicted = none + settings.text_scale * (text - image) + settings.image_scale * (image - none)
    loss = settings.mse_weight * ((predicted - noise) ** 2).mean()
    if direction is not None:
        feature = embeds[0].mean(0) @ direction.projection.t()
        cosine = (feature / feature.norm()) @ direction.vector[0]
        loss = loss - settings.direction_weight * cosine.clamp(-1, 0.5)
    return torch.autograd.grad(loss, embeds)[0][0, 1 : start.end], float(((predicted - noise) ** 2).mean().detach())


def ours(monkeypatch, model, pairs, start, timestep, settings, direction=None):
    """The gradient that the optimiser gets in a run of one step, inside inference mode as the server runs nodes."""
    seen = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda adam: seen.append(adam.param_groups[0]["params"][0].grad.clone()))
    monkeypatch.setattr(learn_run, "timesteps", lambda *_: [timestep])
    with torch.inference_mode():
        result = learn_run.run_learn(model, pairs, start, (start.null, {}), settings, direction)
    (gradient,) = seen
    assert gradient.dtype == torch.float32 and gradient.shape == (1, start.end - 1, start.width)
    return gradient[0], result.record.errors[0]


def relative(found, expected):
    assert expected.norm() > 0
    return float((found - expected).norm() / expected.norm())


def some_direction(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Direction(torch.nn.functional.normalize(torch.randn(1, 20, generator=generator), dim=-1), torch.randn(20, WIDTH, generator=generator))


@pytest.mark.parametrize("checkpointing", ["off", "on"])
@pytest.mark.parametrize("timestep", [0, 431, 999])
def test_gradient_is_the_three_row_originals(monkeypatch, timestep, checkpointing):
    from dataclasses import replace

    with torch.inference_mode():
        model = tiny_edit()
    start, pairs, settings = random_instruction(), random_pairs(), replace(SETTINGS, checkpointing=checkpointing)
    expected, error = three_rows(model, pairs, start, timestep, settings)
    found, found_error = ours(monkeypatch, model, pairs, start, timestep, settings)
    assert relative(found, expected) < 1e-5 and found_error == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_give_the_gradient_of_float32_arithmetic(monkeypatch, dtype):
    with torch.inference_mode():
        model = tiny_edit(dtype=dtype)
    start, pairs = random_instruction(), random_pairs()
    assert relative(ours(monkeypatch, model, pairs, start, 500, SETTINGS)[0], three_rows(model, pairs, start, 500, SETTINGS)[0]) < 1e-5
    assert {weight.dtype for weight in model.model.diffusion_model.parameters()} == {dtype}


def test_the_direction_term_and_the_pair_of_a_timestep(monkeypatch):
    with torch.inference_mode():
        model = tiny_edit()
    start, pairs, direction = random_instruction(), random_pairs(count=3, size=(16, 24)), some_direction()
    from dataclasses import replace

    settings = replace(SETTINGS, direction_weight=50.0)
    for timestep in (300, 301):
        expected, _ = three_rows(model, pairs, start, timestep, settings, direction)
        assert relative(ours(monkeypatch, model, pairs, start, timestep, settings, direction)[0], expected) < 1e-5
        assert relative(three_rows(model, pairs, start, timestep, settings)[0], expected) > 1e-2, "the term takes part"
