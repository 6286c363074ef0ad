"""The PnP Injector node: schema and wiring."""

import pytest
import torch

from palimpsest.attention_patches.pnp import apply_pnp
from palimpsest.inversion.trajectory import start_latent
from palimpsest.nodes.pnp import PnPInjector
from palimpsest.tests.helpers.models import tiny_cond, tiny_sd15, tiny_trajectory
from palimpsest.tests.helpers.sampling import ksampler


@pytest.fixture(scope="module")
def model():
    return tiny_sd15(channel_mult=(1, 1, 1, 1))


@pytest.fixture(scope="module")
def trajectory(model):
    return tiny_trajectory(model)


def defaults():
    """Widget values as the host fills them in."""
    schema = PnPInjector.define_schema()
    return {item.id: item.default for item in schema.inputs if getattr(item, "default", None) is not None}


def test_ids_and_order_of_inputs_are_for_ever():
    schema = PnPInjector.define_schema()
    assert schema.node_id == "PalimpsestPnPInjector"
    assert [item.id for item in schema.inputs] == [
        "model",
        "trajectory",
        "source",
        "feature_layers",
        "attention_layers",
        "tau_f",
        "tau_A",
        "negative_schedule",
        "negative_alpha",
        "unconditional",
        "bank_device",
    ]


def test_defaults_are_the_published_ones():
    values = defaults()
    assert (values["tau_f"], values["tau_A"], values["negative_schedule"]) == (0.8, 0.5, "off")
    assert values["feature_layers"] == values["attention_layers"] == "preset default"


def test_the_node_gives_the_edited_model_its_start_and_a_report(model, trajectory):
    edited, latent, report = PnPInjector.execute(model=model, trajectory=trajectory, **defaults()).args
    assert torch.equal(latent["samples"], start_latent(trajectory, model)["samples"])
    assert report.startswith("model: SD1.x")
    prompts = tiny_cond(seed=1), tiny_cond(seed=2)
    expected, _ = apply_pnp(model, trajectory)
    assert torch.equal(ksampler(edited, latent, *prompts), ksampler(expected, latent, *prompts))


def test_every_input_reaches_the_edit(model, trajectory):
    """Each setting changes the picture, on its own."""
    prompts = tiny_cond(seed=1), tiny_cond(seed=2)
    empty = tiny_cond(seed=3)

    def picture(**changed):
        edited, latent, _ = PnPInjector.execute(model=model, trajectory=trajectory, **{**defaults(), **changed}).args
        return ksampler(edited, latent, *prompts)

    standard = picture()
    blended = picture(negative_schedule="constant", unconditional=empty)
    others = [
        picture(source=tiny_cond(seed=4)),
        picture(feature_layers="u2"),
        picture(attention_layers="u1-2"),
        picture(tau_f=1.0),
        picture(tau_A=0.25),
        blended,
    ]
    assert not any(torch.equal(other, standard) for other in others)
    assert not torch.equal(picture(negative_schedule="constant", unconditional=empty, negative_alpha=0.5), blended)
    assert torch.equal(picture(bank_device="cpu"), standard)


def test_a_trajectory_of_another_model_is_refused(trajectory):
    with pytest.raises(ValueError, match="another SD1.x model"):
        PnPInjector.execute(model=tiny_sd15(seed=3, channel_mult=(1, 1, 1, 1)), trajectory=trajectory, **defaults())
