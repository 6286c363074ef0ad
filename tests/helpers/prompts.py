"""A text encoder for tests: the host's own SD1 tokenizer, random vectors for its tokens."""

from __future__ import annotations

import functools

import torch


@functools.lru_cache(maxsize=None)
def _tokenizer():
    import comfy.sd1_clip

    return comfy.sd1_clip.SD1Tokenizer()


class WordClip:
    """Stands for a CLIP where a test is not about what the text encoder computes: one fixed random vector per token and position."""

    def __init__(self, width: int = 768, pooled: int | None = None, seed: int = 0):
        self.width, self.pooled, self.seed = width, pooled, seed
        self.tokenizer = _tokenizer()

    def tokenize(self, text: str, return_word_ids: bool = False, **kwargs):
        return self.tokenizer.tokenize_with_weights(text, return_word_ids)

    def _vector(self, token: int, position: int) -> torch.Tensor:
        token_part = torch.randn(self.width, generator=torch.Generator().manual_seed(1_000_003 * self.seed + token))
        return token_part + 0.3 * torch.randn(self.width, generator=torch.Generator().manual_seed(77_777 + position))

    def encode_from_tokens_scheduled(self, tokens, **kwargs):
        chunks = tokens["l"]
        rows = [self._vector(entry[0], i) * entry[1] for chunk in chunks for i, entry in enumerate(chunk)]
        extra = {}
        if self.pooled is not None:
            extra["pooled_output"] = torch.randn(1, self.pooled, generator=torch.Generator().manual_seed(sum(entry[0] for chunk in chunks for entry in chunk)))
        return [[torch.stack(rows)[None], extra]]
