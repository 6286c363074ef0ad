"""Loading, memory and remembered pictures, with a stand-in for the package; the real one is in test_package.py."""

import gc
import sys
from types import ModuleType

import comfy.model_management as mm
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from palimpsest.sam import loader
from palimpsest.sam.prompts import Prompt
from palimpsest.tests.helpers.sam import KIND, random_state, stand_in

BOX = Prompt((4.0, 8.0, 20.0, 24.0))


@pytest.fixture
def predictor(monkeypatch):
    yield stand_in(monkeypatch)
    loader._recent.clear()


@pytest.fixture
def path(tmp_path, predictor):
    torch.save(random_state(), tmp_path / "a.pth")
    return str(tmp_path / "a.pth")


def picture(seed=0, height=40, width=56):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def refusal(message, call, *args):
    with pytest.raises(ValueError, match=message) as error:
        call(*args)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_the_missing_package_is_one_sentence_with_the_line_to_type(monkeypatch):
    monkeypatch.setitem(sys.modules, "segment_anything", None)
    refusal("not installed: type `python -m pip install segment-anything` with the Python that runs ComfyUI", loader.package)
    refusal("not installed", loader.load, "missing.pth")


def test_a_package_that_cannot_be_imported_says_why(monkeypatch, tmp_path):
    (tmp_path / "segment_anything.py").write_text("import a_module_nobody_has\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "segment_anything", raising=False)
    refusal("installed but cannot be imported .No module named 'a_module_nobody_has'", loader.package)


@torch.inference_mode()
def test_a_file_becomes_a_model_in_float32_without_memory_to_spare(path, tmp_path):
    model = loader.load(path)
    assert (model.name, model.kind) == ("a.pth", KIND)
    tensors = dict(model.network.named_parameters()) | dict(model.network.named_buffers())
    assert not any(tensor.is_meta for tensor in tensors.values()) and all(tensor.dtype == torch.float32 for tensor in tensors.values())
    stored = random_state()
    assert all(torch.equal(tensors[f"sam.{name}"], value) for name, value in stored.items())
    # the normalisation of every SAM, which its files do not hold
    assert model.network.sam.pixel_mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])
    assert model.network.sam.pixel_std.flatten().tolist() == pytest.approx([58.395, 57.12, 57.375])
    masks, scores = model.segment(picture(), BOX)
    assert masks.shape == (3, 40, 56) and masks.dtype == torch.bool and scores == pytest.approx([0.5, 0.9, 0.7])
    half = tmp_path / "half.safetensors"
    save_file(random_state(dtype=torch.float16), str(half))
    parameters = dict(loader.load(str(half)).network.named_parameters())
    assert all(torch.equal(parameters[f"sam.{name}"], value.half().float()) for name, value in stored.items())


def test_a_safetensors_file_that_is_overwritten_does_not_change_the_model(tmp_path, predictor):
    file = tmp_path / "a.safetensors"
    save_file(random_state(), str(file))
    model = loader.load(str(file))
    with open(file, "r+b") as opened:
        opened.write(b"\0" * file.stat().st_size)
    assert torch.equal(model.network.sam.mask_decoder.weight, random_state()["mask_decoder.weight"])


