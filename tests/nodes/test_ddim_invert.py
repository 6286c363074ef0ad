"""DDIM Invert and Reconstruct Check as nodes."""

import pytest
import torch
from palimpsest.inversion import filmstrip
from palimpsest.inversion.trajectory import Trajectory, start_latent
from palimpsest.nodes.ddim_invert import NODES, DDIMInvert, ReconstructCheck
from palimpsest.tests.helpers.models import tiny_cond, tiny_sd15

SETTINGS = dict(steps=5, scheduler="ddim_uniform", guidance=1.0, iterations=1, convention="destination")


class Decoder:
    """Stands where the host's VAE stands: colours of the first three channels, eight times as large."""

    latent_channels = 4

    def __init__(self):
        self.calls = []

    def decode(self, latents):
        self.calls.append(latents)
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
    assert torch.allclose(decoder.calls[0], latent["samples"], atol=1e-4)
    assert out.args[3].shape[0] == 2


def test_decoding_the_film_strip_shows_progress_and_hears_cancel(model, latent, monkeypatch):
    """Regression: up to eight batches were decoded in one go after the bar had ended."""
    import comfy.model_management
    import comfy.utils

    bars = []

    class Bar:
        def __init__(self, total, node_id=None):
            self.total, self.value = total, 0
            bars.append(self)

        def update(self, value):
            self.value += value

        def update_absolute(self, value, total=None, preview=None):
            self.value = value

    monkeypatch.setattr(comfy.utils, "ProgressBar", Bar)
    decoder = Decoder()
    DDIMInvert.execute(model, latent, tiny_cond(), **SETTINGS, vae=decoder)
    assert {len(call) for call in decoder.calls} == {2}, "one frame of the batch at a time"
    assert any(bar.total == bar.value == len(decoder.calls) > 1 for bar in bars)

    class Cancelling(Decoder):
        def decode(self, latents):
            comfy.model_management.interrupt_current_processing()
            return super().decode(latents)

    cancelling = Cancelling()
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            DDIMInvert.execute(model, latent, tiny_cond(), **SETTINGS, vae=cancelling)
    finally:
        comfy.model_management.interrupt_current_processing(False)
    assert len(cancelling.calls) == 1


def test_the_strip_scales_noisy_latents_as_the_models_network_sees_them(latent, monkeypatch):
    """Regression: EDM models, whose data has a spread of its own, were scaled like Stable Diffusion's."""
    edm = tiny_sd15(prediction="edm", channel_mult=(1, 1, 1, 1))
    spread = edm.get_model_object("model_sampling").sigma_data = 0.5
    seen = []
    real = filmstrip.latent_to_rgb
    monkeypatch.setattr(filmstrip, "latent_to_rgb", lambda latent_format, latents: seen.append(latents) or real(latent_format, latents))
    trajectory = DDIMInvert.execute(edm, latent, tiny_cond(), **{**SETTINGS, "scheduler": "normal"}).args[1]
    expected = trajectory.latents[-1] / (float(trajectory.sigmas[-1]) ** 2 + spread**2) ** 0.5
    assert torch.allclose(seen[-1][-2:], expected, atol=1e-5)


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
