"""FreeCustom's multi-reference self-attention as rewrites of k and v (pure torch).

Ding et al., CVPR 2024. A picture's queries see its own keys and those of R reference pictures under one softmax. Two rules
exist, with quite different numbers; m is a reference's mask, w its weight, L the scaled logits:

code rule (the authors' code)     L_ref + w m where w m is not 0, cut where it is
paper rule (the paper's formula)  L_ref * (w m), cut nowhere

Neither needs the map. Code rule: masked-out tokens are dropped, and what is left is a bias per key, one row for all queries
and heads. Paper rule: the keys are scaled, k := [k, (w m) k_ref], and as to_k has no bias that can be done on the
attention's inputs too.

Projected q, k, v are [rows, heads, tokens, dim], attention inputs [rows, tokens, channels]. References have as many rows as
the call or one for all. Nothing here looks at a tensor's values: what a mask keeps is decided once, by mrsa_masks.select.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Callable, NamedTuple

import torch
from torch import Tensor

from .mrsa_masks import Selection

CODE, PAPER = RULES = ("code", "paper")


class Reference(NamedTuple):
    """One reference at one layer: its keys and values [rows or 1, heads, n, dim], and what its mask keeps of the n tokens."""

    k: Tensor
    v: Tensor
    selection: Selection


def _like(tensor: Tensor, own: Tensor) -> Tensor:
    """Reference tensor in the rows, dtype and device of the call's own."""
    return tensor.to(own).expand(own.shape[0], *tensor.shape[1:])


def seen(references: Sequence[Reference]) -> list[Reference]:
    """The references that have any effect: weight and mask are not zero everywhere.

    In the paper's formula such a reference would still leak in, each of its tokens with logit 0; switched off is meant
    to be off.
    """
    return [reference for reference in references if len(reference.selection.indices)]


def code_rule(k: Tensor, v: Tensor, references: Sequence[Reference]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values and the bias of the code rule, for the usual attention.

    k, v: own, [rows, heads, N, dim]. Returns k and v with the kept tokens of the references after the own ones, and the bias
    [1, 1, 1, N + kept] to add to the scaled logits; k and v themselves and None where nothing is kept.
    """
    kept = seen(references)
    if not kept:
        return k, v, None
    keys, values, biases = [k], [v], [k.new_zeros(k.shape[2])]
    for reference in kept:
        indices = reference.selection.indices.to(k.device)
        keys.append(_like(reference.k.to(k.device).index_select(2, indices), k))
        values.append(_like(reference.v.to(v.device).index_select(2, indices), v))
        biases.append(reference.selection.bias.to(k))
    return torch.cat(keys, 2), torch.cat(values, 2), torch.cat(biases)[None, None, None]


def paper_rule(k: Tensor, v: Tensor, references: Sequence[Reference], literal: bool = False) -> tuple[Tensor, Tensor]:
    """Keys and values of the paper rule, for the usual attention: all tokens of the references, keys scaled by weight and mask.

    literal: keep references without effect too, as the formula does; see `seen`.
    """
    used = references if literal else seen(references)
    if not used:
        return k, v
    keys = [_like(reference.k, k) * reference.selection.weighted.to(k)[:, None] for reference in used]
    return torch.cat([k, *keys], 2), torch.cat([v, *(_like(reference.v, v) for reference in used)], 2)


def paper_inputs(context: Tensor, value: Tensor, references: Sequence[tuple[Tensor, Selection]]) -> tuple[Tensor, Tensor]:
    """The paper rule on attention inputs: what a list patch hands to to_k and to_v.

    context, value: own, [rows, N, C]. references: normed tokens [rows or 1, n, C] and what their mask says. The same rewrite as
    rewrites.shared_self_attention, for keys and values that another edit may have changed apart.
    """
    used = [(tokens, selection) for tokens, selection in references if len(selection.indices)]
    if not used:
        return context, value
    keys = [_like(tokens, context) * selection.weighted.to(context)[:, None] for tokens, selection in used]
    return torch.cat([context, *keys], 1), torch.cat([value, *(_like(tokens, value) for tokens, _ in used)], 1)


def fold_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, channels: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v with the bias of `code_rule` in extra channels, for kernels that take no mask; cut the output back to dim.

    The kernel divides by the root of the new width D, so q is scaled by sqrt(D / dim); then q' k' / sqrt(D) is
    q k / sqrt(dim) + bias. channels: how many are added (flash attention wants a multiple of 8 in all); v gets zeros.
    """
    dim = q.shape[-1]
    width = dim + channels
    ones = q.new_zeros(*q.shape[:-1], channels)
    ones[..., 0] = 1
    extra = k.new_zeros(*k.shape[:-1], channels)
    extra[..., 0] = bias[..., 0, :].to(k) * width**0.5
    return torch.cat([q * (width / dim) ** 0.5, ones], -1), torch.cat([k, extra], -1), torch.nn.functional.pad(v, (0, channels))


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """torch's attention: [rows, heads, N, dim]."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def attend(
    q: Tensor, k: Tensor, v: Tensor, references: Sequence[Reference], rule: str = CODE,
    attention: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor] = scaled_dot_product,
) -> Tensor:
    """Multi-reference self-attention of a picture's own q, k, v, each [rows, heads, N, dim]; references keep their plain self-attention.

    attention: called with q, k, v and the bias (or None). References without effect leave exactly the plain call.
    Raises ValueError, one sentence, for an unknown rule.
    """
    if rule == CODE:
        return attention(q, *code_rule(k, v, references))
    if rule == PAPER:
        return attention(q, *paper_rule(k, v, references), None)
    raise ValueError(f'There is no rule "{rule}" for reference weights: choose one of {", ".join(RULES)}.')


def blend_style(with_references: Callable[[], Tensor], plain: Callable[[], Tensor], fidelity: float) -> Tensor:
    """Output of the unconditional half: (1 - s) MRSA + s plain self-attention, s the style fidelity.

    The conditional half is not blended. With 1 (published) the references are not even asked for, with 0 the plain output is not.
    """
    if fidelity == 1:
        return plain()
    if fidelity == 0:
        return with_references()
    return (1 - fidelity) * with_references() + fidelity * plain()
