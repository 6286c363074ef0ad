"""DDIM inversion in sigma space against DDIM as the papers write it, in alpha-bar terms and float64."""

import math

import comfy.model_sampling
import pytest
import torch
from palimpsest.inversion.ddim import ddim_step, invert, invert_step, rescale, rms, to_eps

ABAR = torch.cumprod(1 - torch.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000, dtype=torch.float64) ** 2, dim=0)
SIGMA = ((1 - ABAR) / ABAR).sqrt()


class Mixture:
    """The exact noise prediction of a two-dimensional Gaussian mixture: a network nobody has to train."""

    def __init__(self):
        generator = torch.Generator().manual_seed(7)
        self.means = torch.randn(5, 2, generator=generator, dtype=torch.float64) * 1.5
        self.variance = 0.05

    def eps(self, x, abar):
        """E[eps | x] at level abar, x [B, 2] in the papers' scaling."""
        variance = abar * self.variance + 1 - abar
        difference = x[:, None] - abar.sqrt() * self.means
        weight = torch.softmax(-difference.square().sum(-1) / (2 * variance), dim=1)
        return (1 - abar).sqrt() * (weight[..., None] * difference).sum(1) / variance

    def picture(self, count=6):
        generator = torch.Generator().manual_seed(3)
        return self.means[torch.randint(5, (count,), generator=generator)] + 0.2 * torch.randn(count, 2, generator=generator, dtype=torch.float64)


