"""Loading the text diffuser: every naming, crossed folders, single sets, refusals."""

import json

import pytest
import torch
from safetensors.torch import save_file

from palimpsest.tests.helpers.versatile_text import published, tiny_text
from palimpsest.versatile_diffusion import keys, text_unet_loader
from palimpsest.versatile_diffusion.dual import SETS
from palimpsest.versatile_diffusion.keys import CONTEXT, DIFFUSERS, IMAGE, OFFICIAL_2022, OFFICIAL_2023, TEXT


@pytest.fixture(scope="module")
def model():
    return tiny_text()


def write(path, state):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({key: value.clone().contiguous() for key, value in state.items()}, str(path))
    else:
        torch.save(state, path)
    return str(path)


def folder_of(path, model, pipeline="VersatileDiffusionPipeline", swap=False):
    """A diffusers folder; swap: the attention sets exchanged, as that library's text-to-image pipeline leaves them."""
    state = published(model, DIFFUSERS)
    for part, name in keys.FOLDERS.items():
        other = keys.FOLDERS[IMAGE if part == TEXT else TEXT]
        own = {}
        for key, value in state.items():
            rest = key.split(".", 1)[1]
            attention = ".attentions." in key
            if key.startswith(f"{other if swap and attention else name}."):
                own[rest] = value
        write(path / name / "diffusion_pytorch_model.safetensors", own)
    (path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    return str(path)


def load(path, contexts="both", **more):
    return text_unet_loader.load_model(text_unet_loader.recognise(path, **more), contexts, "fp32")


def same(model, other):
    ours, theirs = (each.model.diffusion_model.state_dict() for each in (model, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("naming, ending", [(OFFICIAL_2022, ".pth"), (OFFICIAL_2023, ".pth"), (OFFICIAL_2023, ".safetensors")])
def test_official_files(tmp_path, model, naming, ending):
    # with what the whole file holds beside it
    root = "model.diffusion_model.unet_image.input_blocks.0.0" if naming == OFFICIAL_2022 else "diffuser.image.data_blocks.0.0"
    path = write(tmp_path / f"vd{ending}", {**published(model, naming), f"{root}.weight": torch.ones(2, 4, 3, 3), "betas": torch.ones(3)})
    source = text_unet_loader.recognise(path)
    assert source.naming == naming and source.sets == SETS
    loaded = text_unet_loader.load_model(source, precision="fp32")
    assert same(loaded, model) and "text variation and image-to-text" in text_unet_loader.describe(source, loaded)


def test_folders(tmp_path, model):
    assert same(load(folder_of(tmp_path / "a", model)), model)
    crossed = folder_of(tmp_path / "b", model, swap=True, pipeline="VersatileDiffusionTextToImagePipeline")
    assert same(load(crossed), model) and not same(load(crossed, crossing="as stored"), model)
    assert same(load(folder_of(tmp_path / "c", model, swap=True), crossing="crossed"), model)


def test_the_file_of_text_unet_alone(tmp_path, model):
    state = {key.removeprefix("text_unet."): value for key, value in published(model, DIFFUSERS).items() if key.startswith("text_unet.")}
    source = text_unet_loader.recognise(write(tmp_path / "diffusion_pytorch_model.safetensors", state))
    assert source.sets == (TEXT,)
    loaded = text_unet_loader.load_model(source, precision="fp32")
    whole = model.model.diffusion_model.state_dict()
    assert loaded.model.sets == (TEXT,) and all(torch.equal(value, whole[key]) for key, value in loaded.model.diffusion_model.state_dict().items())
    with pytest.raises(ValueError, match="no attention for image contexts, only for text ones"):
        text_unet_loader.load_model(source, "image")


def test_what_the_host_saves(tmp_path, model):
    state = model.model.state_dict_for_saving()
    assert same(load(write(tmp_path / "saved.safetensors", state)), model)


@pytest.mark.parametrize("part, choice", [(TEXT, "as stored"), (IMAGE, "crossed")])
def test_a_saved_model_of_one_set_asks_which_it_is(tmp_path, part, choice):
    """Regression: a set for pictures alone that the host had saved was loaded as the set for texts."""
    alone = tiny_text(sets=(part,))
    path = write(tmp_path / "saved.safetensors", alone.model.state_dict_for_saving())
    refused(path, 'one attention set and does not tell .* "as stored" if it reads texts, or to "crossed" if it reads pictures')
    loaded = load(path, crossing=choice)
    assert loaded.model.sets == (part,) and same(loaded, alone)


def test_the_clip_of_a_source_is_found(tmp_path, model):
    """Regression: text variation needed the loader of the image diffuser, only to get a CLIP."""
    folder = folder_of(tmp_path / "a", model)
    assert text_unet_loader.recognise(folder).extras == {}
    write(tmp_path / "a" / "text_encoder" / "model.safetensors", {"text_projection.weight": torch.ones(2, 2)})
    file, prefix = text_unet_loader.recognise(folder).extras["clip"]
    assert (file.name, prefix) == ("model.safetensors", "")
    state = published(model, OFFICIAL_2023)
    assert text_unet_loader.recognise(write(tmp_path / "bare.pth", state)).extras == {}
    source = text_unet_loader.recognise(write(tmp_path / "vd.pth", {**state, "ctx.text.model.text_projection.weight": torch.ones(2, 2)}))
    file, prefix = source.extras["clip"]
    assert (file.name, prefix) == ("vd.pth", "ctx.text.model.")
    assert "not chosen: clip" in text_unet_loader.describe(source, model) and "clip" not in text_unet_loader.describe(source, model, object())


@pytest.mark.parametrize("contexts", SETS)
def test_one_set_alone(tmp_path, model, contexts):
    loaded = load(write(tmp_path / "vd.pth", published(model, OFFICIAL_2023)), contexts)
    assert loaded.model.sets == (contexts,)
    ours, whole = loaded.model.diffusion_model.state_dict(), model.model.diffusion_model.state_dict()
    assert len(ours) == len(whole) - 416 and not any(".image." in key for key in ours)
    expected = whole["input_blocks.1.1.norm.weight" if contexts == TEXT else "input_blocks.1.1.image.norm.weight"]
    assert torch.equal(ours["input_blocks.1.1.norm.weight"], expected)


def test_number_formats(tmp_path, model):
    path = write(tmp_path / "vd.pth", published(model, OFFICIAL_2023))
    source = text_unet_loader.recognise(path)
    for precision, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        loaded = text_unet_loader.load_model(source, precision=precision)
        assert loaded.model.get_dtype() == dtype and {value.dtype for value in loaded.model.diffusion_model.parameters()} == {dtype}


def refused(path, message, **more):
    with pytest.raises(ValueError, match=message) as error:
        load(path, **more)
    assert "\n" not in str(error.value)


def test_other_and_damaged_files_are_refused(tmp_path, model):
    refused(write(tmp_path / "sd.pth", {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(320, 4, 3, 3)}), "holds no text diffuser")
    refused(write(tmp_path / "sd2.pth", {"conv_in.weight": torch.ones(320, 4, 3, 3)}), "holds no text diffuser")
    (tmp_path / "empty").mkdir()
    refused(str(tmp_path / "empty"), "The folder empty holds no text diffuser")
    state = published(model, OFFICIAL_2023)
    without = {key: value for key, value in state.items() if key != "diffuser.text.data_blocks.13.0.in_layers.2.bias"}
    refused(write(tmp_path / "a.pth", without), "lacks 1 tensor, middle_block.2.in_layers.2.bias first")
    wrong = {**state, "diffuser.text.data_blocks.3.0.weight": torch.ones(3, 3)}
    refused(write(tmp_path / "b.pth", wrong), "another shape .* 1 tensor, input_blocks.3.0.weight first")
    refused(write(tmp_path / "c.pth", {key: value for key, value in state.items() if "time_embed" not in key}), "lacks 1 of the tensors that tell its size, time_embed.0.weight")
    bare = {key: value for key, value in state.items() if "context_blocks" not in key}
    refused(write(tmp_path / "d.pth", bare), "no attention for text contexts, nor any other")
    half = {key: value for key, value in state.items() if "diffuser.image.context_blocks.1" not in key}
    refused(write(tmp_path / "e.pth", half), "lacks")
    (tmp_path / "f.pth").write_bytes(b"")
    refused(str(tmp_path / "f.pth"), "cannot be read")


def test_cancel_while_loading(tmp_path, model, monkeypatch):
    import comfy.model_management as mm

    path = write(tmp_path / "vd.pth", published(model, OFFICIAL_2023))

    def interrupt():
        raise mm.InterruptProcessingException()

    monkeypatch.setattr(mm, "throw_exception_if_processing_interrupted", interrupt)
    with pytest.raises(mm.InterruptProcessingException):
        load(path)


def test_only_attention_changes_place_on_crossing(tmp_path, model):
    source = text_unet_loader.recognise(write(tmp_path / "vd.pth", published(model, OFFICIAL_2023)), crossing="crossed")
    assert {name.part for name in source.table if keys.group_of(name.key) == "data"} == {TEXT}
    file, key = source.table[keys.Name(TEXT, "middle_block.1.norm.weight")]
    assert key == "diffuser.image.context_blocks.6.0.norm.weight" and keys.group_of("middle_block.1.norm.weight") == CONTEXT


@pytest.mark.parametrize("naming", [OFFICIAL_2022, OFFICIAL_2023, DIFFUSERS])
def test_names_at_full_size(tmp_path, monkeypatch, naming):
    """All that a model of both sets has comes from somewhere in the published names, in the right shape; files without content."""
    import comfy.ops

    from palimpsest.tests.helpers.versatile import image_shapes, text_shapes
    from palimpsest.versatile_diffusion.text_unet import TextUNet, text_config

    whole = {keys.write(keys.Name(part, key), naming): tuple(shape) for part, table in ((IMAGE, image_shapes()), (TEXT, text_shapes())) for key, shape in table.items()}

    class Hollow:
        def __init__(self, path):
            self.name, folder = "vd.pth", path.split("/")[-2]
            self.shapes = {key.split(".", 1)[1]: shape for key, shape in whole.items() if key.startswith(f"{folder}.")} if naming == DIFFUSERS else whole

    monkeypatch.setattr(text_unet_loader, "TensorFile", Hollow)
    path = tmp_path / "vd.pth"
    if naming == DIFFUSERS:
        path = tmp_path / "vd"
        for folder in keys.FOLDERS.values():
            (path / folder).mkdir(parents=True)
            (path / folder / "diffusion_pytorch_model.fp16.bin").write_bytes(b"")
    source = text_unet_loader.recognise(str(path))
    for sets in (SETS, (TEXT,), (IMAGE,)):
        planned = {key: file.shapes[name] for key, (file, name) in text_unet_loader.plan(source, sets).items()}
        config = text_unet_loader.sizes(planned, source.title)
        assert config == text_config()
        network = TextUNet(**config, sets=sets, dtype=torch.float16, device="meta", operations=comfy.ops.disable_weight_init)
        assert planned == {key: tuple(value.shape) for key, value in network.state_dict().items()}
    if naming == DIFFUSERS:
        file, _ = text_unet_loader.plan(source, SETS)["time_embed.0.weight"]
        assert "conv_in.weight" in file.shapes and len(file.shapes["conv_in.weight"]) == 2, "the text diffuser's own copy"
