"""Which position of a conditioning belongs to which word of the prompt, read from the host's own tokenizer.

The published code walks over the raw text (Hertz et al., ICLR 2023; `get_word_inds`). A prompt in the host may also hold
weights, escapes, textual inversions and more than one chunk, so here the token list of the host decides. Its word ids
count weighted segments and textual inversions, not words (0: no word); words are found by spelling the tokens out.
The host does not know BREAK: there it is a word as any other.
"""

from __future__ import annotations

import difflib
import numbers
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch

ENCODERS = ("l", "g", "h")  # CLIP's names in the host's token lists: SD1.x and SDXL, SDXL, SD2.x
EMBEDDING = "embedding:"
VECTOR = -1  # stands for a textual inversion where words and tokens are compared byte by byte


@dataclass(frozen=True, eq=False)
class Token:
    """One position of the conditioning.

    position: index along its token axis, BOS and chunks counted. id: int, or the vector [C] of a textual inversion.
    text: what it spells, for people (empty for padding). word: index into `PromptTokens.words`, None for BOS, EOS and
    padding. weight: the host's, from `(word:1.2)`.
    """

    position: int
    id: Any
    text: str
    word: int | None
    weight: float

    @property
    def key(self):
        """The id as a hashable value: equal for equal tokens, textual inversions compared by their numbers."""
        return tuple(self.id.detach().float().flatten().tolist()) if isinstance(self.id, torch.Tensor) else int(self.id)

    def __eq__(self, other) -> bool:
        return isinstance(other, Token) and (self.position, self.key, self.text, self.word, self.weight) == (
            other.position, other.key, other.text, other.word, other.weight)

    def __hash__(self) -> int:
        return hash((self.position, self.key))


@dataclass(frozen=True)
class PromptTokens:
    """A prompt as the text encoder sees it.

    text: as written. tokens: one per position, padding included. length: number of positions, k x 77.
    words: what is between spaces and line ends, without the syntax of weights and without the backslashes of escapes.
    """

    text: str
    tokens: tuple[Token, ...]
    length: int
    words: tuple[str, ...]

    @cached_property
    def content(self) -> tuple[Token, ...]:
        """The tokens of the words, in order."""
        return tuple(token for token in self.tokens if token.word is not None)

    @cached_property
    def chunks(self) -> tuple[tuple[Token, ...], ...]:
        """The tokens in chunks of 77, each from its BOS on."""
        starts = [token.position for token in self.tokens if token.word is None and token.key == self.tokens[0].key]
        return tuple(self.tokens[first:last] for first, last in zip(starts, starts[1:] + [self.length]))

    @cached_property
    def marks(self) -> tuple[tuple[int, ...], ...]:
        """Per chunk the positions that belong to no word: BOS, EOS, then padding."""
        return tuple(tuple(token.position for token in chunk if token.word is None) for chunk in self.chunks)

    @cached_property
    def by_word(self) -> tuple[tuple[int, ...], ...]:
        """Per word the positions of its tokens; none for a textual inversion that the host did not find."""
        found = [[] for _ in self.words]
        for token in self.content:
            found[token.word].append(token.position)
        return tuple(tuple(positions) for positions in found)

    def positions(self, word: str) -> tuple[int, ...]:
        """Positions of all tokens of a word, or of a phrase of several words, wherever it occurs; () where it does not.

        Words are compared as they are first, as published. If that finds nothing, case and the punctuation around each
        word are ignored; the tokens of that punctuation are then left out.
        """
        wanted = word.split()
        exact = _occurrences(wanted, self.words)
        if exact:
            return tuple(sorted(position for index in exact for position in self.by_word[index]))
        loose = _occurrences([bare(part).casefold() for part in wanted], [bare(part).casefold() for part in self.words])
        return tuple(sorted(position for index in loose for position in self.spoken(index)))

    def spoken(self, index: int) -> tuple[int, ...]:
        """Positions of the word of this index without the punctuation around it; all of them if it is nothing else."""
        found = self.by_word[index]
        voiced = [k for k, position in enumerate(found) if not all(_is_punctuation(letter) for letter in self.tokens[position].text)]
        return found[voiced[0]:voiced[-1] + 1] if voiced else found