def timesteps(steps, offset=1):
    return [k * (1000 // steps) + offset for k in range(steps)]


def paper_inversion(network, x, levels, convention):
    """x_b = sqrt(abar_b) (x_a - sqrt(1 - abar_a) e) / sqrt(abar_a) + sqrt(1 - abar_b) e, upwards over the abar of `levels`."""
    path = [x]
    for a, b in zip(levels, levels[1:]):
        e = network(x, b if convention == "destination" else a)
        x = b.sqrt() * (x - (1 - a).sqrt() * e) / a.sqrt() + (1 - b).sqrt() * e
        path.append(x)
    return path


def host_denoiser(kind, mixture, sigma_data=1.0):
    """D(y, sigma) the way the host computes it, from a network that predicts eps, v or EDM's F for the same mixture."""
    base = {"eps": comfy.model_sampling.EPS, "v": comfy.model_sampling.V_PREDICTION, "edm": comfy.model_sampling.EDM}[kind]

    class Sampling(base):
        pass

    sampling = Sampling()
    sampling.sigma_data = sigma_data

    def network(inputs, sigma):
        # what a network gets is the papers' x for data divided by sigma_data
        abar = 1 / (1 + (sigma[0] / sigma_data) ** 2)
        x = inputs
        eps = mixture.eps(x, abar)
        clean = (x - (1 - abar).sqrt() * eps) / abar.sqrt()
        v = abar.sqrt() * eps - (1 - abar).sqrt() * clean
        return {"eps": eps, "v": v, "edm": -v}[kind]

    def denoiser(y, sigma):
        return sampling.calculate_denoised(sigma, network(sampling.calculate_input(sigma, y), sigma), y)

    def scale(sigma):
        one = torch.ones(1, 1, dtype=torch.float64)
        return float(sampling.calculate_input(torch.tensor([sigma], dtype=torch.float64), one))

    return denoiser, scale


@pytest.mark.parametrize("steps", [20, 50])
@pytest.mark.parametrize("convention", ["destination", "source"])
@pytest.mark.parametrize("kind", ["eps", "v", "edm"])
def test_plain_inversion_is_the_papers_formula(kind, convention, steps):
    mixture = Mixture()
    denoiser, scale = host_denoiser(kind, mixture)
    levels = [ABAR[0]] + [ABAR[t] for t in timesteps(steps)]
    reference = paper_inversion(mixture.eps, mixture.picture(), levels, convention)
    sigmas = torch.stack([((1 - a) / a).sqrt() for a in levels])
    start = mixture.picture() / ABAR[0].sqrt()
    found = [step.latent for step in invert(denoiser, start, sigmas, iterations=0, convention=convention, input_scale=scale)]
    for abar, x, y in zip(levels[1:], reference[1:], found):
        assert (x / abar.sqrt() - y).abs().max() < 1e-11


@pytest.mark.parametrize("convention", ["destination", "source"])
def test_edm_with_another_sigma_data(convention):
    sigma_data = 0.5
    mixture = Mixture()
    denoiser, scale = host_denoiser("edm", mixture, sigma_data)
    levels = [ABAR[t] for t in timesteps(20)]
    reference = paper_inversion(mixture.eps, mixture.picture(), levels, convention)
    sigmas = torch.stack([((1 - a) / a).sqrt() for a in levels]) * sigma_data
    start = reference[0] / levels[0].sqrt() * sigma_data
    found = [step.latent for step in invert(denoiser, start, sigmas, iterations=0, convention=convention, input_scale=scale)]
    for abar, x, y in zip(levels[1:], reference[1:], found):
        assert (x / abar.sqrt() * sigma_data - y).abs().max() < 1e-11


def sample_back(denoiser, y, sigmas):
    for sigma, lower in zip(sigmas.flip(0), sigmas.flip(0)[1:]):
        y = ddim_step(y, sigma, lower, to_eps(y, sigma, denoiser(y, y.new_ones(len(y)) * sigma)))
    return y


def test_sampling_step_is_the_papers_formula():
    mixture = Mixture()
    denoiser, _ = host_denoiser("eps", mixture)
    sigmas = torch.stack([SIGMA[0]] + [SIGMA[t] for t in timesteps(20)])
    x = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = x / ABAR[timesteps(20)[-1]].sqrt()
    levels = [ABAR[t] for t in reversed(timesteps(20))] + [ABAR[0]]
    for a, b in zip(levels, levels[1:]):
        e = mixture.eps(x, a)
        x = b.sqrt() * (x - (1 - a).sqrt() * e) / a.sqrt() + (1 - b).sqrt() * e
    assert (sample_back(denoiser, y, sigmas) - x / ABAR[0].sqrt()).abs().max() < 1e-11


@pytest.mark.parametrize("convention", ["destination", "source"])
def test_every_repeat_brings_the_round_trip_closer(convention):
    mixture = Mixture()
    denoiser, scale = host_denoiser("eps", mixture)
    sigmas = torch.stack([torch.zeros((), dtype=torch.float64)] + [SIGMA[t] for t in timesteps(50)])
    start = mixture.picture()
    errors = []
    for iterations in (0, 1, 2, 5):
        *_, last = invert(denoiser, start, sigmas, iterations=iterations, convention=convention, input_scale=scale, sigma_floor=float(SIGMA[0]), tolerance=0)
        errors.append(float(rms(sample_back(denoiser, last.latent, sigmas) - start).mean()))
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2] > 4 * errors[3]
    assert errors[3] < 0.05 * errors[0]


def test_a_correction_is_what_the_step_back_misses():
    mixture = Mixture()
    denoiser, _ = host_denoiser("eps", mixture)
    y = mixture.picture()
    a, b = float(SIGMA[201]), float(SIGMA[301])
    plain = invert_step(denoiser, y, a, b, iterations=0)
    refined = invert_step(denoiser, y, a, b, iterations=1)
    eps = to_eps(plain.latent, b, denoiser(plain.latent, torch.full((len(y),), b, dtype=torch.float64)))
    assert torch.allclose(refined.corrections[0], rms(ddim_step(plain.latent, b, a, eps) - y), rtol=1e-10)


def expansive(y, sigma):
    """eps = slope y. Where the first value of a row is positive the fixed point repels and repeats run away from it; elsewhere it attracts."""
    slope = torch.where(y[:, :1] > 0, -40.0, 0.3) * torch.tensor([0.0, 1.0], dtype=y.dtype)
    return y - sigma[:, None] * slope * y


def test_growing_correction_falls_back_to_the_best_iterate():
    y = torch.tensor([[0.3, -0.2], [-0.4, 0.1]], dtype=torch.float64)
    plain = invert_step(expansive, y, 0.5, 0.6, iterations=0)
    refined = invert_step(expansive, y, 0.5, 0.6, iterations=5)
    assert refined.grew.tolist() == [True, False]
    assert torch.equal(refined.latent[0], plain.latent[0])
    assert not torch.equal(refined.latent[1], plain.latent[1])


def test_rows_of_a_batch_do_not_wait_for_each_other():
    y = torch.tensor([[0.3, -0.2], [-0.4, 0.1], [-1.0, 2.0]], dtype=torch.float64)
    together = invert_step(expansive, y, 0.5, 0.6, iterations=4).latent
    alone = [invert_step(expansive, row[None], 0.5, 0.6, iterations=4).latent for row in y]
    assert torch.equal(together, torch.cat(alone))


def test_settled_rows_save_model_calls():
    calls = []

    def constant_noise(y, sigma):
        calls.append(float(sigma[0]))
        return y - sigma[:, None] * 0.7

    y = torch.zeros(1, 2, dtype=torch.float64) + 0.1
    step = invert_step(constant_noise, y, 0.0, 1.0, iterations=5)
    assert len(calls) == 2 and not step.grew.any()
    assert torch.allclose(step.latent, y + 0.7)


def test_nan_from_the_model_is_not_an_improvement():
    def broken(y, sigma):
        return torch.full_like(y, math.nan) if len(seen) else seen.append(1) or y * 0.5

    seen = []
    y = torch.ones(1, 2, dtype=torch.float64)
    step = invert_step(broken, y, 0.5, 0.6, iterations=2)
    assert torch.isfinite(step.latent).all() and step.grew.all()


def test_source_convention_starts_at_the_smallest_level_the_model_knows():
    asked = []

    def spy(y, sigma):
        asked.append((float(sigma[0]), y.clone()))
        return y * 0.5

    y = torch.ones(1, 2, dtype=torch.float64)
    invert_step(spy, y, 0.0, 0.5, iterations=0, convention="source", sigma_floor=0.03)
    assert asked[0][0] == pytest.approx(0.03)
    assert torch.allclose(asked[0][1], rescale(y, 0.0, 0.03))


@pytest.mark.parametrize("sigma, sigma_next", [(0.5, 0.5), (0.5, 0.4), (-0.1, 0.4), (math.nan, 1.0)])
def test_steps_must_ascend(sigma, sigma_next):
    with pytest.raises(ValueError, match="sigma < sigma_next"):
        invert_step(lambda y, s: y, torch.ones(1, 2), sigma, sigma_next)


def test_unknown_convention():
    with pytest.raises(ValueError, match="'both'"):
        invert_step(lambda y, s: y, torch.ones(1, 2), 0.0, 1.0, convention="both")
