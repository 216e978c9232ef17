"""Which rows travel where. What comes of it is tested on processes, see test_parallelize.py and parallel_checks.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from supermoe.distributed import expert_parallel
from supermoe.distributed.expert_parallel import plan_trip


@pytest.fixture
def shard(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Six experts on three ranks, of which this is the only one that sends: what comes back is what went out."""
    monkeypatch.setattr(expert_parallel.dist, "all_to_all_single", lambda out, given, group: out.copy_(given))
    return SimpleNamespace(block=2, mesh=SimpleNamespace(get_group=lambda: None, size=lambda: 3))


def test_a_token_travels_once_to_every_rank_that_has_its_experts(shard) -> None:
    trip = plan_trip(torch.tensor([[0, 1], [5, 0], [4, 5], [1, -1], [-1, -1]]), shard)
    assert trip.rank_R.tolist() == [0, 0, 0, 2, 2]
    assert trip.token_R.tolist() == [0, 1, 3, 1, 2]
    assert trip.sent == trip.received == [3, 0, 2]


def test_no_token_travels_nowhere(shard) -> None:
    trip = plan_trip(torch.zeros(0, 2, dtype=torch.int64), shard)
    assert trip.sent == [0, 0, 0]
    assert len(trip.token_R) == 0
