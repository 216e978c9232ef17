from __future__ import annotations

import pytest
import torch
from torch import Tensor

from supermoe.ops import layout
from supermoe.ops.groups import Blocks, Even, Pieces
from supermoe.ops.layout import Layout


def skewed(num_tokens: int = 500, k: int = 2, num_experts: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    scores = torch.rand(num_tokens, num_experts, generator=generator) + torch.arange(num_experts) * 0.2
    return scores.argsort(dim=1, descending=True)[:, :k]


def experts_of_slots(where: Layout, num_experts: int) -> list[int]:
    """By what the groups will do with them."""
    found = []
    for group in where.groups:
        assert group.start == len(found)
        if isinstance(group, Pieces):
            counts = torch.tensor(group.counts)
            found += torch.tensor(group.experts).repeat_interleave(counts).tolist()
        elif isinstance(group, Even):
            share = (group.end - group.start) // (group.last - group.first)
            found += torch.arange(group.first, group.last).repeat_interleave(share).tolist()
        else:
            block = (group.end - group.start) // len(group.experts)
            found += torch.tensor(group.experts).repeat_interleave(block).tolist()
        assert group.end == len(found)
    assert len(found) == len(where.token_P)
    return found


@pytest.mark.parametrize("plan", [layout.packed, layout.padded])
@pytest.mark.parametrize("chunk_rows", [7, 100, 10_000])
@pytest.mark.parametrize("dropped", [False, True])
def test_every_choice_lies_with_its_expert_and_its_token(plan, chunk_rows: int, dropped: bool) -> None:
    expert_NK = skewed()
    if dropped:
        expert_NK[::4, 1] = -1
    where = plan(expert_NK, 6, chunk_rows)
    at_slot = torch.tensor(experts_of_slots(where, 6))
    kept_NK = expert_NK >= 0
    assert (where.kept_NK is None) == (not dropped)
    places = where.place_NK[kept_NK]
    assert len(places.unique()) == len(places)
    assert torch.equal(at_slot[places], expert_NK[kept_NK])
    assert torch.equal(where.token_P[places], torch.arange(500)[:, None].expand(500, 2)[kept_NK])
    assert where.counts == torch.bincount(expert_NK[kept_NK], minlength=6).tolist()


def test_packed_wastes_nothing_and_an_expert_goes_on_where_a_chunk_ends() -> None:
    where = layout.packed(torch.tensor([[0], [2], [2], [0], [2], [2]]), 4, chunk_rows=3)
    assert len(where.token_P) == 6
    assert where.groups == [Pieces(0, 3, [0, 2], [2, 1], False), Pieces(3, 6, [2], [3], True)]
    assert where.token_P.tolist() == [0, 3, 1, 2, 4, 5]


def test_padded_has_the_same_few_sizes_whatever_the_routing() -> None:
    sizes = set()
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        expert_NK = torch.randint(0, 16, (1000, 1), generator=generator)
        for group in layout.padded(expert_NK, 16, chunk_rows=300).groups:
            sizes.add((type(group).__name__, group.end - group.start))
    assert len(sizes) <= 8  # of shares of 64, 80 or 96: experts at once, those left over, and blocks


def test_padding_costs_little_when_loads_are_even_and_follows_the_load_when_not() -> None:
    even = torch.arange(4096)[:, None] % 16
    assert len(layout.padded(even, 16, 10_000).token_P) == 4096
    one = torch.zeros(4096, 1, dtype=torch.int64)
    assert len(layout.padded(one, 16, 10_000).token_P) <= 3 * 4096
    assert {type(group) for group in layout.padded(one, 16, 10_000).groups} == {Even, Blocks}


def test_a_larger_share_replaces_many_blocks() -> None:
    loads = torch.tensor([96] * 16 + [32] * 16)  # a block of 16 for each of 32 rows too many would take 32 of them
    expert_NK = torch.arange(32).repeat_interleave(loads)[:, None]
    assert [type(group) for group in layout.padded(expert_NK, 32, 10_000).groups] == [Even]


def test_more_experts_than_a_byte_counts() -> None:
    expert_NK = torch.randint(0, 300, (1000, 2), generator=torch.Generator().manual_seed(0))
    where = layout.packed(expert_NK, 300, 100)
    assert torch.equal(torch.tensor(experts_of_slots(where, 300))[where.place_NK], expert_NK)
