from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from supermoe.ops import Routing
from supermoe.training.router_health import RouterHealth


def output_of(history: list[list[int]], indicators: list[list[int]], num_experts: int = 4) -> SimpleNamespace:
    """A model's output with one MoE layer that chose these experts."""

    def entry(tokens: str, chosen: list[list[int]]) -> SimpleNamespace:
        expert_NK = torch.tensor(chosen).reshape(len(chosen), -1)
        counts_E = torch.bincount(expert_NK[expert_NK >= 0], minlength=num_experts)
        routing = Routing(expert_NK, torch.ones(expert_NK.shape), counts_E, torch.zeros(len(chosen), num_experts))
        return SimpleNamespace(layer=1, tokens=tokens, routing=routing)

    return SimpleNamespace(
        routings=[entry("history", history), entry("indicator", indicators)], questions=["user", "churn"]
    )


def batch_of(event_ids: list[int], num_examples: int) -> SimpleNamespace:
    return SimpleNamespace(
        fields={"event": torch.tensor(event_ids)},
        time_N=torch.zeros(len(event_ids), dtype=torch.int64),
        read_B=torch.zeros(num_examples, dtype=torch.int64),
        num_examples=num_examples,
    )


def test_load_by_question_and_event_type() -> None:
    health = RouterHealth(["none", "unknown", "purchase", "coupon"])
    output = output_of([[0, 1], [0, -1], [0, 1]], [[2, 0], [2, 1], [1, 0], [1, 0]])
    for _ in range(2):  # the same batch twice changes no share
        health.add(output, batch_of([2, 2, 3], num_examples=2))
    found = health.summary()["layer 1"]
    assert found["by"] == {
        "event purchase": pytest.approx([2 / 3, 1 / 3, 0, 0]),
        "event coupon": [0.5, 0.5, 0, 0],
        "task user": [0.25, 0.25, 0.5, 0],
        "task churn": [0.5, 0.5, 0, 0],
    }
    assert found["load"] == pytest.approx([6 / 13, 5 / 13, 2 / 13, 0])
    assert found["max_over_mean"] == pytest.approx(24 / 13)
    assert found["dead"] == 1


def test_even_load_has_entropy_one() -> None:
    health = RouterHealth([])
    health.add(output_of([[0], [1]], [[2], [3]]), batch_of([0, 0], num_examples=1))
    found = health.summary()["layer 1"]
    assert found["entropy"] == pytest.approx(1.0)
    assert set(found["by"]) == {"events", "task user", "task churn"}


def test_nothing_counted_is_an_empty_summary() -> None:
    assert RouterHealth([]).summary() == {}