def read_tokens(clip, text: str) -> PromptTokens:
    """The tokens of `text` under a CLIP of the host; SDXL's two encoders have one layout, of which 'l' is read.

    Weights `(word:1.2)`, escapes, `embedding:name` and prompts of several chunks are as the host reads them.
    Raises ValueError (one sentence) for no CLIP, for text encoders other than CLIP's, and where SDXL's two encoders
    disagree, which textual inversions of different lengths can bring about.
    """
    import comfy.sd1_clip

    if clip is None:
        raise ValueError("No CLIP came in, so the prompt cannot be split into tokens; connect the CLIP of an SD1.x, SD2.x or SDXL checkpoint.")
    chunks = _chunks(clip.tokenize(text, return_word_ids=True))
    entries = [entry for chunk in chunks for entry in chunk]
    spelled = _spell(clip, [entry[0] for entry in entries])
    segments = comfy.sd1_clip.token_weights(comfy.sd1_clip.escape_important(text), 1.0)
    words = tuple("".join(comfy.sd1_clip.unescape_important(segment) for segment, _ in segments).split())
    spoken = [position for position, entry in enumerate(entries) if entry[2]]
    if spoken and not words:  # a tokenizer of another pack found words in what is blank to us
        words = ("".join(_decode(spelled[position]) for position in spoken),)
    owner = dict(zip(spoken, owners([(spelled[position], entries[position][2]) for position in spoken], words)))

    tokens, vectors = [], Counter()
    sizes = Counter(entries[position][2] for position in spoken if spelled[position] is None)
    padding = {position for start, chunk in zip(range(0, len(entries), len(chunks[0])), chunks)
               for position in range(start + 2 + sum(1 for entry in chunk if entry[2]), start + len(chunk))}
    for position, (value, weight, group, *_) in enumerate(entries):
        word = owner.get(position)
        if spelled[position] is None:
            vectors[group] += 1
            label = words[word].rstrip(",") + (f"[{vectors[group]}]" if sizes[group] > 1 else "")
        else:
            value, label = int(value), "" if position in padding else _decode(spelled[position])
        tokens.append(Token(position, value, label, word, float(weight)))
    return PromptTokens(text, tuple(tokens), len(tokens), words)


def owners(pieces: list[tuple[bytes | None, int]], words: tuple[str, ...]) -> list[int]:
    """Index of the word that each token belongs to.

    pieces: per token the bytes that it spells, None for a vector of a textual inversion, and the host's word id.
    In the normal case the tokens spell exactly the words, lower-cased. Where a tokenizer cleans the text (quotation
    marks, control characters) or drops something, what it kept is matched and the rest goes with its surroundings.
    """
    # a tokenizer without a folder of textual inversions reads "embedding:name" as text
    as_text = EMBEDDING.encode() in b"".join(piece for piece, _ in pieces if piece)
    written, writers, given, givers, group_before = [], [], [], [], None
    for index, word in enumerate(words):
        symbols = _symbols(word, as_text)
        written += symbols
        writers += [index] * len(symbols)
    for k, (piece, group) in enumerate(pieces):
        symbols = list(piece) if piece is not None else [VECTOR] if group != group_before else []
        group_before = group if piece is None else None
        given += symbols
        givers += [k] * len(symbols)

    votes = [Counter() for _ in pieces]
    if written == given:
        blocks = [("equal", 0, len(written), 0, len(given))]
    else:
        blocks = difflib.SequenceMatcher(None, written, given, autojunk=False).get_opcodes()
    for tag, i, i_end, j, j_end in blocks:
        for k in range(j, j_end):
            at = max(i - 1, 0) if tag == "insert" else i + (k - j) * (i_end - i) // (j_end - j)
            votes[givers[k]][writers[at] if writers else 0] += 1
    found = []
    for vote in votes:
        # nothing to vote with: the further vectors of a textual inversion
        found.append(vote.most_common(1)[0][0] if vote else found[-1] if found else 0)
    return found


