"""Texts to BERT's tokens, GPT-2's tokens to texts, and the tidying of what Optimus writes."""

from __future__ import annotations

import json
import re
from pathlib import Path

PIECES = 77  # of a text that are read, markers not counted
REPEATS = ("phrases", "words", "keep")
ITEM = re.compile(r"\w+(?:['-]\w+)*|[^\w\s]")
# blanks that writing token by token leaves before punctuation and contractions
CLEAN = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))


def read_vocabulary(path: str, count: int) -> list[str]:
    """The tokens of a vocabulary by number.

    path: vocab.txt (one a line), vocab.json (token to number) or tokenizer.json, UTF-8. count: how many there must be.
    Raises ValueError, one sentence, for a file that cannot be read and for another vocabulary.
    """
    name = Path(path).name
    try:
        text = Path(path).read_text(encoding="utf-8")
        if name.lower().endswith(".json"):
            table = json.loads(text)
            if not isinstance(table, dict):
                raise TypeError("it holds no table")
            table = table["model"]["vocab"] if "model" in table and isinstance(table["model"], dict) else table
            words = sorted(table, key=table.__getitem__)
            whole = [table[word] for word in words] == list(range(len(words)))
        else:
            words, whole = text.removesuffix("\n").split("\n"), True
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"The vocabulary {name} cannot be read ({str(error).splitlines()[0] if str(error) else type(error).__name__}): fetch it again.") from error
    if not whole or len(words) != count:
        raise ValueError(f"The vocabulary {name} has {len(words)} tokens{'' if whole else ' with gaps'}, but the loaded Optimus needs one of {count}: replace it.")
    return words


class BertWords:
    """WordPiece of BERT's cased vocabulary on lower-cased text, accents kept, as published. words: the vocabulary."""

    def __init__(self, words: list[str]):
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

        numbers = {word.rstrip("\r"): number for number, word in enumerate(words)}
        lacking = [marker for marker in ("[UNK]", "[CLS]", "[SEP]") if marker not in numbers]
        if lacking:
            raise ValueError(f"The vocabulary of BERT has no token {lacking[0]}, so it is another one: replace it with vocab.txt of google-bert/bert-base-cased.")
        self._begin, self._end = numbers["[CLS]"], numbers["[SEP]"]
        self._tokenizer = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
        self._tokenizer.normalizer = normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=False)
        self._tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()

    def encode(self, text: str) -> list[int]:
        """[CLS], at most 77 pieces, [SEP]."""
        return [self._begin, *self._tokenizer.encode(text.lower(), add_special_tokens=False).ids[:PIECES], self._end]


class GPT2Words:
    """Byte-level tokens of GPT-2. words: the vocabulary, without Optimus' markers."""

    def __init__(self, words: list[str]):
        from tokenizers import decoders

        self._words = words
        self._decoder = decoders.ByteLevel()

    def decode(self, tokens: list[int]) -> str:
        """The text, blanks normalised; numbers beyond the vocabulary (markers) are left out."""
        text = self._decoder.decode([self._words[token] for token in tokens if token < len(self._words)])
        for blank, clean in CLEAN:
            text = text.replace(blank, clean)
        return " ".join(text.split())


def tidy(text: str, repeats: str = "phrases") -> str:
    """The text with immediate repetitions taken out.

    repeats: "phrases" (2023's rule: of one item, of two, of three and so on; words and punctuation marks are items), "words"
    (2022's: of single words, with the punctuation at them), "keep" (nothing).
    """
    if repeats == "keep":
        return text
    if repeats == "words":
        return " ".join(_without_repeats(text.split(), 1))
    marks = list(ITEM.finditer(text))
    # every item is carried with the blank before it, so that a text without repetitions stays as it is
    items = [_Item(mark.group(), mark.start() > 0 and text[mark.start() - 1].isspace()) for mark in marks]
    kept = _without_repeats(items, len(items))
    return "".join(" " * item.blank + item for item in kept).strip()


class _Item(str):
    """A word or mark that knows whether a blank is before it."""

    def __new__(cls, text: str, blank: bool):
        item = super().__new__(cls, text)
        item.blank = blank
        return item


def _without_repeats(items: list[str], longest: int) -> list[str]:
    size = 1
    while size <= longest and 2 * size <= len(items):
        place = 0
        while place + 2 * size <= len(items):
            if items[place:place + size] == items[place + size:place + 2 * size]:
                del items[place + size:place + 2 * size]
            else:
                place += 1
        size += 1
    return items
