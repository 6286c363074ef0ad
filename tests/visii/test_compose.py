"""Instructions from text, joined with words, weaker, stronger, averaged; and which text encoder one belongs to."""

import pytest
import torch

from palimpsest.tests.helpers.prompts import WordClip
from palimpsest.tests.helpers.visii import random_instruction
from palimpsest.visii.compose import blend, combine, strengthen
from palimpsest.visii.instruction import Instruction, check_same_encoder
from palimpsest.visii.start import encode, from_text, null_text

CLIP = WordClip(width=16)
LEARNED = from_text(CLIP, "a painting of a small brown dog")


def sentence(refused):
    assert str(refused.value).endswith(".") and "\n" not in str(refused.value)
    return str(refused.value)


def test_a_start_text_is_its_encoding_and_its_words_are_what_is_learned():
    tokens, _ = encode(CLIP, "a painting of a small brown dog", "text")
    assert torch.equal(LEARNED.tokens, tokens) and LEARNED.end == 8 and LEARNED.text == "a painting of a small brown dog"
    assert torch.equal(LEARNED.null, null_text(CLIP)[0])
    # the end token stands where the words end
    assert CLIP.tokenize("a painting of a small brown dog")["l"][0][LEARNED.end][0] == 49407
    assert len(LEARNED.conditioning) == 1 and torch.equal(LEARNED.conditioning[0][0], tokens) and LEARNED.conditioning[0][1] == {}


def test_pooled_vectors_stay():
    found = from_text(WordClip(width=16, pooled=6), "a cat")
    assert found.conditioning[0][1]["pooled_output"].shape == (1, 6) and torch.equal(found.conditioning[0][1]["pooled_output"], found.pooled)


@pytest.mark.parametrize("text", ["", "   "])
def test_an_empty_start_text_is_refused(text):
    with pytest.raises(ValueError, match="start text is empty") as refused:
        from_text(CLIP, text)
    sentence(refused)


def test_a_start_text_longer_than_the_window_is_refused():
    assert from_text(CLIP, "cat " * 75).end == 76
    with pytest.raises(ValueError, match=r"start text has 76 tokens, but an instruction has one window of 77 with room for 75") as refused:
        from_text(CLIP, "cat " * 76)
    sentence(refused)


def test_a_clip_that_changes_during_sampling_is_refused():
    class Scheduled(WordClip):
        def encode_from_tokens_scheduled(self, tokens, **kwargs):
            return super().encode_from_tokens_scheduled(tokens) * 2

    with pytest.raises(ValueError, match="CLIP carries hooks") as refused:
        from_text(Scheduled(width=16), "a cat")
    sentence(refused)


def test_words_follow_two_positions_after_the_end_with_their_start_token():
    found = combine(LEARNED, CLIP, "a red hat")
    extra, _ = encode(CLIP, "a red hat", "text")
    assert torch.equal(found.tokens[:, :10], LEARNED.tokens[:, :10]), "the end token and one of padding stay"
    assert torch.equal(found.tokens[:, 10:14], extra[:, :4]), "start token and three words, no end token"
    assert torch.equal(found.tokens[:, 14:], LEARNED.tokens[:, 14:])
    assert found.end == 14 and found.text.endswith("+ a red hat") and torch.equal(found.null, LEARNED.null)


def test_words_can_be_added_again():
    twice = combine(combine(LEARNED, CLIP, "a red hat"), CLIP, "snow")
    extra, _ = encode(CLIP, "snow", "text")
    assert torch.equal(twice.tokens[:, 16:18], extra[:, :2])


def test_words_must_fit():
    # position 10 is the first: 67 are left, one is the start token
    assert combine(LEARNED, CLIP, "cat " * 66).tokens.shape == (1, 77, 16)
    with pytest.raises(ValueError, match=r"The text has 67 tokens, but behind the instruction's 7 there is room for 66 \(of 77 positions\)") as refused:
        combine(LEARNED, CLIP, "cat " * 67)
    sentence(refused)
    with pytest.raises(ValueError, match="there is room for 0"):
        combine(from_text(CLIP, "cat " * 75), CLIP, "dog")


