"""The text diffuser: names at full size, both flows against diffusers' module, the host's sampler, refusals."""

import comfy.ops
import comfy.sample
import pytest
import torch

from palimpsest.tests.helpers.host_nodes import lora
from palimpsest.tests.helpers.models import tiny_cond
from palimpsest.tests.helpers.sampling import ksampler, latent_noise, no_free_memory, schedule
from palimpsest.tests.helpers.versatile import relative, text_shapes
from palimpsest.tests.helpers.versatile_text import CONTEXT, LATENT, diffusers_text_unet, tiny_text
from palimpsest.versatile_diffusion.dual import SETS, find
from palimpsest.versatile_diffusion.keys import IMAGE, TEXT, group_of
from palimpsest.versatile_diffusion.model import DUAL, FLOW, IMAGE_CONTEXT, RATIO
from palimpsest.versatile_diffusion.text_unet import TextUNet, text_config


def context(flow=TEXT, tokens=77, seed=0):
    """CONDITIONING of a flow, tokens about as long as the published ones."""
    ((values, options),) = tiny_cond(tokens, seed, CONTEXT)
    return [[values / CONTEXT**0.5, {**options, FLOW: flow}]]


@pytest.fixture(scope="module")
def model():
    return tiny_text()


@pytest.fixture(scope="module")
def reference(model):
    pytest.importorskip("diffusers")
    return {part: diffusers_text_unet(model, part) for part in SETS}


def full_size(sets):
    return TextUNet(**text_config(), sets=sets, dtype=torch.float16, device="meta", operations=comfy.ops.disable_weight_init).state_dict()


def test_tensors_at_full_size():
    shapes = {key: value.shape for key, value in full_size((TEXT,)).items()}
    assert shapes == text_shapes() and len(shapes) == 686
    assert sum(shape.numel() for shape in shapes.values()) == 1_708_848_448
    both = full_size(SETS)
    assert len(both) == 686 + 416 and sum(value.numel() for value in both.values()) == 1_708_848_448 + 267_239_360
    twins = {find(key).key: value.shape for key, value in both.items() if find(key).part == IMAGE and group_of(find(key).key) == "context"}
    assert twins == {key: shape for key, shape in shapes.items() if group_of(key) == "context"}


@torch.inference_mode()
@pytest.mark.parametrize("part, tokens", [(TEXT, 77), (IMAGE, 257), (IMAGE, 514)])
def test_each_flow_as_diffusers(model, reference, part, tokens):
    x, times = latent_noise(2, LATENT, 1, 1), torch.tensor([981.0, 3.0])
    words = torch.cat([context(tokens=tokens, seed=seed)[0][0] for seed in (1, 2)])
    ours = model.model.diffusion_model(x, times, words, vd_ratio=float(part == TEXT))
    theirs = reference[part](x, times, encoder_hidden_states=words).sample
    assert ours.shape == (2, LATENT, 1, 1) and float(theirs.std()) > 0.1
    assert relative(ours, theirs) < 1e-5


def guided_euler(model, predict, words, no_words, cfg, latent, steps, seed):
    """Euler in the host's noise levels with guidance, by hand: the latent after every step's noise has been taken out."""
    sampling = model.get_model_object("model_sampling")
    sigmas = schedule(model, steps)
    x = comfy.sample.prepare_noise(latent, seed) * (1 + sigmas[0] ** 2).sqrt()
    for now, then in zip(sigmas, sigmas[1:]):
        time = sampling.timestep(now).float().expand(len(x))
        scaled = x / (1 + now**2).sqrt()
        yes, no = (predict(scaled, time, states.expand(len(x), -1, -1)) for states in (words, no_words))
        x = x + (then - now) * (no + cfg * (yes - no))
    return x


@torch.inference_mode()
@pytest.mark.parametrize("part, tokens", [(TEXT, 77), (IMAGE, 257)])
@pytest.mark.parametrize("sampler", ["euler", "ddim"])
def test_guided_run_through_the_stock_sampler(model, reference, part, tokens, sampler):
    words, no_words = context(part, tokens), context(part, tokens, seed=9)
    latent = torch.zeros(2, LATENT, 1, 1)
    out = ksampler(model, latent, words, no_words, steps=5, cfg=7.5, sampler=sampler, seed=3)

    def predict(x, time, states):
        return reference[part](x, time, encoder_hidden_states=states).sample

    expected = guided_euler(model, predict, words[0][0], no_words[0][0], 7.5, latent, 5, 3)
    assert out.shape == latent.shape and relative(out, expected) < 1e-4


