"""Attention over packed reads: groups of reads of like size are padded to one another and computed together."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from supermoe.ops.packing import IndicatorPacking, Packing, collect, pack, pack_indicators, spread, spread_behind


def history_attention(
    q_NHA: Tensor,
    k_JHA: Tensor,
    v_JHA: Tensor,
    q_offsets_S: Tensor,
    k_offsets_S: Tensor,
    packing: Packing | None = None,
) -> Tensor:
    """See `supermoe.ops.history_attention`."""
    if len(q_NHA) == len(k_JHA):
        return _causal_attention(q_NHA, k_JHA, v_JHA, packing or pack(q_offsets_S))
    # Cached keys come first: let each query stand where its own key is, and leave the cached places without a question.
    cached_S = k_offsets_S[1:] - q_offsets_S[1:]
    place_N = torch.arange(len(q_NHA), device=q_NHA.device) + torch.repeat_interleave(cached_S, q_offsets_S.diff())
    q_JHA = torch.zeros_like(k_JHA).index_copy(0, place_N, q_NHA)
    return _causal_attention(q_JHA, k_JHA, v_JHA, pack(k_offsets_S)).index_select(0, place_N)


def indicator_attention(
    q_MHA: Tensor,
    k_self_MHA: Tensor,
    v_self_MHA: Tensor,
    k_NHA: Tensor,
    v_NHA: Tensor,
    offsets_S: Tensor,
    read_M: Tensor,
    visible_M: Tensor,
    packing: IndicatorPacking | None = None,
) -> Tensor:
    """See `supermoe.ops.indicator_attention`."""
    if len(q_MHA) == 0:
        return q_MHA.clone()
    packing = packing or pack_indicators(offsets_S, read_M, visible_M)
    own = [
        spread(x_MHA, packing.queries, packing.query_sizes)
        for x_MHA in (q_MHA * q_MHA.shape[-1] ** -0.5, k_self_MHA, v_self_MHA)
    ]
    past = [spread_behind(x_NHA, packing.keys, packing.key_sizes) for x_NHA in (k_NHA, v_NHA)]
    groups = zip(*own, *past, packing.hidden, strict=True)
    return collect([_indicator_group(*group) for group in groups], packing.queries)


def _causal_attention(q_NHA: Tensor, k_NHA: Tensor, v_NHA: Tensor, packing: Packing) -> Tensor:
    if len(q_NHA) == 0:
        return q_NHA.clone()
    groups = zip(*(spread_behind(x, packing.slots, packing.sizes) for x in (q_NHA, k_NHA, v_NHA)), strict=True)
    first, *padded = [F.scaled_dot_product_attention(q, k, v, is_causal=True) for q, k, v in groups]
    first_NHA = first.transpose(1, 2).flatten(0, 1)
    return torch.cat([first_NHA, collect(padded, packing.slots)]) if padded else first_NHA


def _indicator_group(
    q_GHQA: Tensor, k_self_GHQA: Tensor, v_self_GHQA: Tensor, k_GHKA: Tensor, v_GHKA: Tensor, hidden_G1QK: Tensor
) -> Tensor:
    past_GHQK = (q_GHQA @ k_GHKA.transpose(-1, -2)).masked_fill(hidden_G1QK, -torch.inf)
    own_GHQ1 = (q_GHQA * k_self_GHQA).sum(dim=-1, keepdim=True)
    weights = torch.cat([past_GHQK, own_GHQ1], dim=-1).softmax(dim=-1)
    past_GHQK, own_GHQ1 = weights.split([past_GHQK.shape[-1], 1], dim=-1)
    return past_GHQK.to(v_GHKA.dtype) @ v_GHKA + own_GHQ1 * v_self_GHQA
