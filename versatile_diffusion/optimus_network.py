"""Optimus (Li et al., EMNLP 2020) as Versatile Diffusion uses it: a BERT that encodes a text to one vector and a GPT-2 that writes the text back.

Both are the classes of Hugging Face's transformers. The vector z enters GPT-2 twice, at every step: as key and value of one
token before the first, per layer (`linear`), and added to the embedding of every token (`linear_emb`). The extra token takes
position 0, so that the text starts at position 1.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, Callable

import torch
from torch import Tensor, nn

from .optimus_keys import BOS, EOS, Sizes, Tower

HEAD_WIDTH = 64  # of BERT-base and of every GPT-2


class Encoder(nn.Module):
    """BERT with the layer that gives mean and log variance of a latent, of which the mean is used."""

    def __init__(self, sizes: Tower, latent: int):
        super().__init__()
        from transformers import BertConfig, BertModel

        self.bert = BertModel(BertConfig(
            vocab_size=sizes.vocabulary, hidden_size=sizes.width, num_hidden_layers=sizes.layers, num_attention_heads=max(1, sizes.width // HEAD_WIDTH),
            intermediate_size=sizes.hidden, max_position_embeddings=sizes.positions, hidden_act="gelu", layer_norm_eps=1e-12, type_vocab_size=2,
        ))
        self.linear = nn.Linear(sizes.width, 2 * latent, bias=False)
        self.latent = latent

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens, mask (1 where a token is): [B, N] integers -> [B, latent]."""
        # given in full, because the class keeps its own in buffers, which the host's loading leaves where they are
        places = {"position_ids": torch.arange(tokens.shape[1], device=tokens.device)[None], "token_type_ids": torch.zeros_like(tokens)}
        pooled = self.bert(input_ids=tokens, attention_mask=mask, **places).pooler_output
        return self.linear(pooled)[:, :self.latent]


class Decoder(nn.Module):
    """GPT-2 with the two layers through which a latent enters. Logits come from the token embedding, to which the head is tied."""

    def __init__(self, sizes: Tower, latent: int):
        super().__init__()
        from transformers import GPT2Config, GPT2Model

        self.heads = max(1, sizes.width // HEAD_WIDTH)
        self.transformer = GPT2Model(GPT2Config(
            vocab_size=sizes.vocabulary, n_embd=sizes.width, n_layer=sizes.layers, n_head=self.heads, n_inner=sizes.hidden, n_positions=sizes.positions,
            activation_function="gelu_new", layer_norm_epsilon=1e-5, bos_token_id=sizes.vocabulary + BOS, eos_token_id=sizes.vocabulary + EOS,
        ))
        self.linear = nn.Linear(latent, sizes.layers * sizes.width, bias=False)
        self.linear_emb = nn.Linear(latent, sizes.width, bias=False)
        self.sizes = sizes

    def begin(self, latents: Tensor) -> Any:
        """The cache of keys and values before the first token. latents: [B, latent]."""
        from transformers import DynamicCache

        cache = DynamicCache()
        vectors = self.linear(latents).view(len(latents), self.sizes.layers, self.heads, 1, -1)
        for number in range(self.sizes.layers):
            cache.update(vectors[:, number], vectors[:, number], number)
        return cache

    def forward(self, tokens: Tensor, latents: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Logits [B, N, vocabulary] after each of the tokens [B, N], which follow those that the cache has seen; and the cache that has seen them too."""
        name = cache_name(type(self.transformer))
        added = self.transformer.wte(tokens) + self.linear_emb(latents)[:, None]
        out = self.transformer(inputs_embeds=added, use_cache=True, **{name: cache})
        return nn.functional.linear(out.last_hidden_state, self.transformer.wte.weight), getattr(out, name)


@functools.cache
def cache_name(model: type) -> str:
    """What transformers calls the cache: past_key_values, lately cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class OptimusNetwork(nn.Module):
    """Encoder (None where a file lacks it) and decoder."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.encoder = None if sizes.encoder is None else Encoder(sizes.encoder, sizes.latent)
        self.decoder = Decoder(sizes.decoder, sizes.latent)


def unfilled(sizes: Sizes) -> OptimusNetwork:
    """A network whose parameters are still to be assigned: they take no memory. Its buffers, which no file holds, are in place."""
    with torch.device("meta"):
        network = OptimusNetwork(sizes)
    for module in network.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                setattr(module, name, _buffer(name, buffer))
    return network.eval()


def _buffer(name: str, like: Tensor) -> Tensor:
    """Content of a buffer that some versions of transformers' classes have."""
    if name == "position_ids":
        return torch.arange(like.shape[-1]).expand(like.shape).contiguous()
    if name == "token_type_ids":
        return torch.zeros(like.shape, dtype=like.dtype)
    if name == "bias":
        return torch.ones(like.shape).tril().to(like.dtype)
    if name == "masked_bias":
        return torch.tensor(-1e4, dtype=like.dtype)
    import transformers

    raise ValueError(f"This version of transformers ({transformers.__version__}) has a buffer called {name} that Optimus does not know: install another one, for example 5.24.")


def kept(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits [V] with those outside the most likely ones at minus infinity.

    top_k: how many stay, 0 for all. top_p: a token goes when the ones before it, by likelihood, have more than this
    probability together; 1 (or 0) for all.
    """
    if 0 < top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], float("-inf"))
    if 0.0 < top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1).roll(1)
        before[0] = 0.0
        logits = logits.masked_fill(torch.zeros_like(logits, dtype=torch.bool).scatter(0, order, before > top_p), float("-inf"))
    return logits


def choose(logits: Tensor, generator: torch.Generator, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> int:
    """A token by its logits [V]: drawn, or the likeliest at temperature 0."""
    if temperature <= 0.0:
        return int(logits.argmax())
    probabilities = kept(logits / temperature, top_k, top_p).softmax(-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def write(
    decoder: Decoder, latents: Tensor, *, length: int = 30, seed: int = 0, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
    tick: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """Tokens of the texts of latents [B, latent], without markers (Versatile Diffusion's settings are the defaults).

    length: tokens of a text with its two markers; the last is the end marker whatever was likely. seed: text i draws from a
    generator of its own, seeded with seed + i, so that it does not depend on the others. tick: called before every token.
    Raises ValueError, one sentence, when the network gives values that are not finite.
    """
    begin, end = decoder.sizes.vocabulary + BOS, decoder.sizes.vocabulary + EOS
    generators = [torch.Generator().manual_seed((seed + row) % 2**64) for row in range(len(latents))]
    texts: list[list[int]] = [[] for _ in generators]
    open_rows = set(range(len(texts)))
    tokens = torch.full((len(texts), 1), begin, device=latents.device)
    cache = decoder.begin(latents)
    for _ in range(length - 2):
        tick()
        logits, cache = decoder(tokens, latents, cache)
        last = logits[:, -1].float().cpu()
        if not bool(torch.isfinite(last).all()):
            raise ValueError("Optimus gave values that are not finite: sample the text latent again with a lower cfg, or load Optimus with precision fp32.")
        for row in sorted(open_rows):
            token = choose(last[row], generators[row], temperature, top_k, top_p)
            tokens[row] = token
            if token == end:
                open_rows.discard(row)
            else:
                texts[row].append(token)
        if not open_rows:
            break
    return texts
