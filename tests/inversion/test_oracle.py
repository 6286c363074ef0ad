"""Whole runs against the published null-text notebook's scheduler: trajectory and reconstructions (oracle p2p/inversion)."""

import dataclasses
import json

import comfy.model_base
import comfy.supported_models
import pytest
import torch
from palimpsest.inversion.run import run_inversion, run_reconstruction
from palimpsest.inversion.trajectory import Trajectory
from palimpsest.tests.helpers.models import patcher
from safetensors.torch import load_file

SCALE = 0.18215


@pytest.fixture(scope="module")
def oracle(oracles):
    return load_file(str(oracles / "p2p" / "inversion.safetensors"))


@pytest.fixture(scope="module")
def model(oracles):
    class TwoHeads(comfy.supported_models.SD15):
        unet_extra_config = {}

    layout = json.loads((oracles / "pnp" / "tiny_unet_config.json").read_text())
    config = TwoHeads({**layout, "dtype": torch.float32})
    config.manual_cast_dtype = None
    base = comfy.model_base.BaseModel(config)
    weights = load_file(str(oracles / "pnp" / "tiny_unet_ldm.safetensors"))
    prefix = "model.diffusion_model."
    weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    base.diffusion_model.load_state_dict(weights)
    return patcher(base)


@pytest.fixture(scope="module")
def sigmas(model, oracle):
    """Descending, offset 0: the notebook's step at timestep 0 goes from abar[0] to abar[0] and does nothing, so it is no step here."""
    steps = oracle["timesteps"].sort().values
    return model.model.model_sampling.sigmas[steps].flip(0)


@pytest.fixture(scope="module")
def path(model, oracle, sigmas):
    start = oracle["traj"][0] * (1 + sigmas[-1] ** 2).sqrt() / SCALE
    return run_inversion(model, {"samples": start}, [[oracle["cond"], {}]], sigmas=sigmas, iterations=0).trajectory


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def test_trajectory(path, oracle):
    assert relative(oracle["traj"][1], oracle["traj"][0]) < 1e-6, "the oracle's first step is expected to do nothing"
    for k, sigma in enumerate(path.sigmas):
        x = path.latents[k] / (1 + sigma**2).sqrt()
        assert relative(x, oracle["traj"][k + 1]) < 1e-4, k


@pytest.mark.parametrize(
    "name, guidance, negative",
    [("recon_cfg1", 1.0, None), ("recon_cfg7.5", 7.5, "uncond"), ("recon_npi", 7.5, "cond")],
)
def test_reconstruction(model, path, oracle, sigmas, name, guidance, negative):
    guided = dataclasses.replace(path, guidance=guidance)
    negative = None if negative is None else [[oracle[negative], {}]]
    found = run_reconstruction(model, guided, negative=negative) * SCALE / (1 + sigmas[-1] ** 2).sqrt()
    # the stored latents of the run are in either order; the picture is the one farther from the noise
    expected = oracle[name][-1] if relative(oracle[name][0], oracle["traj"][-1]) < 1e-6 else oracle[name][0]
    assert relative(found, expected) < 1e-4


@pytest.mark.slow
def test_null_text_optimisation(model, oracle, sigmas):
    """Losses of the notebook's own run, step by step; its last step (timestep 0 to 0) does nothing and is none here."""
    from palimpsest.inversion.null_text import Settings
    from palimpsest.inversion.null_text_run import run_null_text

    levels = sigmas.flip(0)
    latents = oracle["traj"][1:] * (1 + levels**2).sqrt().view(-1, 1, 1, 1, 1)
    path = Trajectory.for_model(model, levels, latents, [[oracle["cond"], {}]])
    found = run_null_text(model, path, [[oracle["uncond"], {}]], settings=Settings(checkpointing="off"))
    assert len(found.steps) == 9
    run = oracle["recon_null"]
    run = run if relative(run[0], oracle["traj"][-1]) < 1e-6 else run.flip(0)
    for step, given in zip(found.steps, oracle["null_embeddings"]):
        after = run[step.index + 1]
        loss = (after - oracle["traj"][9 - step.index]).square().mean()
        assert float(step.loss) == pytest.approx(float(loss), rel=0.05), step.index
        assert relative(step.latent / (1 + sigmas[step.index + 1] ** 2).sqrt(), after) < 1e-2
        assert relative(step.tokens, given) < 0.05
