"""From two prompts to an edited MODEL: the report, and what is refused."""

import pytest

from palimpsest.p2p.apply import Settings, apply_p2p, split_prompts
from palimpsest.tests.helpers.models import tiny_cond

SOURCE, SWAP = "a cat on a red sofa", "a dog on a red sofa"


def test_prompts_are_split_at_lines_of_three_dashes():
    assert split_prompts("a dog\n---\na --- b\n\n  ---  \nc") == ["a dog", "a --- b", "c"]
    assert split_prompts("") == [""]


def test_the_report_counts_layers_and_says_where_the_source_comes_from(model, clip, trajectory):
    report = apply_p2p(model, clip, SOURCE, SWAP, Settings(), trajectory=trajectory).report
    assert "cross-attention: 16 layers" in report and "self-attention: 11 layers, maps up to 8 x 8" in report and "direct inversion" in report
    other = apply_p2p(model, clip, "a bird on a red sofa", SWAP, Settings(), trajectory=trajectory).report
    assert "another prompt" in other and "another prompt" not in report
    assert "same noise" in apply_p2p(model, clip, SOURCE, SWAP, Settings()).report


def test_bad_input(model, clip):
    with pytest.raises(ValueError, match="There is no CLIP"):
        apply_p2p(model, None, SOURCE, SWAP, Settings())
    with pytest.raises(ValueError, match="cross window goes from 0.8 to 0.2"):
        apply_p2p(model, clip, SOURCE, SWAP, Settings(cross=(0.8, 0.2)))
    with pytest.raises(ValueError, match="other text tokens than the source prompt"):
        apply_p2p(model, clip, SOURCE, SWAP, Settings(), source_conditioning=tiny_cond(154))
    with pytest.raises(ValueError, match="has 64 values per token"):
        apply_p2p(model, clip, SOURCE, SWAP, Settings(), source_conditioning=tiny_cond(dim=64))

