"""What people type: windows of words, "lion: 0.2, jungle: 0.1-0.4", weights of words, "jungle: x3, pink: -1", and lists of words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from .tokens import PromptTokens

NUMBER = r"(?:\d+\.?\d*|\.\d+)"
WINDOW = re.compile(rf"({NUMBER})(?:\s*-\s*({NUMBER}))?")
WEIGHT = re.compile(rf"[xX]?\s*([+-]?{NUMBER})")
QUOTED = re.compile(r"""\s*(["'])(.*?)\1\s*:""")  # only in front of a colon: an apostrophe is no quotation mark
SEPARATOR = re.compile(r"[,\n]")


def parse_windows(text: str) -> dict[str, tuple[float, float]]:
    """{word or phrase: (start, end)} of "lion: 0.2, jungle: 0.1-0.4", fractions of the steps; one number is the end.

    Commas or line ends separate; a word with a comma or a colon in it stands in quotation marks.
    Raises ValueError, one sentence that names the piece.
    """
    found = {}
    for word, value, piece in _pieces(text, "an end such as 0.4, or a start and an end such as 0.1-0.4"):
        parsed = WINDOW.fullmatch(value)
        if parsed is None:
            raise ValueError(f'The word schedule "{piece}" cannot be read; write a fraction of the steps, such as "{word}: 0.4", or two, such as "{word}: 0.1-0.4".')
        start, end = (0.0, float(parsed[1])) if parsed[2] is None else (float(parsed[1]), float(parsed[2]))
        if not 0.0 <= start <= end <= 1.0:
            raise ValueError(f'The word schedule "{piece}" is out of range; fractions of the steps lie between 0 and 1, and the start is not after the end.')
        _add(found, word, (start, end), piece)
    return found


def parse_weights(text: str) -> dict[str, float]:
    """{word or phrase: factor} of "jungle: x3, pink: -1, smiling: 0.5"; "x3" and "3" are the same, negative factors are allowed.

    Commas or line ends separate; a word with a comma or a colon in it stands in quotation marks.
    Raises ValueError, one sentence that names the piece.
    """
    found = {}
    for word, value, piece in _pieces(text, "a factor such as x3"):
        parsed = WEIGHT.fullmatch(value)
        if parsed is None:
            raise ValueError(f'The word weight "{piece}" cannot be read; write a number, such as "{word}: x3", "{word}: 0.5" or "{word}: -1".')
        _add(found, word, float(parsed[1]), piece)
    return found


def split_list(text: str) -> list[str]:
    """Words or phrases separated by commas or line ends, each once, spaces between words made single."""
    return list(dict.fromkeys(" ".join(piece.split()) for piece in SEPARATOR.split(text) if piece.strip()))


def missing_words(parsed: Iterable[str], tokens: PromptTokens) -> None:
    """ValueError (one sentence) if a parsed word or phrase is not in the prompt: which ones, which were found, and the prompt's words."""
    wanted = list(parsed)
    missing = [word for word in wanted if not tokens.positions(word)]
    if missing:
        found = [word for word in wanted if word not in missing]
        raise ValueError(f"Not in the edit prompt: {_listed(missing)}" + (f" (found: {_listed(found)})" if found else "")
                         + f"; its words are: {' '.join(tokens.words) or 'none'}.")


def _pieces(text: str, value_is: str) -> Iterator[tuple[str, str, str]]:
    """(word, value, the piece as written) of every entry."""
    start = 0
    while start < len(text):
        quoted = QUOTED.match(text, start)
        separator = SEPARATOR.search(text, quoted.end() if quoted else start)
        end = separator.start() if separator else len(text)
        piece = text[start:end].strip()
        if quoted:
            word, value = quoted[2], text[quoted.end():end]
        else:
            word, _, value = piece.rpartition(":")
        start = end + 1
        if not piece:
            continue
        if not quoted and ":" not in piece:
            raise ValueError(f'"{piece}" has no value; write a word, a colon and {value_is} (numbers take a point, not a comma).')
        word = " ".join(word.split())
        if not quoted and word.startswith('"'):
            raise ValueError(f'The quotation mark in "{piece}" is not closed in front of a colon; write, for example, "red, blue": 0.5.')
        if not word:
            raise ValueError(f'"{piece}" names no word; write a word, a colon and {value_is}.')
        yield word, value.strip(), piece


def _add(found: dict, word: str, value, piece: str) -> None:
    if word in found:
        raise ValueError(f'"{piece}" sets {word} for the second time; keep one of the two.')
    found[word] = value


def _listed(words: list[str]) -> str:
    return ", ".join(f'"{word}"' for word in words)
