"""Tokens, vocabularies and the tidying of texts."""

import json

import pytest

from palimpsest.tests.helpers import versatile_text as toy
from palimpsest.versatile_diffusion.optimus_words import PIECES, BertWords, GPT2Words, read_vocabulary, tidy

BERT = [*toy.BERT_WORDS]
NUMBER = {word: number for number, word in enumerate(BERT)}


def test_bert_tokens_are_those_of_transformers(tmp_path):
    from transformers import BertTokenizer

    words = BertWords(BERT)
    (tmp_path / "vocab.txt").write_text("\n".join(BERT) + "\n", encoding="utf-8")
    theirs = BertTokenizer.from_pretrained(str(tmp_path), do_lower_case=False, local_files_only=True)
    for text in ("The man is walking, the dogs walk.", "  RED   dog's caf\u00c9 zzz ", "", "man\twalk\nred"):
        assert words.encode(text) == theirs(text.lower())["input_ids"], text
    assert words.encode("Dogs walking") == [NUMBER[w] for w in ("[CLS]", "dog", "##s", "walk", "##ing", "[SEP]")]
    assert words.encode("CAF\u00c9")[1:-1] == [NUMBER["caf"], NUMBER["##\u00e9"]], "lower-cased, accents kept"
    assert words.encode("zebra9")[1:-1] == [NUMBER["[UNK]"]]


def test_long_texts_are_cut_at_77_pieces_and_still_end():
    tokens = BertWords(BERT).encode("man " * 100)
    assert len(tokens) == PIECES + 2 == 79 and tokens[-1] == NUMBER["[SEP]"] and set(tokens[1:-1]) == {NUMBER["man"]}


def test_another_bert_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"no token \[CLS\]"):
        BertWords([word for word in BERT if word != "[CLS]"])


def test_gpt2_tokens_become_text():
    words = GPT2Words(toy.GPT2_WORDS)
    number = {word: i for i, word in enumerate(toy.GPT2_WORDS)}
    decode = lambda *tokens: words.decode([number[token] for token in tokens])
    assert decode("\u0120a", "\u0120man", "\u0120walks", "\u0120.") == "a man walks."
    assert decode("\u0120the", "\u0120dog", "s", "\u0120is", "\u0120n't", "\u0120red", "\u0120,", "\u0120", "\u0120a") == "the dogs isn't red, a"
    assert words.decode([number["\u0120dog"], len(toy.GPT2_WORDS), len(toy.GPT2_WORDS) + 2]) == "dog", "markers are left out"
    assert words.decode([]) == ""


def test_gpt2_tokens_are_those_of_transformers():
    from transformers import GPT2Tokenizer

    number = {word: i for i, word in enumerate(toy.GPT2_WORDS)}
    theirs = GPT2Tokenizer(vocab=number, merges=[])
    tokens = [number[word] for word in ("a", "\u0120man", "\u0120walks", "-", "d", "\u0120the")]
    assert GPT2Words(toy.GPT2_WORDS).decode(tokens) == theirs.decode(tokens, clean_up_tokenization_spaces=False) == "a man walks-d the"


def test_bytes_beyond_ascii():
    """A letter of two bytes is two tokens of GPT-2's alphabet."""
    assert GPT2Words(["caf", "\u00c3", "\u00a9"]).decode([0, 1, 2]) == "caf\u00e9"


@pytest.mark.parametrize("text, phrases, words", [
    ("a man walks.", "a man walks.", "a man walks."),
    ("a a a man man walks", "a man walks", "a man walks"),
    ("a man a man a man walks", "a man walks", "a man a man a man walks"),
    ("the red dog, the red dog, and a cat", "the red dog, and a cat", "the red dog, the red dog, and a cat"),
    ("a dog dog.", "a dog.", "a dog dog."),
    ("black-and-white dog's dog's tail", "black-and-white dog's tail", "black-and-white dog's tail"),
    ("the the cat the cat sat", "the cat sat", "the cat the cat sat"),
    ("no, no, no", "no, no", "no, no"),
    ("(a) 1.5 x 2!!", "(a) 1.5 x 2!", "(a) 1.5 x 2!!"),
    ("", "", ""),
])
def test_repetitions(text, phrases, words):
    """phrases: 2023's rule with marks as items; words: 2022's with marks at their words."""
    assert tidy(text, "phrases") == phrases
    assert tidy(text, "words") == words
    assert tidy(text, "keep") == text


def test_vocabularies_are_read_in_all_forms(tmp_path):
    words = ["b", "a", "c\u00e9"]
    table = {word: number for number, word in enumerate(words)}
    (tmp_path / "vocab.txt").write_text("b\na\nc\u00e9\n", encoding="utf-8")
    (tmp_path / "vocab.json").write_text(json.dumps(table), encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": table}}), encoding="utf-8")
    for name in ("vocab.txt", "vocab.json", "tokenizer.json"):
        assert read_vocabulary(str(tmp_path / name), 3) == words
    (tmp_path / "model.json").write_text(json.dumps({"model": 0, "a": 1, "c": 2}), encoding="utf-8")
    assert read_vocabulary(str(tmp_path / "model.json"), 3) == ["model", "a", "c"], "a token called model"


@pytest.mark.parametrize("name, content, message", [
    ("vocab.txt", "a\nb\n", "has 2 tokens, but the loaded Optimus needs one of 3"), ("vocab.json", '{"a": 0, "b": 2, "c": 3}', "with gaps"),
    ("vocab.json", "{", "cannot be read"), ("vocab.json", "[1]", "cannot be read"), ("gone.txt", None, "cannot be read"),
])
def test_other_vocabularies_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        read_vocabulary(str(tmp_path / name), 3)
    assert "\n" not in str(error.value)
