"""PnP against tensors computed by the published implementation (the authors' diffusers code) on a small random UNet."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from palimpsest.attention_patches.pnp import apply_pnp
from palimpsest.inversion.trajectory import Trajectory
from palimpsest.tests.helpers.models import patcher
from palimpsest.tests.helpers.sampling import ksampler

CASES = ("off", "default", "conv_only")


@pytest.fixture(scope="module")
def folder(oracles):
    return oracles / "pnp"


@pytest.fixture(scope="module")
def model(folder):
    import comfy.model_base
    import comfy.supported_models

    class TwoHeads(comfy.supported_models.SD15):
        unet_extra_config = {"num_heads": 2, "num_head_channels": -1}

    config = TwoHeads({**json.loads((folder / "tiny_unet_config.json").read_text()), "dtype": torch.float32})
    base = comfy.model_base.BaseModel(config)
    missing, unexpected = base.diffusion_model.load_state_dict(load_file(folder / "tiny_unet_ldm.safetensors"), strict=False)
    assert not missing and not unexpected
    return patcher(base)


@pytest.fixture(scope="module")
def inputs(folder):
    return load_file(folder / "port_32_inputs.safetensors")


@pytest.fixture(scope="module")
def trajectory(model, inputs):
    steps = sorted(int(t) for t in inputs["timesteps"])
    abar = inputs["alphas_cumprod"][steps].double()
    sigmas = torch.cat([torch.zeros(1).double(), ((1 - abar) / abar).sqrt()])
    latents = torch.stack([inputs["x0"]] + [inputs[f"t{t}"] for t in steps]).double()
    scaled = latents * (1 + sigmas**2).sqrt()[:, None, None, None, None]
    return Trajectory.for_model(model, sigmas.float(), scaled.float(), [[inputs["null"], {}]])


def edited(model, trajectory, folder, case):
    """The model with the case's settings, and the case's tensors."""
    path = folder / f"port_32_{case}.safetensors"
    with safe_open(path, "pt") as file:
        conv, attention = (max(0, int(file.metadata()[key])) for key in ("conv_steps", "attn_steps"))
    edit, _ = apply_pnp(model, trajectory, tau_f=conv / 20, tau_a=attention / 20)
    return edit, load_file(path)


@torch.inference_mode()
@pytest.mark.parametrize("case", CASES)
def test_eps_of_every_step_equals_the_published_code(model, trajectory, inputs, folder, case):
    import comfy.patcher_extension
    import comfy.samplers

    edit, expected = edited(model, trajectory, folder, case)
    seen = []

    def note(executor, x, t, context, y, control, transformer_options, **kwargs):
        # the UNet's own output: eps recovered from the host's denoised latents would lose digits at low noise
        out = executor(x, t, context, y, control, transformer_options, **kwargs)
        rows = dict(zip(transformer_options["cond_or_uncond"], out))
        seen.append((rows[1], rows[0]))
        return out

    edit.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "note", note)
    sigmas = trajectory.sigmas.flip(0)

    def given_latents(denoiser, x, levels, extra_args=None, callback=None, disable=None):
        for sigma, given in zip(levels[:-1], expected["x"]):
            denoiser(given * (1 + sigma**2).sqrt(), sigma * x.new_ones([1]), **extra_args)
        return x

    guider = comfy.samplers.CFGGuider(edit)
    guider.set_conds([[inputs["cond"], {}]], [[inputs["neg"], {}]])
    guider.set_cfg(7.5)
    start = model.model.process_latent_out(trajectory.latents[-1])
    guider.sample(torch.zeros_like(start), start, comfy.samplers.KSAMPLER(given_latents), sigmas, disable_pbar=True)
    assert len(seen) == 20
    for step, (negative, target) in enumerate(seen):
        assert (negative - expected["eps"][step, 1]).abs().max() < 1e-5, f"negative row, step {step}"
        assert (target - expected["eps"][step, 2]).abs().max() < 1e-5, f"target row, step {step}"


@pytest.mark.parametrize("case", CASES)
def test_whole_run_through_ksampler_equals_the_published_run(model, trajectory, inputs, folder, case):
    edit, expected = edited(model, trajectory, folder, case)
    start = model.model.process_latent_out(trajectory.latents[-1])
    path = []
    edit.set_model_sampler_post_cfg_function(lambda args: path.append((args["input"], args["sigma"][0])) or args["denoised"])
    ksampler(edit, start, [[inputs["cond"], {}]], [[inputs["neg"], {}]], steps=20, cfg=7.5, scheduler="ddim_uniform")
    assert len(path) == 20
    for step, (x, sigma) in enumerate(path):
        ours = x / (1 + sigma**2).sqrt()
        theirs = expected["x"][step]
        # 20 steps of feedback through cfg 7.5 amplify the last bits
        assert (ours - theirs).norm() / theirs.norm() < 3e-5, f"step {step}"
