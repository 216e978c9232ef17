"""Attention over packed reads: reads of like size are padded to one another and computed together.

Padding sits at the end of a read, where causality already hides it from every event, so no mask is made for it. Which
reads go together, and where each row goes, depends on the batch alone: `pack` and `pack_indicators` work it out once
for all layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_WASTE = 0.1  # most that padding may take of a group's work
_SHORT = 16  # rows; the kernels take as long for fewer


@dataclass(frozen=True)
class Slots:
    """Rows laid out in padded groups: slot p holds row `row_P[p]`; in the slots `empty` that is mere padding."""

    row_P: Tensor  # int64
    empty: Tensor  # int64 slots
    rows: Tensor | None  # int64 rows that have a slot; None: all, in their order
    slot_R: Tensor  # int64 slot of each of these rows


@dataclass(frozen=True)
class Packing:
    """Groups of reads for `history_attention`: `sizes[g]` is (reads, padded length).

    The first group is the leading reads of one length, often that to which histories are cut: their rows stay in place.
    """

    sizes: tuple[tuple[int, int], ...]
    slots: Slots  # of the other groups, with rows counted from the end of the first


@dataclass(frozen=True)
class IndicatorPacking:
    """Groups of reads for `indicator_attention`: `sizes[g]` is (reads, padded indicators, padded keys)."""

    sizes: tuple[tuple[int, int, int], ...]
    queries: Slots
    keys: Slots
    hidden: tuple[Tensor, ...]  # bool [reads, 1, indicators, keys] per group


def pack(offsets_S: Tensor) -> Packing:
    """See `supermoe.ops.pack`."""
    offsets = offsets_S.numpy(force=True)
    lengths = np.diff(offsets)
    leading = int(np.append(lengths != lengths[:1], True).argmax())
    starts, lengths, length = offsets[leading:-1] - offsets[leading], lengths[leading:], int(lengths[:1].sum())
    groups = _groups(lengths, lengths)
    sizes = [(len(group), int(lengths[group].max())) for group in groups]
    rows = np.arange(offsets[-1] - offsets[leading])
    slots = _slots(starts, lengths, groups, [size for _, size in sizes], rows, offsets_S.device)
    return Packing(((leading, length), *sizes), slots)


def pack_indicators(offsets_S: Tensor, read_M: Tensor, visible_M: Tensor) -> IndicatorPacking:
    """See `supermoe.ops.pack_indicators`."""
    offsets, reads, visible = (tensor.numpy(force=True) for tensor in (offsets_S, read_M, visible_M))
    counts = np.bincount(reads, minlength=len(offsets) - 1)
    longest = np.zeros_like(offsets[:-1])
    np.maximum.at(longest, reads, visible)
    groups = _groups(counts, longest)
    sizes = tuple((len(group), int(counts[group].max()), int(longest[group].max())) for group in groups)

    by_read = np.argsort(reads, kind="stable")
    first = np.cumsum(counts) - counts
    queries = _slots(first, counts, groups, [size for _, size, _ in sizes], by_read, offsets_S.device)
    keys = _slots(offsets[:-1], longest, groups, [size for *_, size in sizes], np.arange(offsets[-1]), offsets_S.device)
    seen = visible_M[queries.row_P].split([reads * indicators for reads, indicators, _ in sizes])
    hidden = tuple(
        torch.arange(size, device=offsets_S.device) >= count.view(num_reads, 1, indicators, 1)
        for count, (num_reads, indicators, size) in zip(seen, sizes, strict=True)
    )
    return IndicatorPacking(sizes, queries, keys, hidden)


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
    packing = packing or pack_indicators(offsets_S, read_M, visible_M)
    own = [(num_reads, indicators) for num_reads, indicators, _ in packing.sizes]
    past = [(num_reads, keys) for num_reads, _, keys in packing.sizes]
    outputs = [
        _indicator_group(*group)
        for group in zip(
            _spread(q_MHA * q_MHA.shape[-1] ** -0.5, packing.queries, own),
            _spread(k_self_MHA, packing.queries, own),
            _spread(v_self_MHA, packing.queries, own),
            _spread(k_NHA, packing.keys, past),
            _spread(v_NHA, packing.keys, past),
            packing.hidden,
            strict=True,
        )
    ]
    return _collect(outputs, packing.queries) if outputs else q_MHA.clone()


def _causal_attention(q_NHA: Tensor, k_NHA: Tensor, v_NHA: Tensor, packing: Packing) -> Tensor:
    if len(q_NHA) == 0:
        return q_NHA.clone()
    in_place, *others = packing.sizes
    num_leading = in_place[0] * in_place[1]
    operands = []
    for x_NHA in (q_NHA, k_NHA, v_NHA):
        leading, rest = x_NHA.split([num_leading, len(x_NHA) - num_leading])
        operands.append([_heads_first(leading, in_place), *_spread(rest, packing.slots, others)])
    groups = zip(*operands, strict=True)
    first, *padded = [F.scaled_dot_product_attention(q, k, v, is_causal=True) for q, k, v in groups]
    first_NHA = first.transpose(1, 2).flatten(0, 1)
    return torch.cat([first_NHA, _collect(padded, packing.slots)]) if padded else first_NHA


def _indicator_group(
    q_GHQA: Tensor, k_self_GHQA: Tensor, v_self_GHQA: Tensor, k_GHKA: Tensor, v_GHKA: Tensor, hidden_G1QK: Tensor
) -> Tensor:
    past_GHQK = (q_GHQA @ k_GHKA.transpose(-1, -2)).masked_fill(hidden_G1QK, -torch.inf)
    own_GHQ1 = (q_GHQA * k_self_GHQA).sum(dim=-1, keepdim=True)
    weights = torch.cat([past_GHQK, own_GHQ1], dim=-1).softmax(dim=-1)
    past_GHQK, own_GHQ1 = weights.split([past_GHQK.shape[-1], 1], dim=-1)
    return past_GHQK.to(v_GHKA.dtype) @ v_GHKA + own_GHQ1 * v_self_GHQA


# --- the layout -------------------------------------------------------------------------------------------------------


def _groups(queries_S: np.ndarray, keys_S: np.ndarray) -> list[np.ndarray]:
    """Reads with queries, in as few groups as keep the padding of each within its share of the work."""
    order = np.lexsort((-keys_S, -queries_S))
    order = order[queries_S[order] > 0]
    queries, keys = (np.maximum(sizes[order], _SHORT) for sizes in (queries_S, keys_S))
    work = np.cumsum(queries * keys)
    groups, start = [], 0
    while start < len(order):
        padded = np.arange(1, len(order) - start + 1) * queries[start] * np.maximum.accumulate(keys[start:])
        wanted = work[start:] - (work[start - 1] if start else 0)
        end = start + 1 + int(np.flatnonzero(padded * (1 - _WASTE) <= wanted)[-1])
        groups.append(order[start:end])
        start = end
    return groups


def _slots(
    start_S: np.ndarray,
    length_S: np.ndarray,
    groups: list[np.ndarray],
    padded: list[int],
    rows: np.ndarray,
    device: torch.device,
) -> Slots:
    """Lay read s, which is `rows[start_S[s]:][:length_S[s]]`, out in its group's padded length."""
    reads = np.concatenate([*groups, np.empty(0, np.int64)]).astype(np.int64)
    width = np.repeat(padded, [len(group) for group in groups]).astype(np.int64)
    place = np.arange(width.sum()) - np.repeat(np.cumsum(width) - width, width)
    start, length = (np.repeat(values[reads], width) for values in (start_S, length_S))
    row = rows[np.minimum(start + np.minimum(place, np.maximum(length - 1, 0)), len(rows) - 1)]
    real = place < length
    slots = np.flatnonzero(real)
    everything = len(slots) == len(rows)
    if everything:
        slots = slots[np.argsort(row[slots])]
    arrays = (row, np.flatnonzero(~real), row[slots], slots)
    row_P, empty, rows_R, slot_R = (torch.from_numpy(array).to(device) for array in arrays)
    return Slots(row_P, empty, None if everything else rows_R, slot_R)