def test_damaged_files_are_refused(predictor, tmp_path, path):
    state = random_state()
    lacking = {key: value for key, value in state.items() if key != "image_encoder.blocks.1.attn.bias"}
    refusal("SAM file x.pth lacks 1 tensor, image_encoder.blocks.1.attn.bias first", loader.from_state, lacking, "x.pth")
    refusal("besides what belongs to it 1 tensor, mask_decoder.more", loader.from_state, {**random_state(), "mask_decoder.more": torch.ones(1)}, "x.pth")
    refusal("in another shape .* 1 tensor, mask_decoder.bias", loader.from_state, {**random_state(), "mask_decoder.bias": torch.ones(5)}, "x.pth")
    refusal("holds no table of tensors", loader.from_state, {"epoch": 3}, "x.pth")
    whole = open(path, "rb").read()
    save_file(state, str(tmp_path / "whole.safetensors"))
    contents = {"cut.pth": whole[: len(whole) // 2], "empty.pth": b"", "empty.safetensors": b"", "cut.safetensors": (tmp_path / "whole.safetensors").read_bytes()[:-100]}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        refusal(f"The file {name} cannot be read .*: its download may be incomplete", loader.load, str(tmp_path / name))


class Model:
    """Something that is no tensor."""


def test_pickled_program_objects_are_not_read(predictor, tmp_path, monkeypatch):
    path = str(tmp_path / "yolo.pt")
    monkeypatch.setitem(sys.modules, "ultralytics", ModuleType("ultralytics"))
    monkeypatch.setattr(Model, "__module__", "ultralytics")
    monkeypatch.setattr(sys.modules["ultralytics"], "Model", Model, raising=False)
    torch.save({"model": Model()}, path)
    refusal("yolo.pt holds program objects beside its tensors, as a YOLO does, so it was not read: choose sam_vit_b", loader.load, path)
    monkeypatch.setattr(Model, "__module__", __name__)
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or ModuleType(__name__))
    monkeypatch.setattr(sys.modules[__name__], "Model", Model, raising=False)
    torch.save({"model": Model()}, path)
    refusal("program objects beside its tensors, so it was not read", loader.load, path)


def test_a_file_is_read_once_and_the_last_one_stays(path, tmp_path, monkeypatch):
    first = loader.load(path)
    key = id(first)
    assert loader.load(path) is first
    del first
    gc.collect()
    monkeypatch.setattr(loader, "read_file", lambda path: pytest.fail("read again"))
    assert id(loader.load(path)) == key, "no wire holds it, the loader does"
    monkeypatch.undo()


def test_another_file_takes_its_place_and_a_changed_one_is_read_anew(path, tmp_path, predictor):
    first = loader.load(path)
    torch.save(random_state(seed=1), path)
    second = loader.load(path)
    assert second is not first and torch.equal(second.network.sam.mask_decoder.weight, random_state(seed=1)["mask_decoder.weight"])
    torch.save(random_state(seed=2), tmp_path / "b.pth")
    loader.load(str(tmp_path / "b.pth"))
    del first, second
    gc.collect()
    assert len(loader._loaded) == 1, "only the last one is kept"


def loaded_models():
    """The MODELs that the host has loaded, without what is left of other tests' in its list."""
    return [loaded.model for loaded in mm.current_loaded_models if loaded.model is not None]


def test_the_host_counts_it_and_frees_it(path):
    """Regression: kept by a name of ours, 2.6 GB would stay although the user pressed "free memory"."""
    from palimpsest.tests.helpers.models import patcher
    from torch import nn

    mm.unload_all_models()
    model, other = loader.load(path), patcher(nn.Linear(3, 3))
    before, _ = model.segment(picture(), BOX)
    mm.load_models_gpu([other])
    assert loaded_models() == [other, model.patcher]
    assert model.patcher.model_size() == 4 * sum(value.numel() for value in random_state().values())
    mm.unload_all_models()
    assert not loaded_models() and not model.ready, "weights are gone"
    again = loader.load(path)
    assert again is not model and torch.equal(again.segment(picture(), BOX)[0], before)
    # the object that was let go does not take the new one out of the host's list
    del model
    gc.collect()
    assert loaded_models() == [again.patcher]


def test_unloading_while_nobody_holds_it_leaves_the_hosts_list_whole(path):
    """The host walks its list by index while it unloads: an entry that vanished underneath would take another model with it."""
    from palimpsest.tests.helpers.models import patcher
    from torch import nn

    mm.unload_all_models()
    others = [patcher(nn.Linear(3, 3)) for _ in range(2)]
    mm.load_models_gpu([others[0]])
    loader.load(path).segment(picture(), BOX)
    mm.load_models_gpu([others[1]])
    gc.collect()
    keep = [loaded for loaded in mm.current_loaded_models if loaded.model in others]
    assert len(keep) == 2 and len(loaded_models()) == 3
    mm.free_memory(1e30, mm.get_torch_device(), keep)
    assert loaded_models() == [others[1], others[0]]
    assert loader.load(path).segment(picture(), BOX)[0].any()


def test_a_picture_is_encoded_once(path, predictor):
    model, ticks = loader.load(path), []
    one, _ = model.segment(picture(), BOX, tick=lambda: ticks.append(0))
    assert predictor.encoded == 1 and len(ticks) == model.steps == 2
    other, _ = model.segment(picture(), Prompt((0.0, 0.0, 8.0, 8.0)), tick=lambda: ticks.append(0))
    assert predictor.encoded == 1 and len(ticks) == 2 and not torch.equal(one, other)
    # the same bytes in another shape are another picture
    model.segment(picture().reshape(56, 40, 3), BOX)
    assert predictor.encoded == 2
    for seed in range(1, 1 + loader.KEPT):
        model.segment(picture(seed), BOX)
    model.segment(picture(), BOX)
    assert predictor.encoded == 2 + loader.KEPT + 1, "only the last few are remembered"


def test_cancel_leaves_nothing_behind(path, predictor):
    model = loader.load(path)

    def stop():
        raise mm.InterruptProcessingException

    with pytest.raises(mm.InterruptProcessingException):
        model.segment(picture(), BOX, tick=stop)
    assert not any(block._forward_hooks for block in model.network.sam.image_encoder.blocks)
    assert predictor.encoded == 0
    masks, _ = model.segment(picture(), BOX)
    assert predictor.encoded == 1 and masks[1, 8:24, 4:20].all()


def test_the_prompt_arrives_as_the_package_wants_it(path, predictor, monkeypatch):
    asked = {}

    def predict(self, **given):
        asked.update(given)
        return np.ones((1, 40, 56), bool), np.array([0.5]), None

    monkeypatch.setattr(predictor, "predict", predict)
    model = loader.load(path)
    model.segment(picture(), Prompt(None, ((5.0, 6.0), (7.0, 8.5)), (True, False)), several=False)
    assert asked["box"] is None and asked["multimask_output"] is False
    assert asked["point_coords"].tolist() == [[5, 6], [7, 8.5]] and asked["point_labels"].tolist() == [1, 0]
    model.segment(picture(), BOX)
    assert asked["point_coords"] is None and asked["point_labels"] is None and asked["box"].tolist() == [4, 8, 20, 24] and asked["multimask_output"]


def test_scores_that_are_not_finite_are_refused(path, predictor):
    predictor.scores = (float("nan"), 0.5, 0.5)
    refusal("scores that are not finite: the file a.pth holds damaged values", loader.load(path).segment, picture(), BOX)
