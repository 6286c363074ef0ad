"""The Concept Mask (SAM) node: schema and wiring, with a stand-in for the package."""

import sys

import pytest
import torch

from palimpsest.common.pictures import DIMMED
from palimpsest.nodes.concept_mask import ConceptMaskSAM
from palimpsest.sam import files, loader
from palimpsest.tests.helpers.sam import empty_folder, random_state, stand_in


@pytest.fixture
def folder(tmp_path, monkeypatch):
    empty_folder(monkeypatch, tmp_path)
    (tmp_path / "sams").mkdir()
    yield tmp_path / "sams"
    loader._recent.clear()


@pytest.fixture
def file(folder, monkeypatch):
    stand_in(monkeypatch)
    torch.save(random_state(), folder / "mine.pth")
    return "mine.pth"


def defaults():
    return {item.id: item.default for item in ConceptMaskSAM.define_schema().inputs if getattr(item, "default", None) is not None}


@torch.inference_mode()
def run(image, **changed):
    return ConceptMaskSAM.execute(image=image, **{**defaults(), **changed}).args


def pictures(batch=1, height=40, width=56, channels=3):
    return torch.rand(batch, height, width, channels, generator=torch.Generator().manual_seed(0))


def test_ids_and_order_of_inputs_are_for_ever():
    schema = ConceptMaskSAM.define_schema()
    assert schema.node_id == "PalimpsestConceptMaskSAM"
    assert [item.id for item in schema.inputs] == ["image", "sam_name", "x1", "y1", "x2", "y2", "points", "choice", "index"]
    assert [item.id for item in schema.outputs] == ["mask", "preview", "report"]


def test_without_a_file_or_the_package_the_node_says_what_to_do_when_it_runs(folder, monkeypatch):
    assert ConceptMaskSAM.define_schema().inputs[1].options == [files.NONE_FOUND]
    assert ConceptMaskSAM.validate_inputs(files.NONE_FOUND) is True, "the graph can be queued"
    monkeypatch.setitem(sys.modules, "segment_anything", None)
    with pytest.raises(ValueError, match="python -m pip install segment-anything"):
        run(pictures(), x2=20, y2=20)
    stand_in(monkeypatch)
    with pytest.raises(ValueError, match="There is no SAM file yet: put sam_vit_b_01ec64.pth"):
        run(pictures(), x2=20, y2=20)


def test_box_to_mask_preview_and_report(file):
    image = pictures()
    mask, shown, report = run(image, x1=4, y1=8, x2=20, y2=24)
    assert mask.shape == (1, 40, 56) and mask[0, 8:24, 4:20].all() and mask.sum() == 256
    assert shown.shape == (1, 40, 56, 3) and torch.allclose(shown[0, 35, 50], image[0, 35, 50] * DIMMED, atol=0.01)
    assert report.splitlines()[0] == "SAM vit_small from mine.pth: box 4, 8, 20, 24"
    assert report.splitlines()[1].startswith("mask 1 taken of 0: 2.9 % of the picture, score 0.50, 1: 11.4 %")


def test_every_widget_reaches_the_mask(file):
    image = pictures(2)
    box = {"x1": 4, "y1": 8, "x2": 20, "y2": 24}
    assert run(image, **box, choice="index", index=2)[0].sum() == 2 * 40 * 56
    assert run(image, **box, choice="smallest")[0].sum() == 2 * 64
    mask, _, report = run(image, points="30, 20, +")
    assert mask[:, 12:28, 22:38].all() and mask.sum() == 2 * 256
    assert report.splitlines()[0].endswith(": 1 + point") and [line.split(":")[0] for line in report.splitlines()[1:]] == ["picture 1", "picture 2"]


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_transparent_pictures(file, channels):
    mask, shown, _ = run(pictures(channels=channels), x2=20, y2=20)
    assert mask.shape == (1, 40, 56) and shown.shape == (1, 40, 56, 3)


@pytest.mark.parametrize("message, changed", [
    ("Nothing says where the concept is", {}),
    ("reaches beyond the picture of 56 x 40 px", {"x2": 57, "y2": 40}),
    ("has no area", {"x1": 30, "x2": 20, "y2": 20}),
    ("Cannot read the point", {"points": "here"}),
    ("outside the picture of 56 x 40 px", {"points": "40, 50, +"}),
])
def test_wrong_prompts_are_refused_before_anything_is_loaded(file, monkeypatch, message, changed):
    monkeypatch.setattr(loader, "load", lambda path: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        run(pictures(), **changed)


def test_a_replaced_file_is_loaded_anew(file, folder):
    before = ConceptMaskSAM.fingerprint_inputs(sam_name=file)
    torch.save(random_state(dtype=torch.float16), folder / file)
    assert ConceptMaskSAM.fingerprint_inputs(sam_name=file) != before
    assert ConceptMaskSAM.fingerprint_inputs(sam_name=None) == ConceptMaskSAM.fingerprint_inputs(sam_name="gone") == ""
