"""Tokens and words through the host's real tokenizers."""

import pytest
import torch
from safetensors.torch import save_file

from palimpsest.p2p.tokens import owners, read_tokens
from palimpsest.tests.p2p.conftest import text_only

BOS, EOS = 49406, 49407


def spelled(prompt, word):
    return [prompt.tokens[position].text for position in prompt.positions(word)]


def embedding_clip(folder, kind="sd1", **files):
    """A CLIP whose folder holds the textual inversions `files` (name: tensors by key)."""
    import comfy.sd1_clip
    import comfy.sdxl_clip

    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")
    tokenizer = comfy.sd1_clip.SD1Tokenizer if kind == "sd1" else comfy.sdxl_clip.SDXLTokenizer
    return text_only(tokenizer(embedding_directory=str(folder)))


def test_published_prompts_have_the_published_tokens(cases, read):
    for pair in cases["pairs"].values():
        for side in ("source", "target"):
            ids, pieces = pair[f"{side}_ids"], pair[f"{side}_pieces"]
            prompt = read(pair[side])
            if len(ids) <= 77:
                assert [token.id for token in prompt.tokens[:len(ids)]] == ids
                assert [token.text for token in prompt.tokens[:len(ids)]] == pieces
            assert [token.id for token in prompt.content] == ids[1:-1]
            assert prompt.words == tuple(pair[side].split())


def test_published_word_positions(cases, read):
    # what the published code does not find and this one does: case, punctuation, phrases
    more = {"case_wrong": (2,), "punct_missing": (2,), "two_words": (3, 4)}
    assert len(cases["words"]) > 10
    for name, case in cases["words"].items():
        prompt = read(case["text"])
        if isinstance(case["word"], int):
            found = prompt.by_word[case["word"]]
        else:
            found = prompt.positions(case["word"])
        assert found == more.get(name, tuple(case["inds"])), name
    assert {name for name, case in cases["words"].items() if not case["inds"]} == {*more, "absent"}


def test_layout_of_a_short_prompt(read):
    prompt = read("A red car")
    assert prompt.length == len(prompt.tokens) == 77
    assert [token.position for token in prompt.tokens] == list(range(77))
    assert [token.word for token in prompt.tokens[:6]] == [None, 0, 1, 2, None, None]
    assert prompt.tokens[0].id == BOS and prompt.tokens[4].id == EOS and prompt.tokens[4].text == "<|endoftext|>"
    assert prompt.tokens[5].text == "" and prompt.marks == ((0, *range(4, 77)),)
    assert [token.text for token in prompt.content] == ["a", "red", "car"]


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_an_empty_prompt_has_no_words(read, text):
    prompt = read(text)
    assert prompt.words == () and prompt.content == () and prompt.length == 77 and prompt.positions("a") == () and prompt.positions("") == ()


def test_every_encoder_gives_the_same_words(sd1, sd2, sdxl):
    text = "a (silver:1.3) cat, sitting on lasagne"
    prompts = [read_tokens(clip, text) for clip in (sd1, sd2, sdxl)]
    for prompt in prompts:
        assert prompt.by_word == prompts[0].by_word and prompt.words == prompts[0].words
        assert [token.key for token in prompt.content] == [token.key for token in prompts[0].content]
    assert prompts[1].tokens[-1].id == 0 and prompts[1].tokens[-1].text == "", "SD2 pads with another id"
    assert prompts[1].marks == prompts[0].marks


def test_weights_are_no_words(read):
    plain, weighted = read("a big red car"), read("a ((big) (red:1.5)) car")
    assert weighted.words == plain.words == ("a", "big", "red", "car")
    assert weighted.by_word == plain.by_word
    assert [round(token.weight, 4) for token in weighted.content] == [1.0, 1.21, 1.5, 1.0]
    assert weighted.text == "a ((big) (red:1.5)) car"


def test_a_weight_inside_a_word_does_not_split_it(read):
    prompt = read("two (cat:1.2)s sleep")
    assert prompt.words == ("two", "cats", "sleep")
    assert spelled(prompt, "cats") == ["cat", "s"] and spelled(prompt, "sleep") == ["sleep"]


def test_escaped_brackets_belong_to_the_text(read):
    prompt = read(r"a \(smiling\) cat \(orange:1.2\)")
    assert prompt.words == ("a", "(smiling)", "cat", "(orange:1.2)")
    assert spelled(prompt, "(smiling)") == ["(", "smiling", ")"]
    assert spelled(prompt, "smiling") == ["smiling"], "punctuation around a word is not the word"
    assert {token.weight for token in prompt.content} == {1.0}


def test_break_is_a_word_as_any_other(read):
    prompt = read("a cat BREAK a dog")
    assert prompt.length == 77 and prompt.words[2] == "BREAK" and spelled(prompt, "BREAK") == ["break"]


