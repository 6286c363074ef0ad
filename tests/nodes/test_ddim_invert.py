"""DDIM Invert and Reconstruct Check as nodes."""

import pytest
import torch
from palimpsest.inversion.trajectory import Trajectory, start_latent
from palimpsest.nodes.ddim_invert import NODES, DDIMInvert, ReconstructCheck
from palimpsest.tests.helpers.models import tiny_cond, tiny_sd15

SETTINGS = dict(steps=5, scheduler="ddim_uniform", guidance=1.0, iterations=1, convention="destination")


class Decoder:
    """Stands where the host's VAE stands: colours of the first three channels, eight times as large."""

    latent_channels = 4

    def decode(self, latents):
        self.seen = latents
        return latents[:, :3].movedim(1, -1).repeat_interleave(8, 1).repeat_interleave(8, 2) / 8 + 0.5


@pytest.fixture(scope="module")
def model():
    model = tiny_sd15()
    # random weights answer a change of their input far more sharply than trained ones; a smaller output makes steps invertible
    with torch.no_grad():
        model.model.diffusion_model.out[2].weight.mul_(0.05)
    return model


@pytest.fixture(scope="module")
def latent():
    return {"samples": torch.randn(2, 4, 12, 16, generator=torch.Generator().manual_seed(0)) * 4, "batch_index": [4, 5]}


@pytest.fixture(scope="module")
def inverted(model, latent):
    return DDIMInvert.execute(model, latent, tiny_cond(), **SETTINGS)


def test_outputs_in_the_order_of_the_schema(model, latent, inverted):
    noise, trajectory, report, film_strip = inverted.args
    assert [output.id for output in DDIMInvert.define_schema().outputs] == ["noise", "trajectory", "report", "film_strip"]
    assert isinstance(trajectory, Trajectory) and trajectory.steps == 5
    assert torch.equal(noise["samples"], start_latent(trajectory, model)["samples"])
    assert noise["batch_index"] == [4, 5] and latent["samples"].shape == noise["samples"].shape
    assert "5 steps" in report and "SD1.x" in report
    assert film_strip.ndim == 4 and len(film_strip) == 2 and film_strip.shape[-1] == 3
    assert 0 <= film_strip.min() and film_strip.max() <= 1


def test_a_plain_sampler_returns_to_a_masked_picture(model, latent):
    """The host keeps latent_image outside a mask, which is noise here: a mask on the noise output left noise in the picture."""
    import comfy.sample

    samples = latent["samples"][:1]
    mask = torch.zeros(1, 96, 128)
    mask[:, 48:] = 1
    noise, trajectory, report, _ = DDIMInvert.execute(model, {"samples": samples, "noise_mask": mask}, tiny_cond(), **{**SETTINGS, "iterations": 3}).args
    start = noise["samples"]
    back = comfy.sample.sample(
        model,
        torch.zeros_like(start),
        5,
        1.0,
        "euler",
        "ddim_uniform",
        tiny_cond(),
        tiny_cond(),
        start,
        disable_noise=True,
        noise_mask=noise.get("noise_mask"),
        seed=0,
    )
    kept = slice(0, 6)  # outside the mask
    assert (back - samples)[:, :, kept].norm() < 0.2 * (start - samples)[:, :, kept].norm()
    assert torch.equal(trajectory.noise_mask, mask) and "mask" in report


def test_an_empty_latent_is_remarked(model):
    report = DDIMInvert.execute(model, {"samples": torch.zeros(1, 4, 8, 8)}, tiny_cond(), **SETTINGS).args[2]
    assert "VAE Encode" in report


def test_the_node_shows_text_and_pictures(inverted):
    assert inverted.ui["text"] == (inverted.args[2],)
    assert len(inverted.ui["images"]) == 2


def test_film_strip_shows_each_picture_of_the_batch(inverted):
    film_strip = inverted.args[3]
    assert not torch.allclose(film_strip[0], film_strip[1])


def test_film_strip_through_a_vae_decodes_latents_in_its_own_scaling(model, latent):
    decoder = Decoder()
    out = DDIMInvert.execute(model, latent, tiny_cond(), **SETTINGS, vae=decoder)
    # the first frame is the input itself
    assert torch.allclose(decoder.seen[:2], latent["samples"], atol=1e-4)
    assert out.args[3].shape[0] == 2


def test_vae_of_another_model_is_one_sentence(model, latent, inverted):
    decoder = Decoder()
    decoder.latent_channels = 16
    with pytest.raises(ValueError, match="16 channels"):
        ReconstructCheck.execute(model, inverted.args[1], vae=decoder)


def test_check_reports_what_it_measures(model, latent, inverted):
    decoder = Decoder()
    reconstruction, image, report, comparison = ReconstructCheck.execute(model, inverted.args[1], vae=decoder).args
    from palimpsest.inversion.report import psnr

    assert f"{psnr(latent['samples'], reconstruction['samples']):.2f} dB" in report
    before = decoder.decode(latent["samples"]).clamp(0, 1)
    after = decoder.decode(reconstruction["samples"]).clamp(0, 1)
    assert torch.allclose(image, after, atol=1e-4)
    assert f"{psnr(before, after, 1.0):.1f}"[:-1] in report
    assert image.shape == (2, 96, 128, 3) and len(comparison) == 2


def test_another_prompt_reconstructs_less_exactly(model, latent):
    from palimpsest.inversion.report import psnr

    trajectory = DDIMInvert.execute(model, latent, tiny_cond(), **{**SETTINGS, "iterations": 5}).args[1]
    own = ReconstructCheck.execute(model, trajectory).args[0]["samples"]
    other = ReconstructCheck.execute(model, trajectory, positive=tiny_cond(seed=5)).args[0]["samples"]
    assert psnr(latent["samples"], own) > psnr(latent["samples"], other) + 6


def test_guided_trajectory_needs_a_negative_on_the_way_back(model, latent):
    trajectory = DDIMInvert.execute(model, latent, tiny_cond(), **{**SETTINGS, "guidance": 2.0}, negative=tiny_cond(seed=1)).args[1]
    with pytest.raises(ValueError, match="needs a negative"):
        ReconstructCheck.execute(model, trajectory)
    assert ReconstructCheck.execute(model, trajectory, negative=tiny_cond(seed=1)).args[0]["samples"].shape == latent["samples"].shape


def test_parts_of_the_conditioning_a_file_lacked_are_said(model, inverted):
    import dataclasses

    trajectory = dataclasses.replace(inverted.args[1], info={**inverted.args[1].info, "left_out": ["control"]})
    assert "control" in ReconstructCheck.execute(model, trajectory).args[2]


@pytest.mark.parametrize("node", NODES)
def test_ids_and_categories(node):
    schema = node.define_schema()
    assert schema.node_id.startswith("Palimpsest") and schema.category == "Palimpsest/inversion"
    node.GET_NODE_INFO_V1()