@pytest.mark.parametrize("text, words", [("", "no words to add"), ("cat " * 80, "one window of 77")])
def test_other_texts_are_refused(text, words):
    with pytest.raises(ValueError, match=words) as refused:
        combine(LEARNED, CLIP, text)
    sentence(refused)


def test_an_instruction_without_a_known_end_takes_no_words():
    with pytest.raises(ValueError, match="does not say where its words end") as refused:
        combine(LEARNED.with_tokens(LEARNED.tokens, end=None), CLIP, "a hat")
    sentence(refused)


@pytest.mark.parametrize("clip, words", [(WordClip(width=16, seed=1), "empty texts differ by"), (WordClip(width=24), "of 16 values, but the connected CLIP gives 77 of 24")])
def test_another_text_encoder_is_refused(clip, words):
    with pytest.raises(ValueError, match=words) as refused:
        combine(LEARNED, clip, "a hat")
    assert "another text encoder" in sentence(refused)


def test_rounding_does_not_make_another_encoder():
    check_same_encoder(LEARNED, LEARNED.null.to(torch.bfloat16), "it")
    check_same_encoder(LEARNED, LEARNED.null.half(), "it")


def test_strength_moves_away_from_the_empty_text():
    assert strengthen(LEARNED, 1.0) is LEARNED
    assert torch.equal(strengthen(LEARNED, 0.0).tokens, LEARNED.null)
    assert torch.allclose(strengthen(LEARNED, 1.5).tokens, LEARNED.null + 1.5 * (LEARNED.tokens - LEARNED.null), atol=1e-5)
    assert strengthen(LEARNED, 0.5).end == LEARNED.end
    with pytest.raises(ValueError, match="finite number"):
        strengthen(LEARNED, float("nan"))


def test_the_average_is_that_of_the_positions():
    other = from_text(CLIP, "an oil painting of a small house by the sea")
    found = blend(LEARNED, other, 0.25)
    assert torch.allclose(found.tokens, 0.75 * LEARNED.tokens + 0.25 * other.tokens, atol=1e-6)
    assert found.end == max(LEARNED.end, other.end) and torch.equal(found.null, LEARNED.null)
    assert blend(LEARNED, other, 0.0) is LEARNED and blend(LEARNED, other, 1.0) is other
    assert blend(LEARNED, other.with_tokens(other.tokens, end=None), 0.5).end is None
    assert torch.allclose(blend(random_instruction(pooled=4), random_instruction(seed=1, pooled=4), 0.5).pooled,
                          (random_instruction(pooled=4).pooled + random_instruction(seed=1, pooled=4).pooled) / 2)


@pytest.mark.parametrize(
    "other, share, words",
    [
        (random_instruction(encoder=1), 0.5, "another text encoder"),
        (random_instruction(tokens=14), 0.5, "another text encoder"),
        (random_instruction(pooled=4), 0.5, "pooled vector"),
        (random_instruction(seed=1), 1.5, "between 0 and 1"),
    ],
)
def test_what_cannot_be_averaged_is_refused(other, share, words):
    with pytest.raises(ValueError, match=words) as refused:
        blend(random_instruction(), other, share)
    sentence(refused)


@pytest.mark.parametrize(
    "parts, words",
    [
        ((torch.zeros(2, 7, 4), torch.zeros(2, 7, 4), 3), r"shape \[1, T, C\]"),
        ((torch.zeros(1, 7, 4), torch.zeros(1, 7, 5), 3), r"shape \[1, T, C\]"),
        ((torch.full((1, 7, 4), float("nan")), torch.zeros(1, 7, 4), 3), "NaN"),
        ((torch.zeros(1, 7, 4), torch.zeros(1, 7, 4), 7), "not at 7"),
        ((torch.zeros(1, 7, 4), torch.zeros(1, 7, 4), 0), "not at 0"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts, words):
    with pytest.raises(ValueError, match=words):
        Instruction(*parts)


def test_an_instruction_made_in_inference_mode_can_be_trained():
    with torch.inference_mode():
        made = Instruction(torch.randn(1, 7, 4), torch.randn(1, 7, 4), 3)
    assert not made.tokens.is_inference() and not made.conditioning[0][0].is_inference()