def test_exact_words_come_first(read):
    prompt = read("A cat, a Cat and a cat. The red, big cat")
    assert prompt.positions("Cat") == prompt.by_word[3]
    assert prompt.positions("cat") == prompt.by_word[10]
    assert spelled(prompt, "CAT") == ["cat"] * 4, "any case, without the comma and the point"
    assert spelled(prompt, "cat,") == ["cat", ","]
    assert spelled(prompt, "red big cat") == ["red", "big", "cat"]
    assert prompt.positions("big red cat") == () and prompt.positions("ca") == () and prompt.positions(",") == ()


def test_repeated_words_and_phrases_are_all_found(read):
    prompt = read("a red car and a red car near a blue car")
    assert prompt.positions("red car") == (2, 3, 6, 7)
    assert prompt.positions("car") == (3, 7, 11)


def test_spaces_and_line_ends_do_not_shift_words(read):
    # the published walk drifts here
    prompt = read("a  big\n\nlasagne \t on   a table ")
    assert prompt.words == ("a", "big", "lasagne", "on", "a", "table")
    assert spelled(prompt, "table") == ["table"] and spelled(prompt, "lasagne") == ["lasag", "ne"]


@pytest.mark.parametrize("text, word, count", [
    ("un \u00e9l\u00e9phant \u00e0 Paris", "\u00c9l\u00e9phant", None), ("a \U0001f408 on grass", "\U0001f408", None),
    ("\u732b\u304c\u5bdd\u308b cat", "\u732b\u304c\u5bdd\u308b", None), ("cafe\u0301 at noon", "cafe\u0301", 1)])
def test_words_beyond_ascii(read, text, word, count):
    prompt = read(text)
    found = prompt.positions(word)
    assert found and (count is None or len(found) == count)
    assert [token.word for token in prompt.content] == sorted(token.word for token in prompt.content)
    assert {token.word for token in prompt.content} == set(range(len(prompt.words)))


def test_long_prompts_are_counted_over_chunks(read):
    text = " ".join(f"w{k % 10}" for k in range(60)) + " lasagne end"  # 60 words of two tokens
    prompt = read(text)
    assert prompt.length == 154 and len(prompt.chunks) == 2
    assert [chunk[0].id for chunk in prompt.chunks] == [BOS, BOS]
    assert prompt.tokens[76].id == EOS and prompt.tokens[76].word is None and prompt.tokens[77].word is None
    assert prompt.tokens[75].word == 37 and prompt.tokens[78].word == 37, "a word of two tokens on both sides of the cut"
    assert prompt.positions("lasagne") == (77 + 1 + 45, 77 + 1 + 46) and prompt.positions("end") == (77 + 1 + 47,)
    assert prompt.marks[0] == (0, 76) and prompt.marks[1][:2] == (77, 126) and len(prompt.marks[1]) == 77 - 48


def test_a_short_segment_moves_to_the_next_chunk_whole(read):
    prompt = read("cat " * 73 + "(red lasagne on grass:1.2) end")
    assert prompt.length == 154 and prompt.positions("red lasagne on grass") == tuple(range(78, 83)) and prompt.positions("end") == (83,)
    assert prompt.tokens[74].id == EOS and prompt.marks[0] == (0, 74, 75, 76), "padding in the first chunk"
    assert len(prompt.positions("cat")) == 73


def test_textual_inversions(tmp_path):
    vectors = torch.randn(3, 768)
    clip = embedding_clip(tmp_path, style={"emb_params": vectors}, one={"emb_params": vectors[:1]})
    prompt = read_tokens(clip, "a cat in embedding:style, (embedding:one:1.3) and embedding:absent on grass")
    assert prompt.words == ("a", "cat", "in", "embedding:style,", "embedding:one", "and", "embedding:absent", "on", "grass")
    assert prompt.positions("embedding:style,") == (4, 5, 6, 7) and prompt.positions("embedding:style") == (4, 5, 6)
    assert spelled(prompt, "embedding:style,") == ["embedding:style[1]", "embedding:style[2]", "embedding:style[3]", ","]
    assert spelled(prompt, "embedding:one") == ["embedding:one"] and prompt.tokens[8].weight == 1.3
    assert prompt.positions("embedding:absent") == () and spelled(prompt, "on grass") == ["on", "grass"] and spelled(prompt, "and") == ["and"]
    assert torch.equal(prompt.tokens[5].id, vectors[1])
    assert prompt == read_tokens(clip, prompt.text) and hash(prompt) == hash(read_tokens(clip, prompt.text))
    assert prompt.tokens[4] != prompt.tokens[5] and prompt.tokens[4].key != prompt.tokens[5].key


def test_only_missing_textual_inversions(tmp_path):
    prompt = read_tokens(embedding_clip(tmp_path), "a cat in embedding:missing rain, dimming")
    assert [token.text for token in prompt.content] == ["a", "cat", "in", "rain", ",", "di", "mming"]
    assert [token.word for token in prompt.content] == [0, 1, 2, 4, 4, 5, 5]


def test_without_a_folder_an_embedding_is_text(read):
    prompt = read("a embedding:cat")
    assert "".join(spelled(prompt, "embedding:cat")) == "embedding:cat" and len(prompt.words) == 2


