"""Rewrites of q, k and v: edits of attention maps without the maps (pure torch).

Plug-and-Play, Prompt-to-Prompt and MRSA are written in their papers as operations on the map softmax(q k^T). Each of
these is linear in the map, or additive on the logits per key token, so changing q, k and v and calling the usual
attention gives the same result at O(tokens) memory. to_q, to_k and to_v have no bias in SD, therefore what is linear
per token can be done on the *inputs* of the attention, before projection, where the host has list patches.

All functions take and return attention inputs: query side [B, N, C], key side and value side [B, M, C'].
Source tensors have the rows of the call already (see `rows.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor


def source_self_attention(value: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Self-attention with the source's map: A_source V.

    Plug-and-Play (Tumanyan et al., CVPR 2023, section 4.2), and the self-attention replacement of Prompt-to-Prompt.
    value: own tokens [B, N, C]; source: the source's tokens [B, N, C]. Returns inputs of (q, k, v).
    """
    return source, source, value


def source_features(h: Tensor, source: Tensor) -> Tensor:
    """Residual branch of a ResBlock replaced by the source's (Plug-and-Play, section 4.1, "spatial features").

    h and source: [B, C, H, W] after the block's last convolution; the skip added afterwards stays the target's own.
    """
    return source.to(h.dtype)


def word_swap(source: Tensor, source_context: Tensor, context: Tensor, mapper: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-attention with the source's map re-assigned to other words: (A_source M) diag(c) V.

    Prompt-to-Prompt (Hertz et al., ICLR 2023, section 3.2, "word swap"; "attention re-weighting" is the factor c).
    source: the source's query tokens [B, N, C]; source_context: its text tokens [B, S, D]; context: own text tokens
    [B, T, D]; mapper: M [S, T], row s says which own words receive the attention of source word s; scale: c [T] or None.
    Returns inputs of (q, k, v): v becomes M (c * context) because the map is multiplied by V from the right.
    """
    scaled = context if scale is None else context * scale[:, None].to(context)
    return source, source_context, torch.einsum("st,btd->bsd", mapper.to(context), scaled)


def shared_self_attention(n: Tensor, references: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Own and weighted reference tokens under one softmax: softmax(q [k, w k_ref]^T) [v, v_ref].

    FreeCustom's multi-reference self-attention as its paper writes it (Ding et al., CVPR 2024, equation 5): the mask
    weight w scales the keys of the references. n: own tokens [B, N, C]; references: [B, R, C]; weights: w [R] or [B, R].
    Returns inputs of (q, k, v).
    """
    weighted = references * weights.to(references)[..., None]
    return n, torch.cat([n, weighted], dim=1), torch.cat([n, references], dim=1)