def _chunks(found) -> list:
    """The host's chunks of (token, weight, word id) of one encoder, checked."""
    names = [name for name in ENCODERS if isinstance(found, dict) and name in found]
    if not names or len(names) < len(found) or not all(_like_clip(found[name]) for name in names):
        kinds = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"Words can be followed through CLIP only, but this text encoder splits prompts in another way ({kinds}); "
                         "connect the CLIP of an SD1.x, SD2.x or SDXL checkpoint.")
    layouts = [[(entry[2], entry[0] if entry[2] and isinstance(entry[0], numbers.Integral) else None) for chunk in found[name] for entry in chunk]
               for name in names]
    for name, layout in zip(names[1:], layouts[1:]):
        if layout != layouts[0]:
            raise ValueError(f"The encoders {names[0]} and {name} of this CLIP split the prompt differently ({len(layouts[0])} and {len(layout)} positions), "
                             "so its words have no single place; use textual inversions that have as many vectors for both, and tokenizers of one length.")
    return found[names[0]]


def _like_clip(chunks) -> bool:
    """Whether every chunk is BOS, words, EOS, padding, all of one length and with word ids."""
    for chunk in chunks:
        if len(chunk) != len(chunks[0]) or any(len(entry) < 3 for entry in chunk):
            return False
        groups = [bool(entry[2]) for entry in chunk]
        inner = sum(groups)
        if inner + 2 > len(chunk) or groups[0] or not all(groups[1:inner + 1]):
            return False
        if not all(isinstance(entry[0], numbers.Integral) or (entry[2] and isinstance(entry[0], torch.Tensor) and entry[0].ndim == 1) for entry in chunk):
            return False
    return bool(chunks)


def _spell(clip, ids: list) -> list[bytes | None]:
    """The bytes that each token stands for; None for vectors."""
    known = sorted({int(value) for value in ids if isinstance(value, numbers.Integral)})
    try:
        pieces = dict(zip(known, (piece for _, piece in clip.tokenizer.untokenize([(value, 1.0) for value in known]))))
        return [_bytes(pieces[int(value)]) if isinstance(value, numbers.Integral) else None for value in ids]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError("This CLIP's tokenizer cannot turn its tokens back into text, so words cannot be followed; "
                         "use the CLIP as the checkpoint loader gives it.") from error


@lru_cache(maxsize=1)
def _letters() -> dict[str, int]:
    """CLIP's vocabulary writes bytes as letters: printable ones as themselves, the others as U+0100 and on, in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + k): byte for k, byte in enumerate(others)}


def _bytes(piece: str) -> bytes:
    letters, piece = _letters(), piece.removesuffix("</w>")
    return bytes(letters[letter] for letter in piece) if all(letter in letters for letter in piece) else piece.encode()


def _decode(spelled: bytes | None) -> str:
    return (spelled or b"").decode("utf-8", errors="replace")


def _symbols(word: str, as_text: bool) -> list[int]:
    """What the tokens of a word should spell: bytes, or one sign for a textual inversion and the bytes of commas after it."""
    if word.startswith(EMBEDDING) and not as_text:
        return [VECTOR] + list(b"," * (len(word) - len(word.rstrip(","))))
    return list(unicodedata.normalize("NFC", word).lower().encode("utf-8", errors="replace"))


def _is_punctuation(letter: str) -> bool:
    return unicodedata.category(letter).startswith("P")


def bare(word: str) -> str:
    """A word without the punctuation around it; empty if it is nothing else."""
    kept = [k for k, letter in enumerate(word) if not _is_punctuation(letter)]
    return word[kept[0]:kept[-1] + 1] if kept else ""


def _occurrences(wanted: list[str], words) -> list[int]:
    """Indices of the words that take part in any occurrence of `wanted`."""
    if not wanted or not all(wanted):
        return []
    starts = [k for k in range(len(words) - len(wanted) + 1) if list(words[k:k + len(wanted)]) == wanted]
    return sorted({k + offset for k in starts for offset in range(len(wanted))})
