"""Checkpoints with two sets of weights: which is taken, what is read of the file, what is refused."""

import logging
import pickle

import pytest
import torch
from safetensors.torch import save_file

from palimpsest.instruct_pix2pix import weights
from palimpsest.instruct_pix2pix.guidance import add_image_guidance
from palimpsest.tests.helpers.instruct_pix2pix import edit_cond, picture_latent, tiny_edit
from palimpsest.tests.helpers.models import tiny_sd15
from palimpsest.tests.helpers.sampling import ksampler

ELSEWHERE = {"alphas_cumprod": torch.ones(2), "model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(3)}


def both_sets(model=None, averages=0.5):
    """An official file in small: the trained weights, their averages (here half of them) under names without dots, and other parts."""
    unet = (model or tiny_edit()).model.diffusion_model.state_dict()
    state = {f"model.diffusion_model.{name}": value.clone() for name, value in unet.items()}
    if averages is not None:
        state |= {"model_ema.diffusion_model" + name.replace(".", ""): averages * value for name, value in unet.items()}
    return {**state, **(ELSEWHERE if averages is not None else {})}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "two_sets.safetensors"
    save_file(both_sets(), str(path), {"modelspec.title": "an edit model"})
    return path


@pytest.fixture
def reads(monkeypatch):
    """Names that are read of safetensors files."""
    import safetensors

    names, original = [], safetensors.safe_open

    class Watched:
        def __init__(self, *args, **kwargs):
            self.inner = original(*args, **kwargs)

        def __enter__(self):
            self.opened = self.inner.__enter__()
            return self

        def __exit__(self, *args):
            return self.inner.__exit__(*args)

        def __getattr__(self, name):
            return getattr(self.opened, name)

        def get_tensor(self, name):
            names.append(name)
            return self.opened.get_tensor(name)

    monkeypatch.setattr(safetensors, "safe_open", Watched)
    return names


def test_the_averages_name():
    assert weights.averaged("model.diffusion_model.input_blocks.0.0.weight") == "model_ema.diffusion_modelinput_blocks00weight"


@pytest.mark.parametrize("chosen, factor", [("ema", 0.5), ("plain", 1.0)])
def test_one_set_is_read_under_the_names_that_the_host_knows(file, reads, chosen, factor):
    whole = both_sets()
    state, metadata = weights.read_checkpoint(str(file), chosen)
    assert metadata == {"modelspec.title": "an edit model"}
    assert state.keys() == {name for name in whole if not name.startswith("model_ema.")}
    for name, value in state.items():
        assert torch.equal(value, whole[name] * (factor if name.startswith("model.diffusion_model.") else 1.0))
    other = "model.diffusion_model." if chosen == "ema" else "model_ema."
    assert reads and not [name for name in reads if name.startswith(other)], "the other set takes no memory"


def test_a_pickled_file_gives_the_same(file, tmp_path):
    torch.save({"state_dict": both_sets(), "global_step": 22000}, tmp_path / "two_sets.ckpt")
    from_safetensors, from_pickle = (weights.read_checkpoint(str(path), "ema")[0] for path in (file, tmp_path / "two_sets.ckpt"))
    assert from_safetensors.keys() == from_pickle.keys() and all(torch.equal(from_pickle[name], value) for name, value in from_safetensors.items())


def refused(path, chosen, words):
    with pytest.raises(ValueError) as error:
        weights.read_checkpoint(str(path), chosen)
    message = str(error.value)
    assert words in message and path.name in message and message.endswith(".") and "\n" not in message


def test_a_file_of_one_set_says_so_when_averages_are_asked_for(tmp_path):
    path = tmp_path / "pruned.safetensors"
    save_file(both_sets(averages=None), str(path))
    refused(path, "ema", "holds one set of weights and no EMA set beside it: set weights to plain")
    assert weights.FIRST in weights.read_checkpoint(str(path), "plain")[0]


def test_a_set_with_gaps_is_refused(tmp_path):
    state, path = both_sets(), tmp_path / "gaps.safetensors"
    del state["model_ema.diffusion_modelinput_blocks00weight"]
    save_file(state, str(path))
    refused(path, "ema", "lacks 1 of")


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_another_kind_of_model_is_refused_before_it_is_read(tmp_path, reads, suffix):
    path = tmp_path / f"ordinary.{suffix}"
    state = both_sets(tiny_sd15(channel_mult=(1, 1, 1, 1)), averages=None)
    save_file(state, str(path)) if suffix == "safetensors" else torch.save(state, path)
    refused(path, "plain", "that of ordinary." + suffix + " takes 4, as an ordinary text-to-image model")
    assert reads == []


def test_what_is_no_checkpoint_is_refused(tmp_path):
    lora, damaged, code = tmp_path / "lora.safetensors", tmp_path / "damaged.safetensors", tmp_path / "code.ckpt"
    save_file({"lora_unet.weight": torch.ones(2)}, str(lora))
    refused(lora, "ema", "holds no UNet of the SD family")
    save_file(both_sets(), str(damaged))
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    refused(damaged, "ema", "cannot be read")
    code.write_bytes(pickle.dumps(OfCode()))
    refused(code, "ema", "without running what is pickled in it")
    save_file({weights.FIRST: torch.ones(1)}, str(tmp_path / "flat.safetensors"))
    refused(tmp_path / "flat.safetensors", "plain", "has the shape [1], which is no convolution")
    torch.save([torch.ones(1)], tmp_path / "list.ckpt")
    refused(tmp_path / "list.ckpt", "ema", "cannot be read")


class OfCode:
    def __reduce__(self):
        return (pytest.fail, ("code of the file ran",))


def test_a_set_that_is_not_there_by_name(file):
    refused_names = ["model.diffusion_model.input_blocks.0.0.weight"]
    with pytest.raises(ValueError, match="no set of weights called best"):
        weights.chosen(refused_names, "best", "x")


@pytest.fixture
def known_to_the_host(monkeypatch):
    """Lets the host know the small layout as it knows that of SD1.5."""
    import comfy.supported_models

    kind = comfy.supported_models.SD15_instructpix2pix
    monkeypatch.setattr(kind, "unet_config", {**kind.unet_config, "model_channels": 32})


@pytest.mark.parametrize("chosen, factor", [("ema", 0.5), ("plain", 1.0)])
def test_the_host_loads_the_chosen_set_and_samples_with_it(known_to_the_host, file, chosen, factor, caplog):
    with caplog.at_level(logging.WARNING):
        model, clip, vae = weights.load(str(file), chosen)
    assert not [record for record in caplog.records if record.message.startswith(("unet missing", "unet unexpected"))]
    expected = tiny_edit()
    with torch.no_grad():
        for parameter in expected.model.diffusion_model.parameters():
            parameter.mul_(factor)
    loaded = model.model.diffusion_model.state_dict()
    assert all(torch.equal(loaded[name].float(), value) for name, value in expected.model.diffusion_model.state_dict().items())
    positive, negative = (edit_cond(picture_latent(), seed=seed) for seed in (1, 2))
    start = torch.zeros(1, 4, 16, 16)
    assert torch.equal(ksampler(add_image_guidance(model), start, positive, negative), ksampler(add_image_guidance(expected), start, positive, negative))


def test_tensors_that_do_not_fit_are_one_sentence(known_to_the_host, tmp_path):
    state, path = both_sets(), tmp_path / "odd.safetensors"
    state["model_ema.diffusion_modelout2weight"] = torch.zeros(4, 7, 3, 3)
    save_file(state, str(path))
    with pytest.raises(ValueError, match="The tensors of odd.safetensors do not fit") as error:
        weights.load(str(path), "ema")
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
