"""Where each (token, choice) pair goes before the experts' products, and the groups that are computed together.

Two layouts. `packed`: rows sorted by expert, end to end, cut into chunks of one size that stay in cache. `padded`: an
even share for every expert and blocks for what exceeds it, so that products have the same few sizes whatever the
routing; the share follows the loads in coarse steps. Padding repeats the first token with weight 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from supermoe.ops.groups import Blocks, Even, Pieces

_ALIGN = 16  # rows that 16-bit units multiply at once
_SHARES = (1, 1.125, 1.25, 1.5, 2, 3, 4)  # of the mean load
_BLOCK = 1 / 4  # of a share
_TOGETHER = 8  # blocks that are multiplied at once
_CALL = 128  # rows that cost what a matrix costs to be read and laid out, once for each product with it


@dataclass(frozen=True)
class Layout:
    """Slots of rows: slot p holds token `token_P[p]`; `place_NK` is where a token's choice lies."""

    token_P: Tensor  # int64; 0 in a slot of padding
    place_NK: Tensor  # int64; 0 where dropped
    kept_NK: Tensor | None  # bool; None: nothing is dropped
    counts: list[int]  # rows of each expert
    groups: Sequence[Pieces | Even | Blocks]


@dataclass(frozen=True)
class _Sorted:
    """Pairs in expert order."""

    order_R: np.ndarray  # pair, n * K + k
    expert_R: np.ndarray
    counts_E: np.ndarray
    kept_NK: Tensor | None


def packed(expert_NK: Tensor, num_experts: int, chunk_rows: int) -> Layout:
    """Rows sorted by expert in chunks of `chunk_rows`."""
    pairs = _sort(expert_NK, num_experts)
    num_rows = len(pairs.order_R)
    ends_E = np.cumsum(pairs.counts_E)
    groups = []
    for start in range(0, num_rows, chunk_rows):
        end = min(start + chunk_rows, num_rows)
        first, last = np.searchsorted(ends_E, [start, end - 1], side="right")
        counts = np.diff(np.minimum(ends_E[first : last + 1], end), prepend=start)
        present = counts.nonzero()[0]
        continues = start > ends_E[first] - pairs.counts_E[first]
        groups.append(Pieces(start, end, (first + present).tolist(), counts[present].tolist(), bool(continues)))
    return _layout(pairs, expert_NK, np.arange(num_rows), num_rows, groups)


def padded(expert_NK: Tensor, num_experts: int, chunk_rows: int) -> Layout:
    """A share of slots for each expert, then blocks of a quarter of it for what exceeds the share."""
    pairs = _sort(expert_NK, num_experts)
    share, block = _cheapest(pairs.counts_E, -(-expert_NK.numel() // num_experts))
    place_R = np.arange(len(pairs.order_R)) - np.repeat(np.cumsum(pairs.counts_E) - pairs.counts_E, pairs.counts_E)
    blocks_E = _num_blocks(pairs.counts_E, share, block)
    beyond_E = num_experts * share + (np.cumsum(blocks_E) - blocks_E) * block - share
    slot_R = place_R + np.where(place_R < share, pairs.expert_R * share, beyond_E[pairs.expert_R])

    step = min(num_experts, max(chunk_rows // share, 1))
    groups: list[Even | Blocks] = [
        Even(first * share, min(first + step, num_experts) * share, first, min(first + step, num_experts))
        for first in range(0, num_experts, step)
    ]
    num_blocks = _round_up(int(blocks_E.sum()), _TOGETHER)
    expert_b = np.zeros(num_blocks, np.int64)
    expert_b[: blocks_E.sum()] = np.repeat(np.arange(num_experts), blocks_E)
    start = num_experts * share
    for b in range(0, num_blocks, _TOGETHER):
        here = expert_b[b : b + _TOGETHER].tolist()
        groups.append(Blocks(start + b * block, start + (b + _TOGETHER) * block, here))
    return _layout(pairs, expert_NK, slot_R, start + num_blocks * block, groups)


def _cheapest(counts_E: np.ndarray, mean: int) -> tuple[int, int]:
    """The share and the block with the least work: many blocks read matrices again, large shares are empty rows."""

    def cost(sizes: tuple[int, int]) -> int:
        share, block = sizes
        num_blocks = _round_up(int(_num_blocks(counts_E, share, block).sum()), _TOGETHER)
        return len(counts_E) * (share + _CALL) + num_blocks * (block + _CALL)

    shares = [_round_up(math.ceil(mean * times), _ALIGN) for times in _SHARES]
    return min(((share, _round_up(math.ceil(share * _BLOCK), _ALIGN)) for share in shares), key=cost)


def _num_blocks(counts_E: np.ndarray, share: int, block: int) -> np.ndarray:
    """Of each expert, for the rows that exceed the share."""
    return -(-np.maximum(counts_E - share, 0) // block)


def _sort(expert_NK: Tensor, num_experts: int) -> _Sorted:
    """Sort the pairs by expert, stably; dropped ones (-1) are left out."""
    expert = expert_NK.numpy().ravel()
    kept = expert >= 0
    everything = bool(kept.all())
    # Small integers are sorted by radix, which takes a twentieth of the time; -1 becomes the last one.
    small = expert.astype(np.uint8 if num_experts < 256 else np.uint16 if num_experts < 65536 else np.uint32)
    order_R = small.argsort(kind="stable")[: int(kept.sum())]
    counts_E = np.bincount(expert if everything else expert[kept], minlength=num_experts)
    kept_NK = None if everything else torch.from_numpy(kept.reshape(expert_NK.shape))
    return _Sorted(order_R, expert[order_R], counts_E, kept_NK)


def _layout(
    pairs: _Sorted,
    expert_NK: Tensor,
    slot_R: np.ndarray,
    num_slots: int,
    groups: Sequence[Pieces | Even | Blocks],
) -> Layout:
    token_P = np.zeros(num_slots, np.int64)
    token_P[slot_R] = pairs.order_R // expert_NK.shape[1]
    place = np.zeros(expert_NK.numel(), np.int64)
    place[pairs.order_R] = slot_R
    place_NK = torch.from_numpy(place).view(expert_NK.shape)
    return Layout(torch.from_numpy(token_P), place_NK, pairs.kept_NK, pairs.counts_E.tolist(), groups)


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
