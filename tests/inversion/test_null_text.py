"""Null-text optimisation as mathematics, on a toy network."""

import dataclasses

import pytest
import torch

from palimpsest.inversion.null_text import Settings, learning_rate_at, optimise, stop_at

STEPS, GUIDANCE = 5, 2.0
ABAR = torch.tensor([0.02, 0.2, 0.5, 0.8, 0.95, 1.0], dtype=torch.float64)  # noisy to clean; the host ends at 1
SIGMAS = ((1 - ABAR) / ABAR).sqrt().tolist()


class Toy(torch.nn.Module):
    """eps(x, c) of latents [B, 2, 3] and tokens [B, 4, 5]; sharper towards the clean end, so that steps differ."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.mix, self.read = (torch.nn.Parameter(0.4 * torch.randn(*shape, generator=generator, dtype=torch.float64)) for shape in ((6, 6), (20, 6)))

    def forward(self, x, tokens):
        return torch.tanh(x.flatten(1) @ self.mix + tokens.flatten(1) @ self.read).view(x.shape)


@pytest.fixture(scope="module")
def toy():
    return Toy()


def ddim(x, e, i):
    """The DDIM step i of the paper, from level i to level i + 1."""
    a, b = ABAR[i], ABAR[i + 1]
    return b.sqrt() * (x - (1 - a).sqrt() * e) / a.sqrt() + (1 - b).sqrt() * e


@torch.no_grad()
def given(toy, batch=1, seed=0):
    """x of each level [N + 1, B, 2, 3] (paper's scaling), a path at guidance 1; conditional tokens; unconditional tokens."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    path, conditional, unconditional = [draw(batch, 2, 3)], draw(batch, 4, 5), draw(1, 4, 5).expand(batch, 4, 5)
    for i in range(STEPS):
        path.append(ddim(path[-1], toy(path[-1], conditional), i))
    return torch.stack(path), conditional, unconditional


def published(toy, path, conditional, tokens, settings, stop_growth=2e-5):
    """Section 4 of the paper for one picture, in alpha-bar terms. Returns (tokens, loss after, trainings) per step."""
    x, out = path[0], []
    for i in range(STEPS):
        e_c = toy(x, conditional).detach()
        u = tokens.clone().requires_grad_(True)
        adam = torch.optim.Adam([u], lr=settings.learning_rate * (1 - i / 100))
        trainings = 0
        for _ in range(settings.inner_steps):
            e_u = toy(x, u)
            loss = torch.nn.functional.mse_loss(ddim(x, e_u + settings.guidance * (e_c - e_u), i), path[i + 1])
            adam.zero_grad()
            loss.backward()
            adam.step()
            trainings += 1
            if loss.item() < settings.early_stop + i * stop_growth:
                break
        tokens = u.detach()
        with torch.no_grad():
            e_u = toy(x, tokens)
            x = ddim(x, e_u + settings.guidance * (e_c - e_u), i)
        out.append((tokens, torch.nn.functional.mse_loss(x, path[i + 1]), trainings))
    toy.zero_grad(set_to_none=True)
    return out


def ours(toy, path, conditional, tokens, settings, **options):
    levels = torch.tensor(SIGMAS, dtype=torch.float64).view(-1, 1, 1, 1)
    scaled = path * (1 + levels**2).sqrt()

    def branch(y, sigma):
        x = y / (1 + sigma**2) ** 0.5
        e_c = toy(x, conditional).detach()

        def guided(u):
            e_u = toy(x, u)
            return y - sigma * (e_u + settings.guidance * (e_c - e_u))

        return guided

    return list(optimise(branch, scaled[0], scaled[1:], SIGMAS, tokens, settings, **options))


def test_the_published_loop_step_by_step(toy):
    path, conditional, tokens = given(toy, seed=1)
    for settings in (Settings(GUIDANCE), Settings(GUIDANCE, inner_steps=60, learning_rate=0.1, early_stop=0.01)):
        expected = published(toy, path, conditional, tokens, settings)
        found = ours(toy, path, conditional, tokens, settings)
        assert [int(step.inner) for step in found] == [count for *_, count in expected]
        for step, (u, loss, _) in zip(found, expected):
            assert torch.allclose(step.tokens, u, rtol=1e-6, atol=1e-9)
            assert float(step.loss) == pytest.approx(float(loss), rel=1e-6)
    assert len({count for *_, count in expected}) > 1, "the second settings are to stop early at some steps"


def test_rate_and_threshold_are_the_published_ones():
    assert [learning_rate_at(i, 0.01) for i in (0, 25, 50)] == pytest.approx([0.01, 0.0075, 0.005])
    assert [stop_at(i, 1e-5) for i in (0, 1, 49)] == pytest.approx([1e-5, 3e-5, 9.9e-4])


def test_the_rate_never_ends():
    """A run of more than 100 steps would climb the loss instead of descending it."""
    assert learning_rate_at(99, 0.01) == pytest.approx(1e-4) == learning_rate_at(100, 0.01) == learning_rate_at(999, 0.01)


def test_training_brings_the_path_back(toy):
    path, conditional, tokens = given(toy)
    settings = Settings(GUIDANCE, inner_steps=200, learning_rate=0.1, early_stop=1e-3)
    before = ours(toy, path, conditional, tokens, dataclasses.replace(settings, inner_steps=0))
    after = ours(toy, path, conditional, tokens, settings)
    assert float(after[-1].loss) < 0.1 * float(before[-1].loss)


def test_no_training_is_guided_sampling(toy):
    path, conditional, tokens = given(toy)
    plain = ours(toy, path, conditional, tokens, Settings(GUIDANCE, inner_steps=0))
    x = path[0]
    for i, step in enumerate(plain):
        x = ddim(x, toy(x, tokens) + GUIDANCE * (toy(x, conditional) - toy(x, tokens)), i)
        assert torch.equal(step.tokens, tokens) and int(step.inner) == 0
        assert torch.allclose(step.latent * ABAR[i + 1].sqrt(), x)


def test_pictures_of_a_batch_stop_by_themselves(toy):
    path, conditional, tokens = given(toy, batch=3, seed=1)
    settings = Settings(GUIDANCE, inner_steps=60, learning_rate=0.1, early_stop=0.01)
    both = ours(toy, path, conditional, tokens, settings)
    counts = set()
    for row in range(3):
        alone = ours(toy, path[:, row : row + 1], conditional[row : row + 1], tokens[row : row + 1], settings)
        for together, single in zip(both, alone):
            counts.add(tuple(together.inner.tolist()))
            assert int(together.inner[row]) == int(single.inner)
            assert torch.allclose(together.tokens[row], single.tokens[0], rtol=1e-6, atol=1e-9)
            assert float(together.loss[row]) == pytest.approx(float(single.loss), rel=1e-6)
    assert any(len(set(inner)) > 1 for inner in counts), "the pictures are to stop at different times"


def test_gradients_stay_off_everything_else(toy):
    """backward() would leave them on every weight that asks for one."""
    ours(toy, *given(toy), Settings(GUIDANCE))
    assert toy.mix.requires_grad and toy.mix.grad is None and toy.read.grad is None


def test_each_training_is_told(toy):
    told = []
    steps = ours(toy, *given(toy), Settings(GUIDANCE, inner_steps=3, early_stop=0.0), tell=lambda index, inner, losses, denoised: told.append((index, inner, losses)))
    assert [(index, inner) for index, inner, _ in told][:4] == [(0, 1), (0, 2), (0, 3), (1, 1)]
    assert len(told) == sum(int(step.inner) for step in steps)
    assert all(losses.shape == (1,) and not losses.requires_grad for *_, losses in told)


def test_a_loss_that_is_no_number_is_one_sentence(toy):
    path, conditional, tokens = given(toy)
    with pytest.raises(ValueError, match=r"NaN or infinite at step 1 of 5 .*learning rate") as refused:
        ours(toy, path, conditional * float("nan"), tokens, Settings(GUIDANCE))
    assert str(refused.value).endswith(".") and "\n" not in str(refused.value)


@pytest.mark.parametrize("cut", ["detached", "unused"])
def test_a_gradient_that_does_not_arrive_is_one_sentence(toy, cut):
    weight = torch.ones(1, dtype=torch.float64, requires_grad=True)

    def branch(y, sigma):
        return lambda u: y * 0.5 if cut == "detached" else y * weight

    path, _, tokens = given(toy)
    with pytest.raises(ValueError, match="No gradient reaches the tokens"):
        list(optimise(branch, path[0], path[1:], SIGMAS, tokens, Settings(GUIDANCE)))
