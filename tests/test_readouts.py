"""Read-outs: what the heads of the tasks read."""

from __future__ import annotations

import torch

from supermoe.model.readouts import REGISTRY
from supermoe.typed_yaml import build


def make(kind: str):
    return build("supermoe.model.readouts", REGISTRY[kind].Config(), dim=3, tasks=["churn", "age"])


def test_indicator_reads_user_and_own_answer() -> None:
    readout = make("indicator")
    user_BD, own_BD = torch.randn(2, 3), {"churn": torch.randn(2, 3), "age": torch.randn(2, 3)}
    task_BX = readout(user_BD, own_BD)
    assert readout.questions == ["churn", "age"]
    assert readout.width == 6
    assert list(task_BX) == ["churn", "age"]
    for task, x_BX in task_BX.items():
        assert torch.equal(x_BX, torch.cat([user_BD, own_BD[task]], dim=1))


def test_shared_bottom_asks_nothing_and_reads_the_user() -> None:
    readout, user_BD = make("shared_bottom"), torch.randn(2, 3)
    task_BX = readout(user_BD, {})
    assert readout.questions == []
    assert readout.width == 3
    assert list(task_BX) == ["churn", "age"]
    assert all(torch.equal(x_BX, user_BD) for x_BX in task_BX.values())
