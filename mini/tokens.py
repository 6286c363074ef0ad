"""The grammar's words as tokens of the host's SD1 CLIP tokenizer, and their compact numbering.

The text encoder stores embeddings for these tokens only; every other token shares one further vector.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .captions import vocabulary
from .nets import END, START

LENGTH = 77


class GrammarTokens:
    """CLIP ids of the grammar and back.

    ids: the CLIP token ids that own an embedding, ascending. `unknown` is the compact index of the shared vector. more: words beside those of captions.
    """

    def __init__(self, more: Iterable[str] = ()):
        import comfy.sd1_clip

        tokenizer = comfy.sd1_clip.SD1Tokenizer()
        self.words = {}
        for word in (*vocabulary(), *more):
            row = [pair[0] for pair in tokenizer.tokenize_with_weights(word)["l"][0]]
            self.words[word] = row[1:row.index(END)]
        self.ids = sorted({START, END}.union(*self.words.values()))
        self.compact = {token: i for i, token in enumerate(self.ids)}
        self.unknown = len(self.ids)

    def encode(self, text: str) -> torch.Tensor:
        """Compact indices [77] of a caption of the grammar, padded with END as the host does. Unknown words map to `unknown`."""
        row = [self.compact[START]]
        for word in text.replace(",", " , ").split():
            row += [self.compact[t] for t in self.words[word]] if word in self.words else [self.unknown]
        if len(row) >= LENGTH:
            raise ValueError(f"The caption has {len(row)} tokens, more than {LENGTH - 1}; shorten it.")
        return torch.tensor(row + [self.compact[END]] * (LENGTH - len(row)))
