"""The store that ranks meet in, kept over restarts as torchrun keeps it."""

from __future__ import annotations

import threading

import pytest
import torch.distributed as dist

from supermoe.distributed.store import fresh
from supermoe.typed_yaml import UserError


def start(store: dist.Store, size: int) -> list[dist.Store]:
    """All ranks meet -> what each of them found."""
    found: dict[int, dist.Store] = {}

    def join(rank: int) -> None:
        found[rank] = fresh(store, rank, size, 20)

    ranks = [threading.Thread(target=join, args=(rank,)) for rank in range(size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return [found[rank] for rank in range(size)]


def test_ranks_share_a_store_in_which_nothing_of_an_earlier_start_is_left() -> None:
    store = dist.HashStore()
    for _ in range(3):
        first, *others = start(store, 3)
        assert not any(other.check(["address"]) for other in [first, *others])
        first.set("address", "a")
        assert all(other.get("address") == b"a" for other in others)


def test_ranks_that_do_not_come_are_named() -> None:
    store = dist.HashStore()
    start(store, 3)  # came to an earlier start
    with pytest.raises(UserError, match=r"rank 1, 2 did not start within 0 s \(distributed.timeout\)"):
        fresh(store, 0, 3, 0.05)
    with pytest.raises(UserError, match="rank 0 did not start"):
        fresh(store, 1, 3, 0.05)
