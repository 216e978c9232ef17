from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from supermoe.ops import packing


def offsets_of(lengths: np.ndarray) -> Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int64)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("longest_first", [True, False])
def test_padding_takes_at_most_a_tenth_of_the_work_in_few_groups(seed: int, longest_first: bool) -> None:
    lengths = np.random.default_rng(seed).geometric(0.02, size=300).clip(max=200)
    lengths = -np.sort(-lengths) if longest_first else lengths
    sizes = packing.pack(offsets_of(lengths)).sizes
    work = (np.maximum(lengths, 16) ** 2).sum()  # fewer than 16 rows take no less time
    assert work >= 0.9 * sum(count * max(length, 16) ** 2 for count, length in sizes)
    assert sum(count for count, _ in sizes) == len(lengths)
    assert len(sizes) <= 25


def test_rows_of_leading_reads_stay_in_place() -> None:
    packed = packing.pack(offsets_of(np.array([7, 7, 7, 5, 3])))
    assert packed.sizes[0] == (3, 7)
    x = torch.randn(29, 1, 2)
    leading, *_ = packing.spread_behind(x, packed.slots, packed.sizes)
    assert leading.data_ptr() == x.data_ptr()
    assert leading.shape == (3, 1, 7, 2)


@pytest.mark.parametrize("lengths", [[5, 5, 2, 9, 0, 1], [0, 3], [4]])
def test_rows_come_back_from_their_slots(lengths: list[int]) -> None:
    packed = packing.pack(offsets_of(np.array(lengths)))
    x = torch.randn(sum(lengths), 2, 3)
    first, *others = packing.spread_behind(x, packed.slots, packed.sizes)
    back = [first.transpose(1, 2).flatten(0, 1)] + ([packing.collect(others, packed.slots)] if others else [])
    assert torch.equal(torch.cat(back), x)


def test_no_key_of_another_read_and_no_later_one_is_in_sight() -> None:
    lengths, read, visible = np.array([9, 4, 6]), torch.tensor([2, 0, 0, 1]), torch.tensor([3, 9, 2, 0])
    packed = packing.pack_indicators(offsets_of(lengths), read, visible)
    keys = torch.arange(19).view(19, 1, 1)  # every key holds its own row
    question = torch.arange(4).view(4, 1, 1)
    seen: dict[int, list[int]] = {}
    groups = zip(
        packing.spread(question, packed.queries, packed.query_sizes),
        packing.spread_behind(keys, packed.keys, packed.key_sizes),
        packed.hidden,
        strict=True,
    )
    for asked, known, hidden in groups:
        for g in range(len(asked)):
            for i, m in enumerate(asked[g].flatten().tolist()):
                seen[m] = known[g].flatten()[~hidden[g, 0, i]].tolist()
    assert seen == {0: [13, 14, 15], 1: list(range(9)), 2: [0, 1], 3: []}
