"""Which proposal is taken, batches, progress and cancel."""

import comfy.model_management as mm
import comfy.utils
import pytest
import torch

from palimpsest.sam import loader, predict
from palimpsest.sam.predict import BEST, INDEX, LARGEST, SINGLE, SMALLEST, Proposals, choose, segment_pictures
from palimpsest.sam.prompts import Prompt
from palimpsest.tests.helpers.sam import random_state, stand_in

BOX = Prompt((4.0, 8.0, 20.0, 24.0))


@pytest.fixture
def predictor(monkeypatch):
    return stand_in(monkeypatch)


@pytest.fixture
def model(predictor):
    return loader.from_state(random_state(), "small.pth")


def pictures(batch=1, height=40, width=56, channels=3, seed=0):
    return torch.rand(batch, height, width, channels, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("choice, index, taken", [(BEST, 0, 1), (SMALLEST, 0, 2), (LARGEST, 0, 0), (INDEX, 0, 0), (INDEX, 2, 2)])
def test_choices(choice, index, taken):
    assert choose((0.5, 0.3, 0.1), (0.7, 0.9, 0.8), choice, index) == taken


def test_empty_proposals_are_passed_over():
    shares, scores = (0.0, 0.3, 0.2), (0.99, 0.5, 0.6)
    assert [choose(shares, scores, choice) for choice in (BEST, SMALLEST, LARGEST)] == [2, 2, 1]
    assert choose(shares, scores, INDEX, 0) == 0, "asked for by number"
    assert choose((0.0, 0.0), (0.1, 0.2), BEST) == 1, "all are empty"


def test_choices_that_are_none_are_refused():
    with pytest.raises(ValueError, match="3 masks, counted from 0, but index is 3: set it to one of 0, 1, 2"):
        choose((0.1, 0.1, 0.1), (1, 1, 1), INDEX, 3)
    with pytest.raises(ValueError, match='no choice "median"'):
        choose((0.1,), (1,), "median")


def test_the_report_lists_what_was_proposed():
    assert Proposals((0.5, 0.125), (0.7, 0.91), 1).describe() == "mask 1 taken of 0: 50.0 % of the picture, score 0.70, 1: 12.5 % of the picture, score 0.91"
    assert Proposals((0.0, 0.125), (0.7, 0.91), 0).describe().endswith("(the mask is empty)")
    assert Proposals((0.25,), (0.5,), 0).describe() == "25.0 % of the picture, score 0.50"


@torch.inference_mode()
def test_every_choice_reaches_the_mask(model):
    def mask(choice, index=0):
        return segment_pictures(model, pictures(), BOX, choice, index)[0]

    box = torch.zeros(1, 40, 56)
    box[:, 8:24, 4:20] = 1
    inner = torch.zeros(1, 40, 56)
    inner[:, 12:20, 8:16] = 1
    assert torch.equal(mask(BEST), box) and torch.equal(mask(INDEX, 0), inner) and torch.equal(mask(SMALLEST), inner)
    assert torch.equal(mask(LARGEST), torch.ones(1, 40, 56)) and torch.equal(mask(SINGLE), box)
    assert mask(BEST).dtype == torch.float32


def test_a_batch_gives_a_mask_per_picture_in_its_order(model, predictor):
    masks, proposals = segment_pictures(model, pictures(3), Prompt(None, ((30.0, 20.0),), (True,)))
    assert masks.shape == (3, 40, 56) and len(proposals) == 3 and predictor.encoded == 3
    # the same picture twice is encoded once
    segment_pictures(model, torch.cat([pictures(1, seed=5)] * 2), BOX)
    assert predictor.encoded == 4


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_grey_and_transparent_pictures_are_taken(model, channels, monkeypatch):
    seen = []
    monkeypatch.setattr(model, "segment", lambda pixels, *rest: seen.append(pixels) or (torch.ones(1, 40, 56, dtype=torch.bool), [1.0]))
    image = torch.full((1, 40, 56, channels), 0.5)
    segment_pictures(model, image, BOX)
    # half transparent grey on white is three quarters
    assert seen[0].shape == (40, 56, 3) and abs(int(seen[0][0, 0, 0]) - (191 if channels == 4 else 128)) <= 1


def test_progress_ends_at_its_total_and_never_falls(model, monkeypatch):
    seen = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, **_: seen.append((value, total)))
    segment_pictures(model, pictures(2), BOX)
    segment_pictures(model, pictures(2), BOX)  # remembered
    half = seen.index((6, 6)) + 1
    for run in (seen[:half], seen[half:]):
        assert run[-1] == (6, 6) and [value for value, _ in run] == sorted(value for value, _ in run)
    assert len(seen[:half]) == 6 and len(seen[half:]) == 2


def test_cancel_is_heard_between_blocks_and_between_pictures(model, predictor, monkeypatch):
    calls = []

    def stop():
        calls.append(0)
        if len(calls) == 5:  # before a picture, after each of its two blocks, before the next, after its first block
            raise mm.InterruptProcessingException

    monkeypatch.setattr(mm, "throw_exception_if_processing_interrupted", stop)
    with pytest.raises(mm.InterruptProcessingException):
        segment_pictures(model, pictures(2), BOX)
    assert predictor.encoded == 1
    monkeypatch.setattr(mm, "throw_exception_if_processing_interrupted", lambda: None)
    masks, _ = segment_pictures(model, pictures(2), BOX)
    assert predictor.encoded == 2 and masks[:, 8:24, 4:20].all(), "queued again, it goes on where it was"


def test_the_choices_are_those_of_the_node_for_ever():
    assert predict.CHOICES == ("best score", "smallest", "largest", "index", "single")
