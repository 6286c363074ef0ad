"""The objective as mathematics."""

import math

import pytest
import torch

from palimpsest.visii.objective import direction_between, fixed_noise, guided, noise_error, similarity, text_feature, timesteps, total_loss


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_guidance_is_instruct_pix2pixs_in_eps_and_in_denoised_predictions():
    y, sigma = draw(2, 4, 3, 3), 3.0
    eps = [draw(2, 4, 3, 3, seed=seed) for seed in (1, 2, 3)]
    full, image, none = eps
    expected = none + 1.5 * (image - none) + 7.5 * (full - image)
    assert torch.allclose(guided(*eps, 7.5, 1.5), expected)
    denoised = guided(*(y - sigma * e for e in eps), 7.5, 1.5)
    assert torch.allclose((y - denoised) / sigma, expected)
    assert torch.allclose(guided(full, image, none, 1.0, 1.0), full)


def test_the_text_feature_is_the_mean_of_all_positions_projected():
    tokens, projection = draw(2, 7, 5), draw(6, 5, seed=1)
    found = text_feature(tokens, projection)
    for row in range(2):
        plain = projection @ tokens[row].sum(0) / 7
        assert torch.allclose(found[row], plain / plain.norm())


def test_the_direction_is_that_of_the_means_not_of_the_unit_features():
    before, after = 10 * draw(3, 8), draw(3, 8, seed=1)
    found = direction_between(before, after)
    plain = (after.mean(0) - before.mean(0)).float()
    assert torch.allclose(found[0], plain / plain.norm(), atol=1e-6)


def test_the_direction_term_is_clamped_above_and_has_no_gradient_there():
    direction, projection = torch.tensor([[1.0, 0.0]]), torch.eye(2)
    for angle, gains in ((0.2, False), (1.4, True)):
        tokens = torch.tensor([[[math.cos(angle), math.sin(angle)]]], requires_grad=True)
        alike = similarity(tokens, direction, projection)
        assert float(alike.detach()) == pytest.approx(math.cos(angle), abs=1e-6)
        loss = total_loss(torch.zeros(()), alike, 4.0, 0.1)
        assert float(loss.detach()) == pytest.approx(-0.1 * min(math.cos(angle), 0.5), abs=1e-6)
        gradient = torch.autograd.grad(loss, tokens)[0]
        assert bool(gradient.abs().max() > 1e-3) == gains
    assert float(total_loss(torch.tensor(0.25), None, 4.0, 0.1)) == 1.0


def test_every_row_has_its_own_error():
    a, b = draw(3, 4, 2, 2), draw(3, 4, 2, 2, seed=1)
    assert torch.allclose(noise_error(a, b), torch.stack([((x - y) ** 2).mean() for x, y in zip(a, b)]))


def test_a_thousand_steps_see_every_timestep_once():
    order = timesteps(1000, 1000, 5)
    assert sorted(order) == list(range(1000)) and order != sorted(order)
    assert timesteps(1000, 1000, 5) == order and timesteps(1000, 1000, 6) != order


@pytest.mark.parametrize("steps", [1, 7, 300, 2500])
def test_other_numbers_of_steps_cover_the_schedule_evenly(steps):
    order = sorted(timesteps(steps, 1000, 0))
    assert len(order) == steps and 0 <= order[0] and order[-1] <= 999
    for share, timestep in enumerate(order):
        assert share * 1000 / steps - 1 <= timestep <= (share + 1) * 1000 / steps


def test_a_timestep_has_its_own_noise_whenever_it_comes():
    first, again, other, seeded = (fixed_noise((1, 4, 16, 16), t, seed) for t, seed in ((3, 0), (3, 0), (4, 0), (3, 1)))
    assert torch.equal(first, again)
    for different in (other, seeded):
        assert abs(float(torch.corrcoef(torch.stack([first.flatten(), different.flatten()]))[0, 1])) < 0.15
    assert float(first.std()) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_any_seed_of_the_widget_is_one(seed):
    assert len(timesteps(3, 1000, seed)) == 3 and torch.isfinite(fixed_noise((1, 4, 2, 2), 999, seed)).all()
