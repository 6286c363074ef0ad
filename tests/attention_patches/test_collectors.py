"""Collectors: read after the run, and say why they are empty."""

from dataclasses import dataclass

import pytest
import torch

from palimpsest.attention_patches.blocks import Point
from palimpsest.attention_patches.collectors import Collector
from palimpsest.attention_patches.edit import Edit
from palimpsest.attention_patches.reference_pass import add_edit
from palimpsest.tests.helpers.sampling import ksampler


@dataclass(frozen=True, eq=False)
class Counting(Edit):
    """Counts the tokens it meets at one layer, without a source and without changing anything."""

    target: Collector | None = None
    floor: float = 0.0

    @property
    def collector(self):
        return self.target

    def points(self, sigma):
        return frozenset({Point("attn1", "middle", 0)} if sigma > self.floor else ())

    def attention(self, point, n, context, value, source):
        self.target.add(point, self.target.get(point, 0) + n.shape[1])
        return n, context, value


def test_a_run_fills_it_and_the_next_run_starts_anew(model, positive, negative, start):
    collector = Collector("token counts")
    edited = add_edit(model, Counting(target=collector))
    for _ in range(2):
        assert torch.equal(ksampler(edited, start, positive, negative, disable_noise=True), ksampler(model, start, positive, negative, disable_noise=True))
        assert collector.read() == {Point("attn1", "middle", 0): 4 * 2 * 2}  # four steps, 2x2 tokens


def test_an_empty_one_says_why(model, positive, negative, start):
    import comfy.model_management

    collector = Collector("token counts")
    with pytest.raises(ValueError, match="no token counts to show because the patched MODEL has not been sampled"):
        collector.read()
    edited = add_edit(model, Counting(target=collector, floor=1e9))
    ksampler(edited, start, positive, negative)
    with pytest.raises(ValueError, match="because the run visited no step"):
        collector.read()

    edited = add_edit(model, Counting(target=collector))

    def cancel(args):
        raise comfy.model_management.InterruptProcessingException()

    edited.set_model_sampler_post_cfg_function(cancel)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        ksampler(edited, start, positive, negative)
    with pytest.raises(ValueError, match="because the last run was cancelled"):
        collector.read()
