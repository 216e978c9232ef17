"""Index arithmetic on packed reads."""

from __future__ import annotations

import torch
from factories import make_batch

from supermoe.model.packed import index_in_read, interleave, read_of_events, visible_events


def test_read_and_index_of_events_skip_empty_reads() -> None:
    offsets_S = torch.tensor([0, 3, 3, 5])
    read_N = read_of_events(offsets_S, 5)
    assert read_N.tolist() == [0, 0, 0, 2, 2]
    assert index_in_read(offsets_S, read_N).tolist() == [0, 1, 2, 0, 1]


def test_an_example_sees_the_first_events_of_its_read() -> None:
    example_R, event_R = visible_events(make_batch((3, 2, 0), ((1, 2), (0, 1), (2, 0), (0, 3))))
    assert example_R.tolist() == [0, 0, 1, 3, 3, 3]
    assert event_R.tolist() == [3, 4, 0, 0, 1, 2]


def test_interleave_puts_new_rows_behind_the_old_ones_of_their_read() -> None:
    old, new = ["a0", "a1", "c0"], ["a2", "b0", "b1", "c1"]
    offsets_S, order = interleave(torch.tensor([0, 2, 2, 3]), torch.tensor([0, 1, 3, 4]), len(old), len(new))
    assert offsets_S.tolist() == [0, 3, 5, 7]
    assert [(old + new)[i] for i in order] == ["a0", "a1", "a2", "b0", "b1", "c0", "c1"]
