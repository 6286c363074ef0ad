"""The private way for gradients, against a plain UNet of its own."""

import gc
import weakref

import comfy.ldm.modules.attention
import comfy.ops
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from palimpsest.inversion.gradients import differentiable_options, memory_needed, ordinary, private_model
from palimpsest.tests.helpers import host_nodes
from palimpsest.tests.helpers.models import tiny_sd2, tiny_sd15, tiny_sdxl

NARROW = {"width": 64, "channel_mult": (1, 1, 1, 1)}


@torch.inference_mode()
def as_the_host_builds(make, **options):
    """In the server every weight is an inference tensor."""
    model = make(**options)
    assert next(model.model.diffusion_model.parameters()).is_inference()
    return model


@pytest.fixture(scope="module")
def model():
    return as_the_host_builds(tiny_sd15, **NARROW)


def given(rows=1, dim=768):
    generator = torch.Generator().manual_seed(3)
    y = 5 * torch.randn(rows, 4, 16, 16, generator=generator)
    tokens = torch.randn(rows, 77, dim, generator=generator)
    return y, torch.full((rows,), 4.0), tokens, torch.randn(y.shape, generator=generator)


def gradient(base, y, sigma, tokens, weight, options=None, more=None):
    """d (denoised . weight) / d tokens through the host's own apply_model."""
    options = differentiable_options(options or {})["transformer_options"]
    with torch.inference_mode(False), torch.enable_grad():
        tokens = tokens.clone().requires_grad_()
        denoised = base.apply_model(y.clone(), sigma.clone(), c_crossattn=tokens, transformer_options=options, **(more or {}))
        return torch.autograd.grad((denoised * weight.clone()).sum(), tokens)[0]


def plain_gradient(model, prediction, y, sigma, tokens, weight, adm=None):
    """The same on a UNetModel of the test's own, with float32 weights, by the formulas of the prediction types."""
    config = {**model.model.model_config.unet_config, "dtype": torch.float32}
    unet = UNetModel(**config, operations=comfy.ops.disable_weight_init)
    unet.load_state_dict({name: value.clone().float() for name, value in model.model.diffusion_model.state_dict().items()})
    s = float(sigma[0])
    abar = 1 / (1 + s * s)
    table = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    timestep = (((1 - table) / table).sqrt().log() - torch.tensor(s).log()).abs().argmin()
    tokens = tokens.clone().requires_grad_()
    x = y * abar**0.5
    out = unet(x, torch.full((len(y),), float(timestep)), context=tokens, y=adm)
    if prediction == "eps":
        denoised = y - s * out
    else:  # x0 = sqrt(abar) x - sqrt(1 - abar) v
        denoised = abar**0.5 * x - (1 - abar) ** 0.5 * out
    return torch.autograd.grad((denoised * weight.clone()).sum(), tokens)[0]


def relative(found, expected):
    assert expected.norm() > 0
    return float((found - expected).norm() / expected.norm())


@torch.inference_mode()
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prediction", ["eps", "v_prediction"])
def test_gradient_is_that_of_a_plain_unet(prediction, dtype, checkpointing):
    model = as_the_host_builds(tiny_sd15, prediction=prediction, dtype=dtype, **NARROW)
    found = gradient(private_model(model.model, checkpointing), *given(rows=2))
    with torch.inference_mode(False):
        assert relative(found, plain_gradient(model, prediction, *(value.clone() for value in given(rows=2)))) < 1e-5
    assert found.dtype == torch.float32


@torch.inference_mode()
@pytest.mark.parametrize("checkpointing", [False, True])
def test_sdxl_with_its_pooled_vector(checkpointing):
    model = as_the_host_builds(tiny_sdxl)
    y, sigma, tokens, weight = given(dim=2048)
    adm = torch.randn(1, 2816)
    found = gradient(private_model(model.model, checkpointing), y, sigma, tokens, weight, more={"y": adm})
    with torch.inference_mode(False):
        assert relative(found, plain_gradient(model, "eps", *(value.clone() for value in (y, sigma, tokens, weight)), adm=adm.clone())) < 1e-5