def test_layout_of_calls_does_not_matter(model, monkeypatch):
    """Prompts of other lengths, calls of their own for positive and negative, batch 1 or 3."""
    latent = torch.zeros(3, LATENT, 1, 1)
    noise = latent_noise(3, LATENT, 1, 1, seed=5)
    start = {"steps": 3, "cfg": 5.0, "disable_noise": True, "start_step": 0}
    whole = ksampler(model, noise, context(IMAGE, 257), context(IMAGE, 1, seed=4), **start)
    alone = torch.cat([ksampler(model, noise[i:i + 1], context(IMAGE, 257), context(IMAGE, 1, seed=4), **start) for i in range(3)])
    assert relative(alone, whole) < 1e-4 and whole.shape == latent.shape
    mixed = ksampler(model, noise, context(IMAGE, 257), context(TEXT, 77, seed=4), **start)
    no_free_memory(monkeypatch)
    assert relative(ksampler(model, noise, context(IMAGE, 257), context(TEXT, 77, seed=4), **start), mixed) < 1e-4
    assert relative(mixed, whole) > 1e-3


def test_untagged_conditioning_is_text(model):
    latent = torch.zeros(1, LATENT, 1, 1)
    plain = [[context()[0][0], {}]]
    assert torch.equal(ksampler(model, latent, plain, plain), ksampler(model, latent, context(), context()))


def test_ends_of_a_blend_are_the_single_flows(model):
    latent, text, image = torch.zeros(1, LATENT, 1, 1), context(TEXT, 77), context(IMAGE, 257, seed=2)

    def dual(ratio):
        both = [[text[0][0], {FLOW: DUAL, IMAGE_CONTEXT: image[0][0], RATIO: ratio}]]
        return ksampler(model, latent, both, both, cfg=1.0)

    ends = ksampler(model, latent, image, image, cfg=1.0), ksampler(model, latent, text, text, cfg=1.0)
    assert torch.equal(dual(0.0), ends[0]) and torch.equal(dual(1.0), ends[1])
    assert all(relative(dual(0.5), end) > 1e-3 for end in ends)


@pytest.mark.parametrize("sets", [(TEXT,), (IMAGE,)])
def test_one_set_alone(model, sets):
    alone = tiny_text(sets=sets)
    whole = {key: value for key, value in model.model.diffusion_model.state_dict().items()}
    names = {key: key if sets == (TEXT,) or group_of(key) != "context" else _twin(key) for key in alone.model.diffusion_model.state_dict()}
    alone.model.diffusion_model.load_state_dict({key: whole[name] for key, name in names.items()}, strict=True)
    latent, words = torch.zeros(1, LATENT, 1, 1), context(sets[0])
    assert torch.equal(ksampler(alone, latent, words, words), ksampler(model, latent, words, words))
    (other,) = set(SETS) - set(sets)
    with pytest.raises(ValueError, match=f"no attention for {other} contexts") as error:
        ksampler(alone, latent, context(other), words)
    assert "Versatile Text Model Loader" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("part, ratio", [(TEXT, 1.0), (IMAGE, 0.0)])
def test_an_end_of_a_blend_needs_one_set(part, ratio):
    """Regression: a dual context at ratio 0 or 1 was refused on a text diffuser of the one set that it needs."""
    alone, latent = tiny_text(sets=(part,)), torch.zeros(1, LATENT, 1, 1)
    text, image = context(TEXT, 77), context(IMAGE, 257, seed=2)

    def dual(share):
        both = [[text[0][0], {FLOW: DUAL, IMAGE_CONTEXT: image[0][0], RATIO: share}]]
        return ksampler(alone, latent, both, both, cfg=1.0)

    single = text if part == TEXT else image
    assert torch.equal(dual(ratio), ksampler(alone, latent, single, single, cfg=1.0))
    (other,) = set(SETS) - {part}
    for share in (0.5, 1 - ratio):
        with pytest.raises(ValueError, match=f'no attention for {other} contexts.*contexts "both" in Versatile Text Model Loader'):
            dual(share)


def _twin(key):
    parts = key.split(".")
    modules = 2 if parts[0] == "middle_block" else 3
    return ".".join([*parts[:modules], "image", *parts[modules:]])


@pytest.mark.parametrize("shape", [(1, 4, 16, 16), (1, LATENT, 2, 2)])
def test_latents_of_pictures_are_refused(model, shape):
    with pytest.raises(ValueError, match="works on latents of texts") as error:
        ksampler(model, latent_noise(*shape), context(), context())
    assert "\n" not in str(error.value)


def test_weight_patches_and_the_next_run(model):
    """A LoRA on a clone changes its runs and no others; the model's weights return."""
    latent, words = torch.zeros(1, LATENT, 1, 1), context(IMAGE, 257)
    before = ksampler(model, latent, words, context(IMAGE, 257, seed=1))
    changed = ksampler(lora(model), latent, words, context(IMAGE, 257, seed=1))
    assert relative(changed, before) > 1e-4
    assert torch.equal(ksampler(model, latent, words, context(IMAGE, 257, seed=1)), before)


def test_half_precision(model):
    half = tiny_text(dtype=torch.bfloat16)
    latent, words = torch.zeros(1, LATENT, 1, 1), context()
    out = ksampler(half, latent, words, context(seed=1), cfg=1.0)
    assert torch.isfinite(out).all() and relative(out, ksampler(model, latent, words, context(seed=1), cfg=1.0)) < 0.2
