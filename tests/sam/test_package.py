"""The real package segment-anything, where it is installed: a small Sam with random weights, and the shapes of the official ones."""

import comfy.model_management as mm
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from palimpsest.sam import kinds, loader
from palimpsest.sam.predict import segment_pictures
from palimpsest.sam.prompts import Prompt
from palimpsest.tests.helpers.sam import KIND, known, random_state, small_sam

package = pytest.importorskip("segment_anything", reason="the optional package segment-anything is not installed")

PROMPTS = {
    "box": Prompt((10.0, 12.0, 60.0, 40.0)),
    "points": Prompt(None, ((30.0, 20.0), (80.0, 50.0)), (True, False)),
    "box and point": Prompt((10.0, 12.0, 60.0, 40.0), ((30.0, 20.0),), (False,)),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    known(monkeypatch)
    monkeypatch.setitem(package.sam_model_registry, KIND, small_sam)
    yield
    loader._recent.clear()


def picture(height=50, width=90, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def reference(prompt, several, state):
    """What the package says when it is used as its README does."""
    sam = small_sam()
    sam.load_state_dict(state)
    predictor = package.SamPredictor(sam)
    predictor.set_image(picture())
    masks, scores, _ = predictor.predict(
        point_coords=np.array(prompt.points) if prompt.points else None, point_labels=np.array(prompt.wanted, int) if prompt.points else None,
        box=np.array(prompt.box) if prompt.box else None, multimask_output=several,
    )
    return torch.from_numpy(masks), scores.tolist()


@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("name", PROMPTS)
def test_masks_are_those_of_the_package(name, several):
    state = random_state(small_sam(), seed=3)
    expected, scores = reference(PROMPTS[name], several, state)
    model = loader.from_state(dict(state), "small.pth")
    for guard in (torch.inference_mode, torch.no_grad):
        with guard():
            masks, found = model.segment(picture(), PROMPTS[name], several)
        assert torch.equal(masks, expected) and found == pytest.approx(scores, abs=1e-6)
    assert masks.shape == (3 if several else 1, 50, 90)


def test_random_weights_give_masks_that_differ():
    """The comparison above could not fail if every mask were full or empty."""
    masks, _ = reference(PROMPTS["points"], True, random_state(small_sam(), seed=3))
    shares = masks.float().mean((1, 2))
    assert bool(((shares > 0.02) & (shares < 0.98)).any())


@pytest.mark.parametrize("kind", kinds.KINDS.values())
def test_the_official_kinds_are_known_by_their_own_tensors(kind):
    if kind == KIND:
        pytest.skip("only in this test module")
    with torch.device("meta"):
        state = package.sam_model_registry[kind]().state_dict()
    assert kinds.recognise(state, "renamed.pth") == kind
    assert state["image_encoder.pos_embed"].shape[1:3] == (64, 64)


@torch.inference_mode()
def test_files_of_any_format_give_the_model_as_the_host_runs_it(tmp_path):
    state = random_state(small_sam(), seed=3)
    torch.save(state, tmp_path / "a.pth")
    save_file({name: value.half() for name, value in state.items()}, str(tmp_path / "b.safetensors"))
    image = torch.from_numpy(picture())[None].float() / 255
    expected, _ = reference(PROMPTS["box"], True, state)
    masks, proposals = segment_pictures(loader.load(str(tmp_path / "a.pth")), image, PROMPTS["box"], "index", 1)
    assert torch.equal(masks[0].bool(), expected[1])
    assert proposals[0].shares == pytest.approx(expected.float().mean((1, 2)).tolist())
    half, _ = segment_pictures(loader.load(str(tmp_path / "b.safetensors")), image, PROMPTS["box"], "index", 1)
    assert float((half != masks).float().mean()) < 0.05


def test_the_host_moves_it_and_a_cancel_in_the_encoder_leaves_it_whole(tmp_path):
    model = loader.from_state(random_state(small_sam(), seed=3), "small.pth")
    ticks = []

    def stop():
        ticks.append(0)
        if len(ticks) == 2:
            raise mm.InterruptProcessingException

    with pytest.raises(mm.InterruptProcessingException):
        model.segment(picture(), PROMPTS["box"], tick=stop)
    assert any(loaded.model is model.patcher for loaded in mm.current_loaded_models)
    masks, _ = model.segment(picture(), PROMPTS["box"])
    assert torch.equal(masks, reference(PROMPTS["box"], True, random_state(small_sam(), seed=3))[0])


def test_sams_own_device_cannot_be_written_which_is_why_it_is_wrapped():
    with pytest.raises(AttributeError):
        small_sam().device = torch.device("cpu")


def test_points_on_the_picture_move_with_its_size():
    """A long picture is scaled to the encoder's size; coordinates are those of the picture that was given."""
    model = loader.from_state(random_state(small_sam(), seed=3), "small.pth")
    with torch.no_grad():
        near, _ = model.segment(picture(30, 300), Prompt(None, ((5.0, 5.0),), (True,)))
        far, _ = model.segment(picture(30, 300), Prompt(None, ((295.0, 25.0),), (True,)))
    assert near.shape == (3, 30, 300) and not torch.equal(near, far)
