"""The Null-Text Optimize node: schema and wiring."""

import dataclasses

import pytest
import torch

from palimpsest.inversion.null_text import Settings
from palimpsest.inversion.trajectory import start_latent
from palimpsest.nodes import null_text
from palimpsest.nodes.null_text import NODES, NullTextOptimize
from palimpsest.tests.helpers.inversions import invert, picture
from palimpsest.tests.helpers.models import tiny_cond, tiny_sd15
from palimpsest.tests.helpers.sampling import ksampler


@pytest.fixture(scope="module")
def model():
    return tiny_sd15(channel_mult=(1, 1, 1, 1))


@pytest.fixture(scope="module")
def trajectory(model):
    return invert(model, picture(batch=2, height=8, width=8), tiny_cond(seed=1), steps=2)


def defaults():
    """Widget values as the host fills them in."""
    return {item.id: item.default for item in NullTextOptimize.define_schema().inputs if getattr(item, "default", None) is not None}


def test_ids_and_order_are_for_ever():
    schema = NullTextOptimize.define_schema()
    assert (schema.node_id, schema.display_name, schema.category) == ("PalimpsestNullTextOptimize", "Null-Text Optimize", "Palimpsest/inversion")
    assert [item.id for item in schema.inputs] == [
        "model", "trajectory", "negative", "guidance", "inner_steps", "early_stop", "learning_rate", "checkpointing", "positive",
    ]
    assert [(output.id, output.io_type) for output in schema.outputs] == [
        ("optimised", "CONDITIONING"), ("start", "LATENT"), ("report", "STRING"), ("loss_plot", "IMAGE"),
    ]
    assert all(item.tooltip for item in [*schema.inputs, *schema.outputs])
    assert NODES == [NullTextOptimize]
    NullTextOptimize.GET_NODE_INFO_V1()


def test_defaults_are_the_published_ones():
    assert defaults() == {"guidance": 7.5, "inner_steps": 10, "early_stop": 1e-5, "learning_rate": 0.01, "checkpointing": "auto"}


@torch.inference_mode()
def test_the_node_gives_what_a_stock_sampler_takes(model, trajectory):
    out = NullTextOptimize.execute(model=model, trajectory=trajectory, negative=tiny_cond(seed=2), **{**defaults(), "inner_steps": 1})
    conditioning, latent, report, loss_plot = out.args
    assert len(conditioning) == 2 and conditioning[0][0].shape == (2, 77, 768)
    assert torch.equal(latent["samples"], start_latent(trajectory, model)["samples"])
    assert "2 steps at guidance 7.5" in report and out.ui["text"] == (report,)
    assert len(loss_plot) == 2 and len(out.ui["images"]) == 2
    picture = ksampler(model, latent, tiny_cond(seed=1), conditioning, steps=2, cfg=7.5, scheduler="ddim_uniform", disable_noise=True)
    assert torch.isfinite(picture).all()


def test_every_input_reaches_the_optimisation(model, trajectory, monkeypatch):
    class Enough(Exception):
        pass

    seen = []

    def stop(*args, **kwargs):
        seen.append((args, kwargs))
        raise Enough

    monkeypatch.setattr(null_text, "run_null_text", stop)
    prompts = tiny_cond(seed=2), tiny_cond(seed=3)
    with pytest.raises(Enough):
        NullTextOptimize.execute(model, trajectory, prompts[0], 3.0, 4, 5e-6, 0.02, "on", positive=prompts[1])
    (args, kwargs), = seen
    assert args == (model, trajectory, *prompts, Settings(3.0, 4, 5e-6, 0.02, "on"))
    kwargs["say"]("told to nobody, as no server runs")


@torch.inference_mode()
def test_a_noise_mask_is_left_out_of_the_latent(model, trajectory):
    """The host keeps the sampler's latent outside a mask; here that is noise, which would stay in the picture."""
    masked = dataclasses.replace(trajectory, noise_mask=torch.ones(1, 64, 64))
    latent = NullTextOptimize.execute(model=model, trajectory=masked, negative=tiny_cond(seed=2), **{**defaults(), "inner_steps": 1}).args[1]
    assert list(latent) == ["samples"]
