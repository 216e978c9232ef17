"""Which rows travel where. What comes of it is tested on processes, see test_parallelize.py and parallel_checks.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from supermoe import ops
from supermoe.config import MoEConfig
from supermoe.distributed import expert_parallel
from supermoe.distributed.expert_parallel import ExpertParallelMoE, plan_trip


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


def test_the_shared_expert_works_while_tokens_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def exchange(out: torch.Tensor, given: torch.Tensor, *sizes: list[int], async_op: bool = False, **_: object):
        out.copy_(given)
        done.append("sent" if async_op else "counted")
        return SimpleNamespace(wait=lambda: done.append("arrived"))

    monkeypatch.setattr(expert_parallel.dist, "all_to_all_single", exchange)
    layer = ExpertParallelMoE(MoEConfig(experts=2, top_k=1, hidden=4, shared_hidden=4), 8, "gelu")
    layer.shard = SimpleNamespace(block=2, mesh=SimpleNamespace(get_group=lambda: None, size=lambda: 1))
    layer.shared.register_forward_hook(lambda *_: done.append("shared"))
    layer.experts.register_forward_hook(lambda *_: done.append("experts"))
    routing = ops.Routing(torch.tensor([[0], [-1], [1]]), torch.ones(3, 1), torch.ones(2), torch.ones(3, 2))
    layer.mix(torch.randn(3, 8), routing)
    assert done == ["counted", "sent", "sent", "shared", "arrived", "arrived", "experts", "sent", "arrived"]


def test_what_arrives_is_counted_among_the_experts_here() -> None:
    choice_R2K = torch.tensor([[0.0, 2.0, 0.7, 0.3], [1.0, -3.0, 0.6, 0.4], [-1.0, 1.0, 0.5, 0.5]])
    routing = expert_parallel._arrived_routing(choice_R2K, SimpleNamespace(block=2))
    assert routing.expert_NK.tolist() == [[0, -1], [1, -1], [-1, 1]]
    assert routing.counts_E.tolist() == [1, 2]