def test_sdxl_needs_one_layout_for_both_encoders(tmp_path):
    even = {"clip_l": torch.randn(2, 768), "clip_g": torch.randn(2, 1280)}
    uneven = {"clip_l": torch.randn(2, 768), "clip_g": torch.randn(3, 1280)}
    clip = embedding_clip(tmp_path, "sdxl", even=even, uneven=uneven)
    prompt = read_tokens(clip, "a embedding:even cat")
    assert prompt.positions("embedding:even") == (2, 3) and prompt.positions("cat") == (4,)
    with pytest.raises(ValueError, match="encoders l and g of this CLIP split the prompt differently"):
        read_tokens(clip, "a embedding:uneven cat")


class Other:
    """A CLIP with a given token list."""

    def __init__(self, found, untokenize=None):
        self.found, self.tokenizer = found, type("Tokenizer", (), {"untokenize": staticmethod(untokenize)} if untokenize else {})()

    def tokenize(self, text, return_word_ids=False, **kwargs):
        return self.found


GOOD = [(BOS, 1.0, 0), (320, 1.0, 1), (EOS, 1.0, 0), (EOS, 1.0, 0)]


@pytest.mark.parametrize("found", [
    {"t5xxl": [[(71, 1.0, 1), (1, 1.0, 0)]]},
    {"l": [GOOD], "t5xxl": [[(71, 1.0, 1), (1, 1.0, 0)]]},
    {"l": [[(BOS, 1.0), (320, 1.0), (EOS, 1.0)]]},
    {"l": [[(320, 1.0, 1), (EOS, 1.0, 0), (0, 1.0, 0)]]},
    {"l": [[(BOS, 1.0, 0), (320, 1.0, 1)]]},
    {"l": [GOOD, GOOD[:3]]},
    {"l": []},
    {"l": [[(BOS, 1.0, 0), ({"type": "image"}, 1.0, 1), (EOS, 1.0, 0)]]},
    [GOOD],
    None,
])
def test_other_text_encoders_are_refused(found):
    with pytest.raises(ValueError, match="Words can be followed through CLIP only"):
        read_tokens(Other(found, lambda pairs: [(pair, "a</w>") for pair in pairs]), "a")


def test_unequal_lengths_of_the_two_encoders_are_named():
    found = {"l": [GOOD], "g": [GOOD + [(0, 1.0, 0)]]}
    with pytest.raises(ValueError, match=r"\(4 and 5 positions\)"):
        read_tokens(Other(found), "a")


def test_no_clip_and_no_way_back_to_text():
    with pytest.raises(ValueError, match="No CLIP came in"):
        read_tokens(None, "a")
    with pytest.raises(ValueError, match="cannot turn its tokens back into text"):
        read_tokens(Other({"l": [GOOD]}), "a")


def test_a_tokenizer_that_cleans_the_text():
    """Curly quotation marks made straight, a word dropped, a word added."""
    def groups(*pieces):
        return [(piece.encode() if piece is not None else None, 1) for piece in pieces]

    assert owners(groups("a", "\"", "big", "\"", "cat"), ("a", "\u201cbig\u201d", "cat")) == [0, 1, 1, 1, 2]
    assert owners(groups("a", "cat"), ("a", "BREAK", "cat")) == [0, 2]
    assert owners(groups("a", "nice", "cat"), ("a", "cat")) == [0, 0, 1]
    assert owners(groups("x"), ("y",)) == [0]


def test_two_textual_inversions_of_which_one_is_missing():
    assert owners([(b"a", 1), (None, 2), (None, 2), (b"on", 3), (b"car", 4)], ("a", "embedding:x", "on", "embedding:y", "car")) == [0, 1, 1, 2, 4]
    assert owners([(b"a", 1), (b"on", 2), (None, 3), (b"car", 4)], ("a", "embedding:x", "on", "embedding:y", "car")) == [0, 2, 3, 4]
    assert owners([(None, 1), (None, 2)], ("embedding:x", "embedding:y")) == [0, 1]


@pytest.mark.parametrize("before", ["", "a small green star, ", "a (red:1.3) square, " * 20])
def test_positions_are_those_of_the_conditioning(before):
    """CLIP looks back only: a conditioning changes from the changed word's first token on, and in its own chunk only."""
    from palimpsest.mini.checkpoint import WEIGHTS, load_clip
    from palimpsest.mini.storage import read_weights

    clip = load_clip(read_weights(WEIGHTS / "text_to_image.safetensors")[0])
    texts = [f"{before}a large {color} circle" for color in ("yellow", "blue")]
    first, second = (clip.encode_from_tokens_scheduled(clip.tokenize(text))[0][0] for text in texts)
    prompt = read_tokens(clip, texts[0])
    assert first.shape[1] == prompt.length == (154 if len(before) > 100 else 77)
    changed = (first - second).abs().amax(dim=(0, 2)).nonzero()[:, 0].tolist()
    assert changed == list(range(prompt.positions("yellow")[0], prompt.length))