@torch.inference_mode()
def test_sd2_with_linear_projections():
    model = as_the_host_builds(tiny_sd2)
    found = gradient(private_model(model.model), *given(dim=1024))
    with torch.inference_mode(False):
        assert relative(found, plain_gradient(model, "v_prediction", *(value.clone() for value in given(dim=1024)))) < 1e-5


@torch.inference_mode()
def test_no_weight_is_copied(model):
    half = as_the_host_builds(tiny_sd15, dtype=torch.float16, **NARROW)
    for each in (model, half):
        twins = dict(private_model(each.model).diffusion_model.named_parameters())
        for name, weight in each.model.diffusion_model.named_parameters():
            twin = twins.pop(name)
            assert twin.data_ptr() == weight.data_ptr() and twin.dtype == weight.dtype and torch.equal(twin, weight)
            assert not twin.is_inference() and not twin.requires_grad
        assert not twins


@torch.inference_mode()
def test_the_twin_writes_to_nothing_that_is_shared(model):
    unet = model.model.diffusion_model
    layer = unet.input_blocks[1][0].out_layers[3]
    before = {name: sorted(vars(module)) for name, module in unet.named_modules()}
    private = private_model(model.model, checkpointing=True)
    twin = private.diffusion_model.input_blocks[1][0].out_layers[3]
    twin.register_forward_hook(lambda *args: None)
    twin.weight_function = twin.weight_function + [None]
    twin.weight = None
    assert layer.weight is not None and not layer._forward_hooks and not layer.weight_function and not layer.comfy_cast_weights
    assert before == {name: sorted(vars(module)) for name, module in unet.named_modules()}
    assert private.current_patcher is model.model.current_patcher and model.model.diffusion_model is unet
    assert model.model.get_dtype() == torch.float32 and private.get_dtype() == torch.float32


@torch.inference_mode()
@pytest.mark.parametrize("loading", ["whole", "partly"])
def test_lora_is_in(loading):
    """Merged at loading, or applied on the fly in a model that does not fit."""
    model = as_the_host_builds(tiny_sd15, **NARROW)
    patched = host_nodes.lora(model)
    without = gradient(private_model(model.model), *given())
    patched.patch_model(model.load_device, lowvram_model_memory=0 if loading == "whole" else 1)
    try:
        functions = [module for module in model.model.modules() if getattr(module, "weight_function", None)]
        assert bool(functions) == (loading == "partly")
        found = gradient(private_model(model.model), *given())
    finally:
        patched.unpatch_model(model.offload_device)
    with torch.inference_mode(False):
        baked = as_the_host_builds(tiny_sd15, **NARROW)
        for name, ((_, (_, (difference,)), *_),) in patched.patches.items():
            weight = dict(baked.model.named_parameters())[name]
            with torch.inference_mode():
                weight += difference
        assert relative(found, plain_gradient(baked, "eps", *(value.clone() for value in given()))) < 1e-5
    assert relative(without, found) > 1e-3
    assert relative(gradient(private_model(model.model), *given()), without) == 0, "unloading took the LoRA out again"


@torch.inference_mode()
def test_patches_see_the_same_blocks_when_computed_again(model):
    def scaled(n, context, value, extra_options):
        name, number = extra_options["block"]
        return n * (1 + 0.1 * number + 0.01 * extra_options["block_index"] + (name == "output")), context, value

    clone = model.clone()
    clone.set_model_attn2_patch(scaled)
    kept, again = (gradient(private_model(model.model, checkpointing), *given(), options=clone.model_options) for checkpointing in (False, True))
    assert relative(again, kept) < 1e-6
    assert relative(gradient(private_model(model.model), *given()), kept) > 1e-3, "the patch takes part"


def kept_for_backward(base, *case):
    """Bytes saved for the backward pass, each storage once, weights left out."""
    sizes, own = {}, {weight.untyped_storage().data_ptr() for weight in base.diffusion_model.parameters()}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        gradient(base, *case)
    return sum(sizes.values())


