"""What cannot be learned from is refused in one sentence, before anything is computed."""

from dataclasses import replace

import pytest
import torch

from palimpsest.attention_patches.pnp import apply_pnp
from palimpsest.inversion.trajectory import Trajectory
from palimpsest.tests.helpers.models import tiny_sd15
from palimpsest.tests.helpers.visii import WIDTH, random_instruction, random_pairs, tiny_edit
from palimpsest.visii.learn import Settings
from palimpsest.visii.learn_run import run_learn

SETTINGS = Settings(steps=1, preview_every=0, checkpointing="off", choice="last")
START, PAIRS = random_instruction(), random_pairs()


@torch.inference_mode()
def learned(model, settings=SETTINGS, start=START, null=None):
    return run_learn(model, PAIRS, start, null or (start.null, {}), settings)


@pytest.fixture(scope="module")
def model():
    return tiny_edit()


@torch.inference_mode()
def edited(model):
    path = Trajectory.for_model(model, torch.tensor([0.0, 1.0]), torch.zeros(2, 1, 4, 16, 16), START.conditioning)
    return apply_pnp(model, path)[0]


REFUSED = {
    "steps": ({"settings": replace(SETTINGS, steps=0)}, "above 0"),
    "rate": ({"settings": replace(SETTINGS, learning_rate=0.0)}, "above 0"),
    "rate is nan": ({"settings": replace(SETTINGS, learning_rate=float("nan"))}, "learning_rate is nan"),
    "weight": ({"settings": replace(SETTINGS, direction_weight=-1.0)}, "direction_weight is -1"),
    "choice": ({"settings": replace(SETTINGS, choice="best")}, "chosen by one of"),
    "checkpointing": ({"settings": replace(SETTINGS, checkpointing="maybe")}, "one of auto, on, off"),
    "encoder": ({"null": (random_instruction(encoder=1).null, {})}, "another text encoder"),
    "no end": ({"start": START.with_tokens(START.tokens, end=None)}, "does not say which positions"),
    "no words": ({"start": START.with_tokens(START.tokens, end=1)}, "has no words"),
    "width": ({"start": random_instruction(width=24)}, "gives 24 values per token, but the model takes 48"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_one_sentence(model, name):
    options, words = REFUSED[name]
    with pytest.raises(ValueError, match=words) as refused:
        learned(model, **options)
    assert str(refused.value).endswith(".") and "\n" not in str(refused.value)


@pytest.mark.parametrize("make, words", [(lambda: tiny_sd15(context_dim=WIDTH, channel_mult=(1, 1, 1, 1)), "takes 4, as an ordinary text-to-image model"),
                                         (lambda: edited(tiny_edit()), "carries an edit of this pack")])
def test_other_models_are_refused(make, words):
    with pytest.raises(ValueError, match=words) as refused:
        learned(make())
    assert str(refused.value).endswith(".") and "\n" not in str(refused.value)
