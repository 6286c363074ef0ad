"""The InstructPix2Pix nodes: schema, wiring, and a whole edit on the stock sampler."""

import pytest
import torch
from safetensors.torch import save_file

from palimpsest.instruct_pix2pix import files
from palimpsest.instruct_pix2pix.guidance import add_image_guidance
from palimpsest.mini import checkpoint
from palimpsest.mini.storage import read_weights
from palimpsest.nodes.instruct_pix2pix import InstructPix2PixCFG, InstructPix2PixConditioning, InstructPix2PixLoader
from palimpsest.tests.helpers.instruct_pix2pix import Calls, dual_cfg, relative, tiny_edit
from palimpsest.tests.helpers.models import tiny_cond
from palimpsest.tests.helpers.sampling import custom_advanced, ksampler, latent_noise, schedule
from palimpsest.tests.helpers.seecoder import random_picture

NODES = (InstructPix2PixCFG, InstructPix2PixConditioning, InstructPix2PixLoader)


@pytest.fixture(scope="module")
def model():
    return tiny_edit()


@pytest.fixture(scope="module")
def vae():
    return checkpoint.load_vae(read_weights(checkpoint.WEIGHTS / "autoencoder.safetensors")[0])


def defaults(node):
    return {item.id: item.default for item in node.define_schema().inputs if getattr(item, "default", None) is not None}


def guided(model, **changed):
    (out,) = InstructPix2PixCFG.execute(model=model, **{**defaults(InstructPix2PixCFG), **changed}).args
    return out


@torch.inference_mode()
def conditioned(vae, image, **changed):
    return InstructPix2PixConditioning.execute(positive=tiny_cond(seed=1), negative=tiny_cond(seed=2), vae=vae, image=image, **{"longer_side": 128, **changed}).args


def test_ids_and_order_of_inputs_are_for_ever():
    assert [node.define_schema().node_id for node in NODES] == [
        "PalimpsestInstructPix2PixCFG", "PalimpsestInstructPix2PixConditioning", "PalimpsestInstructPix2PixLoader"]
    assert [[item.id for item in node.define_schema().inputs] for node in NODES] == [
        ["model", "image_scale", "start", "end", "separate_call"], ["positive", "negative", "vae", "image", "longer_side", "mask"], ["ckpt_name", "weights"]]
    assert [[item.display_name for item in node.define_schema().outputs] for node in NODES] == [
        ["model"], ["positive", "negative", "no_image", "latent", "image"], ["model", "clip", "vae"]]


def test_defaults_are_the_published_ones():
    assert defaults(InstructPix2PixCFG) == {"image_scale": 1.5, "start": 0.0, "end": 1.0, "separate_call": "auto"}
    assert defaults(InstructPix2PixConditioning) == {"longer_side": 512} and defaults(InstructPix2PixLoader)["weights"] == "ema"


def test_every_input_reaches_the_guidance(model, vae):
    positive, negative, _, latent, _ = conditioned(vae, random_picture(128, 128))

    def picture(**changed):
        return ksampler(guided(model, **changed), latent, positive, negative, steps=5)

    standard = picture()
    assert torch.equal(standard, ksampler(add_image_guidance(model, 1.5), latent, positive, negative, steps=5))
    assert not any(torch.equal(picture(**changed), standard) for changed in (dict(image_scale=2.0), dict(start=0.4), dict(end=0.6)))
    assert torch.equal(picture(image_scale=1.0), ksampler(model, latent, positive, negative, steps=5))
    calls = Calls()
    ksampler(calls.on(guided(model, separate_call="on")), latent, positive, negative, steps=1)
    assert calls.lists == [(False, True), (True, True)]


def test_every_input_reaches_the_conditioning(vae):
    image, mask = random_picture(200, 300), torch.ones(1, 200, 300)
    mask[..., :150] = 0
    *_, latent, shown = conditioned(vae, image, mask=mask)
    assert shown.shape == (1, 128, 192, 3) and latent["noise_mask"].shape == (1, 1, 128, 192)
    assert conditioned(vae, image, longer_side=0)[4].shape == (1, 200, 296, 3) and "noise_mask" not in conditioned(vae, image)[3]


def test_the_third_conditioning_serves_dual_cfg_guider(model, vae):
    positive, negative, no_image, latent, _ = conditioned(vae, random_picture(128, 128))
    ours = custom_advanced(guided(model), latent, positive, negative, schedule(model, 3), cfg=5.0, noise=latent_noise(1, 4, 16, 16, seed=4))
    assert relative(dual_cfg(model, positive, negative, no_image, 5.0, 1.5), ours) < 1e-4


@pytest.fixture
def folder(tmp_path, monkeypatch):
    import comfy.supported_models
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, files.FOLDER, ([str(tmp_path)], folder_paths.supported_pt_extensions))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    kind = comfy.supported_models.SD15_instructpix2pix
    monkeypatch.setattr(kind, "unet_config", {**kind.unet_config, "model_channels": 32})
    return tmp_path


def test_the_loader_lists_loads_and_explains(folder):
    assert InstructPix2PixLoader.define_schema().inputs[0].options == [files.NONE_FOUND]
    assert "put instruct-pix2pix-00-22000.safetensors" in InstructPix2PixLoader.validate_inputs(files.NONE_FOUND)
    with pytest.raises(ValueError, match="There is no checkpoint yet"):
        InstructPix2PixLoader.execute(files.NONE_FOUND, "ema")
    unet = tiny_edit().model.diffusion_model.state_dict()
    plain = {f"model.diffusion_model.{name}": value for name, value in unet.items()}
    save_file(plain | {"model_ema.diffusion_model" + name.replace(".", ""): value * 2 for name, value in unet.items()}, str(folder / "edit.safetensors"))
    before = InstructPix2PixLoader.fingerprint_inputs("edit.safetensors")
    assert InstructPix2PixLoader.define_schema().inputs[0].default == "edit.safetensors" and InstructPix2PixLoader.validate_inputs("edit.safetensors") is True
    first = [InstructPix2PixLoader.execute("edit.safetensors", chosen).args[0].model.diffusion_model.state_dict()["out.2.bias"] for chosen in ("ema", "plain")]
    assert torch.equal(first[0], first[1] * 2) and torch.equal(first[1], unet["out.2.bias"])
    save_file(plain, str(folder / "edit.safetensors"))
    assert InstructPix2PixLoader.fingerprint_inputs("edit.safetensors") != before, "a file that was replaced is loaded anew"
    with pytest.raises(ValueError, match="no EMA set beside it: set weights to plain"):
        InstructPix2PixLoader.execute("edit.safetensors", "ema")
    # a name that comes from another node is None until that node has run
    assert InstructPix2PixLoader.validate_inputs(None) is True and InstructPix2PixLoader.fingerprint_inputs(None) == ""
