"""Index arithmetic on packed reads: which read an event belongs to, who sees it, and laying two packings into one."""

from __future__ import annotations

import torch
from torch import Tensor

from supermoe.data.batch import Batch


def read_of_events(offsets_S: Tensor, num_events: int) -> Tensor:
    """Read of every event -> read_N int64, from the offsets [S + 1] of N = `num_events` events."""
    lengths_S = offsets_S.diff()
    read_S = torch.arange(len(lengths_S), device=offsets_S.device)
    return torch.repeat_interleave(read_S, lengths_S, output_size=num_events)  # with the size a GPU need not be asked


def index_in_read(offsets_S: Tensor, read_N: Tensor) -> Tensor:
    """Place of every event in its read, from 0 -> int64 [N]."""
    return torch.arange(len(read_N), device=read_N.device) - offsets_S[read_N]


def visible_events(batch: Batch) -> tuple[Tensor, Tensor]:
    """Every event that an example sees: the example, and the event's place in the batch -> two of int64 [R]."""
    example_R = torch.repeat_interleave(batch.visible_B)
    before_B = batch.visible_B.cumsum(0) - batch.visible_B
    first_B = batch.offsets_S[batch.read_B]
    return example_R, torch.arange(len(example_R), device=example_R.device) + (first_B - before_B)[example_R]


def interleave(old_offsets_S: Tensor, new_offsets_S: Tensor, num_old: int, num_new: int) -> tuple[Tensor, Tensor]:
    """Read by read, old rows and then new ones -> (offsets_S of the union, order of the rows of cat([old, new]))."""
    offsets_S = old_offsets_S + new_offsets_S
    old_read_N = read_of_events(old_offsets_S, num_old)
    new_read_N = read_of_events(new_offsets_S, num_new)
    # An old row moves back by the new rows of earlier reads, a new row by the old rows of its own and earlier reads.
    old_place_N = torch.arange(num_old, device=offsets_S.device) + new_offsets_S[old_read_N]
    new_place_N = torch.arange(num_new, device=offsets_S.device) + old_offsets_S[new_read_N + 1]
    return offsets_S, torch.cat([old_place_N, new_place_N]).argsort()
