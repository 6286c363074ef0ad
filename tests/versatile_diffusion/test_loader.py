"""Loading: every naming, single flows, crossed folders, number formats, memory."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from palimpsest.tests.helpers.sampling import ksampler
from palimpsest.tests.helpers.versatile import common_names, dual, single, tiny, write_files
from palimpsest.versatile_diffusion import keys, loader
from palimpsest.versatile_diffusion.files import TensorFile
from palimpsest.versatile_diffusion.keys import DIFFUSERS, OFFICIAL_2022, OFFICIAL_2023, Name
from palimpsest.versatile_diffusion.sources import CROSSED, HOST, STORED, recognise

FILES = (OFFICIAL_2022, OFFICIAL_2023, DIFFUSERS)


@pytest.fixture(scope="module")
def model():
    return tiny(seed=3)


@pytest.fixture(scope="module")
def names(model):
    return common_names(model)


def state_of(model):
    return model.model.diffusion_model.state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def refusal(message, action):
    with pytest.raises(ValueError, match=message) as error:
        action()
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("naming", FILES)
def test_every_naming_gives_the_same_model(tmp_path, model, names, naming, suffix):
    suffix = ".bin" if naming == DIFFUSERS and suffix == ".pth" else suffix
    source = recognise(str(write_files(tmp_path, naming, names, suffix)))
    assert source.naming == naming and source.sets == ("text", "image") and not source.crossed
    loaded = loader.load_model(source, precision="fp32")
    assert same(state_of(loaded), state_of(model))
    assert loaded.model.sets == ("text", "image")


@pytest.mark.parametrize("flows", ["text", "image"])
@pytest.mark.parametrize("naming", FILES)
def test_a_single_flow_reads_no_tensor_of_the_other(tmp_path, monkeypatch, model, names, naming, flows):
    source = recognise(str(write_files(tmp_path, naming, names)))
    read, plain = [], TensorFile.read
    monkeypatch.setattr(TensorFile, "read", lambda self, wanted: (read.extend(wanted), plain(self, wanted))[1])
    loaded = loader.load_model(source, flows, "fp32")
    assert same(state_of(loaded), state_of(single(model, flows)))
    stem = source.table[Name("image", "input_blocks.0.0.weight")][1]
    assert len(read) == len(state_of(loaded)) + 1 and read.count(stem) == 2, "each once, and the stem for its number format"


def test_the_hosts_own_layout_as_model_save_writes_it(tmp_path, model):
    saved = model.model.state_dict_for_saving()
    assert all(key.startswith("model.diffusion_model.") for key in saved)
    path = tmp_path / "saved.safetensors"
    save_file({key: value.contiguous() for key, value in saved.items()}, str(path))
    source = recognise(str(path))
    assert source.naming == HOST and same(state_of(loader.load_model(source, precision="fp32")), state_of(model))


@pytest.mark.parametrize("flows", ["text", "image"])
def test_what_model_save_writes_of_one_flow_is_an_ordinary_checkpoint(tmp_path, flows):
    """Regression: the help page promised that such a file can be loaded."""
    path = tmp_path / "saved.safetensors"
    saved = tiny(sets=(flows,)).model.state_dict_for_saving()
    save_file({key: value.contiguous() for key, value in saved.items()}, str(path))
    refusal("is no Versatile Diffusion but an ordinary Stable Diffusion checkpoint", lambda: recognise(str(path)))


def test_a_part_of_a_file_is_what_was_asked_for(tmp_path, monkeypatch):
    """Regression: for one tower the tensors of the other were read and copied too."""
    path = str(tmp_path / "x.safetensors")
    save_file({f"{prefix}{key}": torch.ones(1) for prefix in ("", "a.") for key in ("text_model.x", "text_projection.weight", "vision_model.x")}, path)
    read, plain = [], TensorFile.read
    monkeypatch.setattr(TensorFile, "read", lambda self, wanted: (read.extend(wanted), plain(self, wanted))[1])
    assert sorted(TensorFile(path).part("a.", ("text_model.", "text_projection."))) == ["text_model.x", "text_projection.weight"]
    assert sorted(read) == ["a.text_model.x", "a.text_projection.weight"]
    assert len(TensorFile(path).part("a.")) == 3 and len(TensorFile(path).part("")) == 6


def test_a_set_that_is_not_there(tmp_path, names):
    only = {name: value for name, value in names.items() if name.part == "image"}
    source = recognise(str(write_files(tmp_path, OFFICIAL_2023, only)))
    assert source.sets == ("image",) and loader.load_model(source).model.sets == ("image",)
    refusal('holds no attention for text contexts, only for image ones: set flows to "all"', lambda: loader.load_model(source, "text"))
    bare = {name: value for name, value in only.items() if keys.group_of(name.key) != "context"}
    refusal("no attention for texts or pictures", lambda: loader.load_model(recognise(str(write_files(tmp_path / "b", OFFICIAL_2023, bare)))))


def test_text_attention_alone_goes_with_the_image_diffuser(tmp_path, model, names):
    """Files of the sister project Prompt-Free Diffusion are like this."""
    text = {name: value for name, value in names.items() if keys.group_of(name.key) != "context" or name.part == "text"}
    loaded = loader.load_model(recognise(str(write_files(tmp_path, OFFICIAL_2023, text))), precision="fp32")
    assert loaded.model.sets == ("text",) and same(state_of(loaded), state_of(single(model, "text")))
    assert loaded.model.prompt_free
    assert not loader.load_model(recognise(str(write_files(tmp_path / "whole", OFFICIAL_2023, names))), "text").model.prompt_free


def crossed_names(names):
    other = {"text": "image", "image": "text"}
    return {Name(other[name.part], name.key) if keys.group_of(name.key) == "context" else name: value for name, value in names.items()}


@pytest.mark.parametrize("named, crossing, crossed", [
    ("VersatileDiffusionTextToImagePipeline", "auto", True), ("VersatileDiffusionPipeline", "auto", False), (None, "auto", False),
    ("VersatileDiffusionTextToImagePipeline", STORED, False), (None, CROSSED, True),
])
def test_crossed_folders(tmp_path, model, names, named, crossing, crossed):
    folder = write_files(tmp_path, DIFFUSERS, crossed_names(names) if crossed else names)
    if named:
        (folder / "model_index.json").write_text(json.dumps({"_class_name": named}))
    source = recognise(str(folder), crossing)
    assert source.crossed is crossed
    assert same(state_of(loader.load_model(source, precision="fp32")), state_of(model))
    assert ("exchanged" in loader.describe(source, model, {})) is crossed


def test_crossing_swaps_the_sets_and_nothing_else(tmp_path, names):
    path = str(write_files(tmp_path, OFFICIAL_2022, names))
    straight, crossed = (state_of(loader.load_model(recognise(path, how), precision="fp32")) for how in (STORED, CROSSED))
    norm = "middle_block.1.norm.weight"
    assert torch.equal(straight[norm], crossed[norm.replace(".norm", ".image.norm")]) and not torch.equal(straight[norm], crossed[norm])
    assert torch.equal(straight["out.2.weight"], crossed["out.2.weight"])


@pytest.mark.parametrize("single_file", [True, False])
def test_a_folder_saved_from_a_dual_pipeline_holds_both_sets_in_one_file(tmp_path, model, names, single_file):
    folder = write_files(tmp_path, DIFFUSERS, names)
    path = folder / "image_unet" / "diffusion_pytorch_model.safetensors"
    state = {}
    for key, value in load_file(path).items():
        if ".attentions." in key:
            head, number, rest = key.split(".attentions.")[0], *key.split(".attentions.")[1].split(".", 1)
            state[f"{head}.attentions.{number}.transformers.0.{rest}"] = value
            twin = names[keys.parse_diffusers(key, "text")]
            state[f"{head}.attentions.{number}.transformers.1.{rest}"] = twin
        else:
            state[key] = value
    save_file({key: value.clone() for key, value in state.items()}, str(path))
    source = recognise(str(path if single_file else folder))
    assert source.sets == ("text", "image") and same(state_of(loader.load_model(source, precision="fp32")), state_of(model))


@pytest.mark.parametrize("precision, dtype", [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32), ("auto", torch.float32)])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_number_formats(tmp_path, names, precision, dtype, stored):
    path = write_files(tmp_path, OFFICIAL_2023, {name: value.to(stored) for name, value in names.items()})
    loaded = loader.load_model(recognise(str(path)), precision=precision)
    assert {value.dtype for value in state_of(loaded).values()} == {dtype}, "on a CPU the host takes float32"


def test_weights_do_not_stay_mapped_to_the_file(tmp_path, model, names):
    for naming, suffix in ((OFFICIAL_2023, ".safetensors"), (OFFICIAL_2022, ".pth")):
        path = write_files(tmp_path, naming, names, suffix)
        loaded = loader.load_model(recognise(str(path)), precision="fp32")
        path.write_bytes(bytes(path.stat().st_size))
        assert same(state_of(loaded), state_of(model))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system does not tell what is mapped")
def test_a_pickled_file_is_mapped_and_let_go(tmp_path, names):
    """The official file takes 10 GB: no copy of it, and no lock on it after loading."""
    path = write_files(tmp_path, OFFICIAL_2022, names, ".pth")

    def mapped():
        return str(path) in Path("/proc/self/maps").read_text()

    source = recognise(str(path))
    assert mapped()
    loaded = loader.load_model(source, "image")
    del source
    assert not mapped() and loaded.model.sets == ("image",)


def test_a_loaded_model_samples(tmp_path, names):
    loaded = loader.load_model(recognise(str(write_files(tmp_path, OFFICIAL_2022, names))))
    assert torch.isfinite(ksampler(loaded, torch.zeros(1, 4, 8, 8), dual(0.5), dual(0.5, seed=5), steps=2)).all()


def test_extras_of_a_file_and_of_a_folder(tmp_path, names):
    extra = {key: torch.zeros(1) for key in ("ctx.text.model.text_projection.weight", "ctx.image.model.visual_projection.weight", "vae.image.decoder.conv_in.weight")}
    source = recognise(str(write_files(tmp_path, OFFICIAL_2023, names, extra=extra)))
    assert {kind: prefix for kind, (_, prefix) in source.extras.items()} == {"clip": "ctx.text.model.", "clip_vision": "ctx.image.model.", "vae": "vae.image."}
    folder = write_files(tmp_path / "folder", DIFFUSERS, names)
    for part in ("text_encoder", "image_encoder", "vae"):
        (folder / part).mkdir()
        save_file({"x": torch.zeros(1)}, str(folder / part / "model.fp16.safetensors"))
    assert sorted(recognise(str(folder)).extras) == ["clip", "clip_vision", "vae"]
    plain = recognise(str(write_files(tmp_path / "plain", OFFICIAL_2022, names)))
    assert plain.extras == {} and loader.load_extra("clip", plain, None) is None
