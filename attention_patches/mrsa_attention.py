"""FreeCustom's multi-reference self-attention as rewrites of q, k and v (pure torch).

Ding et al., CVPR 2024. A picture's queries see its own keys and those of R reference pictures under one softmax. Two rules
exist, with quite different numbers; m is a reference's mask, w its weight, L the scaled logits:

code rule (the authors' code)     L_ref + w m where w m is not 0, cut where it is
paper rule (the paper's formula)  L_ref * (w m), cut nowhere

Neither needs the map. Code rule: masked-out tokens are dropped, and what is left is a bias per key, which fits into a few
channels more. Paper rule: the keys are scaled, k := [k, (w m) k_ref].

Tensors are [rows, tokens, heads * dim], projected, as the host's attention takes them. What is taken of a reference is a choice
of tokens, so it commutes with to_k and to_v: `pick` chooses once per layer size, `Picked.of` gathers before the projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Callable, NamedTuple

import torch
from torch import Tensor

from .mrsa_masks import Selection

CODE, PAPER = RULES = ("code", "paper")
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Picked(NamedTuple):
    """What a rule takes of the references of one layer, reference after reference.

    places: per reference, the tokens that are taken, int64 [m]. weights: [M] float32 of all of them: bias or factor.
    """

    places: tuple[Tensor, ...]
    weights: Tensor

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens of each reference."""
        return tuple(len(places) for places in self.places)

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """These tokens [rows, M, C] of every reference's [rows, n, C]."""
        return torch.cat([tensor.index_select(1, places) for tensor, places in zip(tensors, self.places)], 1)

    def moved(self, places: torch.device, weights: torch.device) -> Picked:
        """The same with its parts on these devices: where the references wait, and where the call is computed."""
        return Picked(tuple(tokens.to(places) for tokens in self.places), self.weights.to(weights))


class References(NamedTuple):
    """The taken tokens of a layer's references as keys and values [rows or 1, M, heads * dim], and their weights [M]."""

    k: Tensor
    v: Tensor
    weights: Tensor


def pick(selections: Sequence[Selection], rule: str) -> Picked:
    """What a rule takes of references whose masks say `selections`.

    code: the kept tokens. paper: all of them, but none of a reference whose weight and mask are zero everywhere: in the formula it
    would leak in, each token with logit 0, and switched off is meant to be off. Raises ValueError for an unknown rule.
    """
    if rule not in RULES:
        raise ValueError(f'There is no rule "{rule}" for reference weights: choose one of {", ".join(RULES)}.')
    if rule == CODE:
        return Picked(tuple(selection.indices for selection in selections), torch.cat([selection.bias for selection in selections]))
    seen = [len(selection.weighted) if len(selection.indices) else 0 for selection in selections]
    return Picked(tuple(torch.arange(count) for count in seen), torch.cat([selection.weighted[:count] for selection, count in zip(selections, seen)]))


def code_rule(q: Tensor, k: Tensor, v: Tensor, references: References, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of the code rule for an attention without mask: the references behind the own tokens, the bias in channels of its own.

    Every head gets 1 to 8 channels more, up to a multiple of 8 as kernels want it; the output is cut back to dim. The kernel divides
    by the root of the new width D, so q is scaled by sqrt(D / dim), and the bias is spread over all new channels, because
    kernels that round a head's channels together (int8) would lose the others beside one large value.
    """
    q, k, v, keys, values = (x.unflatten(-1, (heads, -1)) for x in (q, k, v, references.k, references.v))
    dim, own = q.shape[-1], k.shape[1]
    extra = 8 - dim % 8
    width = dim + extra
    bias = references.weights.to(k.device, torch.promote_types(k.dtype, torch.float32)) * (width**0.5 / extra)
    # each written once
    all_keys, all_values = (k.new_empty(k.shape[0], own + keys.shape[1], heads, width) for _ in range(2))
    all_keys[:, :own, :, :dim], all_keys[:, own:, :, :dim] = k, keys
    all_keys[:, :own, :, dim:], all_keys[:, own:, :, dim:] = 0.0, bias[:, None, None]
    all_values[:, :own, :, :dim], all_values[:, own:, :, :dim], all_values[..., dim:] = v, values, 0.0
    queries = torch.nn.functional.pad(q * (width / dim) ** 0.5, (0, extra), value=1.0)
    return queries.flatten(2), all_keys.flatten(2), all_values.flatten(2)


def paper_rule(q: Tensor, k: Tensor, v: Tensor, references: References) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of the paper rule: the references behind the own tokens, their keys scaled by weight and mask."""
    keys, values = (x.to(k).expand(k.shape[0], -1, -1) for x in (references.k, references.v))
    return q, torch.cat([k, keys * references.weights.to(k)[:, None]], 1), torch.cat([v, values], 1)


def attend(
    q: Tensor, k: Tensor, v: Tensor, references: References, rule: str, heads: int, attention: Attend, watch: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Multi-reference self-attention of a picture's own q, k, v [rows, N, heads * dim]; the references keep their plain self-attention.

    attention: called with q, k and v, any width of heads. watch: called with the q and k that it got. References without tokens leave
    exactly the plain call.
    """
    if not len(references.weights):
        return attention(q, k, v)
    inputs = (code_rule(q, k, v, references, heads) if rule == CODE else paper_rule(q, k, v, references))
    out = attention(*inputs)
    if watch is not None:
        watch(*inputs[:2])
    dim = q.shape[-1] // heads
    return out.unflatten(-1, (heads, -1))[..., :dim].flatten(2)


def shares(q: Tensor, k: Tensor, counts: Sequence[int], heads: int, attention: Attend) -> Tensor:
    """Share of every query's attention that goes to each reference, averaged over heads: [rows, N, R] float32.

    q, k: as `attend` gives them to its `watch`. counts: tokens of each reference; they lie at the end of k. Attention over values that are
    1 in one channel per reference, so the map itself is never made.
    """
    count, dim = len(counts), k.shape[-1] // heads
    start, found = k.shape[1] - sum(counts), []
    for first in range(0, count, dim):
        group = counts[first : first + dim]
        marks = k.new_zeros(k.shape).unflatten(-1, (heads, dim))
        for channel, tokens in enumerate(group):
            marks[:, start : start + tokens, :, channel] = 1.0
            start += tokens
        found.append(attention(q, k, marks.flatten(2)).unflatten(-1, (heads, dim))[..., : len(group)].float().mean(2))
    return torch.cat(found, -1)


def blend_style(with_references: Callable[[], Tensor], plain: Callable[[], Tensor], fidelity: float) -> Tensor:
    """Output of the unconditional half: (1 - s) MRSA + s plain self-attention, s the style fidelity.

    The conditional half is not blended. With 1 (published) the references are not even asked for, with 0 the plain output is not.
    """
    if fidelity == 1:
        return plain()
    if fidelity == 0:
        return with_references()
    return (1 - fidelity) * with_references() + fidelity * plain()
