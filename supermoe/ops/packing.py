"""Packed reads in groups of like size: which reads go together, where each row goes, and the moves there and back.

All this depends on the batch alone: `pack` and `pack_indicators` work it out once for all layers. Padding sits at the
end of a read, where causality already hides it from every event, so no mask is made for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
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
    slots: Slots  # of the rows behind the first group's


@dataclass(frozen=True)
class IndicatorPacking:
    """Groups of reads for `indicator_attention`; the keys of the first stay in place, as in `Packing`."""

    queries: Slots
    query_sizes: tuple[tuple[int, int], ...]  # reads, padded indicators
    keys: Slots
    key_sizes: tuple[tuple[int, int], ...]  # reads, padded length
    hidden: tuple[Tensor, ...]  # bool [reads, 1, indicators, keys] per group


def pack(offsets_S: Tensor) -> Packing:
    """Group the reads of one batch for `history_attention` so that padding takes at most a tenth of the work.

    Reads may come in any order and may be empty; where the longest come first, most rows stay in place.
    """
    offsets = offsets_S.numpy(force=True)
    lengths = np.diff(offsets)
    leading = _leading(lengths)
    others = _groups(lengths, lengths, leading)
    sizes = _sizes([leading, *others], lengths)
    return Packing(sizes, _key_slots(offsets, lengths, leading, others, sizes, offsets_S.device))


def pack_indicators(offsets_S: Tensor, read_M: Tensor, visible_M: Tensor) -> IndicatorPacking:
    """Group the reads of one batch for `indicator_attention`; see there for the arguments."""
    device = offsets_S.device
    offsets, reads, visible = (tensor.numpy(force=True) for tensor in (offsets_S, read_M, visible_M))
    counts, lengths = np.bincount(reads, minlength=len(offsets) - 1), np.diff(offsets)
    leading = _leading(lengths)
    longest = np.zeros_like(lengths)
    np.maximum.at(longest, reads, visible)
    longest[leading] = lengths[leading]
    others = _groups(counts, longest, leading)
    groups = [leading, *others]

    query_sizes, key_sizes = _sizes(groups, counts), _sizes(groups, longest)
    by_read = np.argsort(reads, kind="stable")
    queries = _slots(np.cumsum(counts) - counts, counts, groups, query_sizes, by_read, device)
    keys = _key_slots(offsets, longest, leading, others, key_sizes, device)
    seen = visible_M[queries.row_P].split([math.prod(size) for size in query_sizes])
    hidden = tuple(
        torch.arange(length, device=device) >= count.view(num_reads, 1, indicators, 1)
        for count, (num_reads, indicators), (_, length) in zip(seen, query_sizes, key_sizes, strict=True)
    )
    return IndicatorPacking(queries, query_sizes, keys, key_sizes, hidden)


def _leading(lengths_S: np.ndarray) -> np.ndarray:
    """The leading reads that are as long as the first."""
    return np.arange(np.append(lengths_S != lengths_S[:1], True).argmax())


def _groups(queries_S: np.ndarray, keys_S: np.ndarray, leading: np.ndarray) -> list[np.ndarray]:
    """The other reads with queries, in as few groups as keep the padding of each within its share of the work."""
    order = np.lexsort((-keys_S, -queries_S))
    order = order[(queries_S[order] > 0) & (order >= len(leading))]
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


def _sizes(groups: list[np.ndarray], rows_S: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Reads and padded rows of each group."""
    return tuple((len(group), int(rows_S[group].max(initial=0))) for group in groups)


def _key_slots(
    offsets: np.ndarray,
    length_S: np.ndarray,
    leading: np.ndarray,
    others: list[np.ndarray],
    sizes: tuple[tuple[int, int], ...],
    device: torch.device,
) -> Slots:
    """Slots of the first `length_S` events of the other reads, with rows counted from the end of the leading ones."""
    behind = offsets - offsets[len(leading)]
    return _slots(behind[:-1], length_S, others, sizes[1:], np.arange(behind[-1]), device)


def _slots(
    start_S: np.ndarray,
    length_S: np.ndarray,
    groups: list[np.ndarray],
    sizes: tuple[tuple[int, int], ...],
    rows: np.ndarray,
    device: torch.device,
) -> Slots:
    """Lay read s, which is `rows[start_S[s]:][:length_S[s]]`, out in its group's padded length."""
    reads = np.concatenate([*groups, np.empty(0, np.int64)]).astype(np.int64)
    width = np.repeat([length for _, length in sizes], [count for count, _ in sizes]).astype(np.int64)
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


def spread_behind(x_NHA: Tensor, slots: Slots, sizes: tuple[tuple[int, int], ...]) -> list[Tensor]:
    """As `spread`, where the rows of the first group lie in front, as they should be."""
    num_leading = math.prod(sizes[0])
    leading, rest = x_NHA.split([num_leading, len(x_NHA) - num_leading])
    return [_heads_first(leading, sizes[0]), *spread(rest, slots, sizes[1:])]


def spread(x_NHA: Tensor, slots: Slots, sizes: tuple[tuple[int, int], ...]) -> list[Tensor]:
    """Packed rows -> one [reads, heads, padded length, width] per group."""
    # One split for all groups: the gradient of a slice would fill a whole tensor with zeros for each.
    groups = _Spread.apply(x_NHA, slots).split([math.prod(size) for size in sizes])
    return [_heads_first(group, size) for group, size in zip(groups, sizes, strict=True)]


def collect(groups: list[Tensor], slots: Slots) -> Tensor:
    """The way back from `spread`, leaving the padding behind."""
    return _Collect.apply(torch.cat([group.transpose(1, 2).flatten(0, 1) for group in groups]), slots)


class _Spread(torch.autograd.Function):
    """Rows -> slots. What stands in for padding gets no gradient, for nothing real depends on it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Slots) -> Tensor:
        ctx.slots, ctx.num_rows = slots, len(x)
        return x.index_select(0, slots.row_P)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad_R = grad.index_select(0, ctx.slots.slot_R)
        if ctx.slots.rows is None:
            return grad_R, None
        return grad.new_zeros(ctx.num_rows, *grad.shape[1:]).index_copy_(0, ctx.slots.rows, grad_R), None


class _Collect(torch.autograd.Function):
    """Slots -> rows, where every row has a slot."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Slots) -> Tensor:
        ctx.slots = slots
        return x.index_select(0, slots.slot_R)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.slots.row_P).index_fill_(0, ctx.slots.empty, 0), None