@torch.inference_mode()
def test_checkpointing_keeps_less_and_the_estimate_covers_it():
    model = as_the_host_builds(tiny_sd15)
    y, *rest = given()
    case = (y.repeat(1, 1, 2, 2), *rest[:2], rest[2].repeat(1, 1, 2, 2))
    kept, again = (kept_for_backward(private_model(model.model, checkpointing), *case) for checkpointing in (False, True))
    assert again < 0.5 * kept
    estimate = memory_needed(model, "SD1.x", tuple(case[0].shape), False)
    assert kept < estimate < 2.5 * kept
    assert memory_needed(model, "SD1.x", tuple(case[0].shape), True) < 0.5 * estimate


def test_the_estimate_counts_the_casts_of_narrow_weights(model):
    half = tiny_sd15(dtype=torch.float16, **NARROW)
    count = sum(weight.numel() for weight in half.model.diffusion_model.parameters())
    shape = (1, 4, 8, 8)
    assert memory_needed(half, "SD1.x", shape, False) - memory_needed(model, "SD1.x", shape, False) == 4 * count
    assert memory_needed(half, "SD1.x", shape, True) - memory_needed(model, "SD1.x", shape, True) == count / 2
    assert memory_needed(model, "SD1.x", (3, 4, 8, 8), True) == 3 * memory_needed(model, "SD1.x", shape, True)


def test_ordinary_tensors():
    with torch.inference_mode():
        made = torch.arange(12.0).view(3, 4).t()[1:]
    for tensor in (made, torch.ones(2, requires_grad=True), torch.nn.Parameter(torch.ones(3))):
        plain = ordinary(tensor)
        assert not plain.is_inference() and not plain.requires_grad
        assert torch.equal(plain, tensor) and plain.data_ptr() == tensor.data_ptr() and plain.stride() == tensor.stride()


def test_quantised_weights_are_refused():
    class Quantised(torch.Tensor):
        pass

    with pytest.raises(ValueError, match=r"quantised weights \(Quantised\)") as refused:
        ordinary(torch.ones(2).as_subclass(Quantised))
    assert str(refused.value).endswith(".") and "\n" not in str(refused.value)


def test_options_for_gradients_are_a_copy(model):
    clone = model.clone()
    for key in ("torch.compile", "other"):
        clone.add_wrapper_with_key("apply_model", key, print)
    found = differentiable_options({"transformer_options": {"wrappers": clone.wrappers, "patches": {}}})["transformer_options"]
    assert list(found["wrappers"]["apply_model"]) == ["other"], "a compiled network would bring the shared modules back"
    assert list(clone.wrappers["apply_model"]) == ["torch.compile", "other"] and "patches" in found
    assert differentiable_options({}) == {"transformer_options": {}}


def test_attention_is_torchs_own(model, monkeypatch):
    """sage and flash attention have no backward pass."""

    def without_gradient(q, k, v, heads, *args, **kwargs):
        return torch.zeros_like(q)

    expected = gradient(private_model(model.model), *given())
    monkeypatch.setattr(comfy.ldm.modules.attention, "optimized_attention", without_gradient)
    assert torch.equal(gradient(private_model(model.model), *given()), expected)


def test_the_twin_goes_when_nobody_holds_it(model):
    """A cycle would keep the weights' memory until Python collects its garbage."""
    private = private_model(model.model, checkpointing=True)
    gone = weakref.ref(private.diffusion_model.input_blocks[1][1].transformer_blocks[0].attn2)
    gc.disable()
    try:
        gradient(private, *given())
        del private
        assert gone() is None
    finally:
        gc.enable()


def test_a_model_made_outside_inference_mode():
    """As the tests of other packs do it; its weights ask for gradients and must not get any."""
    model = tiny_sd15(**NARROW)
    assert next(model.model.diffusion_model.parameters()).requires_grad
    gradient(private_model(model.model), *given())
    assert all(weight.grad is None and weight.requires_grad for weight in model.model.diffusion_model.parameters())