def _heads_first(x_RHA: Tensor, size: tuple[int, int]) -> Tensor:
    """Rows of `size` (reads, length) -> [reads, heads, length, width]."""
    return x_RHA.unflatten(0, size).transpose(1, 2)


def _spread(x_NHA: Tensor, slots: Slots, sizes: list[tuple[int, int]]) -> list[Tensor]:
    """Packed rows -> one [reads, heads, padded length, width] per group."""
    # One split for all groups: the gradient of a slice would fill a whole tensor with zeros for each.
    groups = _Spread.apply(x_NHA, slots).split([reads * length for reads, length in sizes])
    return [_heads_first(group, size) for group, size in zip(groups, sizes, strict=True)]


def _collect(groups: list[Tensor], slots: Slots) -> Tensor:
    """The way back from `_spread`, leaving the padding behind."""
    return _Collect.apply(torch.cat([group.transpose(1, 2).flatten(0, 1) for group in groups]), slots)


class _Spread(torch.autograd.Function):
    """Rows -> slots. What stands in for padding gets no gradient, for nothing real depends on it."""

    @staticmethod
    def forward(ctx, x, slots):  # type: ignore[no-untyped-def]
        ctx.slots, ctx.num_rows = slots, len(x)
        return x.index_select(0, slots.row_P)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        grad_R = grad.index_select(0, ctx.slots.slot_R)
        if ctx.slots.rows is None:
            return grad_R, None
        return grad.new_zeros(ctx.num_rows, *grad.shape[1:]).index_copy_(0, ctx.slots.rows, grad_R), None


class _Collect(torch.autograd.Function):
    """Slots -> rows, where every row has a slot."""

    @staticmethod
    def forward(ctx, x, slots):  # type: ignore[no-untyped-def]
        ctx.slots = slots
        return x.index_select(0, slots.slot_R)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad.index_select(0, ctx.slots.row_P).index_fill_(0, ctx.slots.empty, 0), None
