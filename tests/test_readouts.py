"""Read-outs: what the heads of the tasks read."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from factories import check_gradients
from torch import Tensor

from supermoe.model.readouts import REGISTRY
from supermoe.typed_yaml import build

TASKS = ["churn", "age"]


def make(kind: str, **options: int):
    torch.manual_seed(0)
    return build("supermoe.model.readouts", REGISTRY[kind].Config(**options), dim=3, tasks=TASKS)


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


def experts_of(bank, x_D: Tensor) -> list[Tensor]:
    """The answers of a bank's experts to one row, expert by expert."""
    num_experts, width = bank.shape
    weight, bias = bank.linear.weight.view(num_experts, width, -1), bank.linear.bias.view(num_experts, width)
    return [F.relu(weight[e] @ x_D + bias[e]) for e in range(num_experts)]


def mixture(gate, x_D: Tensor, answers: list[Tensor]) -> Tensor:
    """Eq. 6 of MMoE, eq. 1 of PLE, for one row: a softmax over as many experts as there are."""
    share_E = torch.softmax(gate.weight @ x_D, dim=0)
    assert len(share_E) == len(answers)
    return sum(share * answer for share, answer in zip(share_E, answers, strict=True))


def test_mmoe_is_its_equation() -> None:
    readout = make("mmoe", experts=4, hidden=5).double()
    user_BD = torch.randn(6, 3, dtype=torch.float64)
    task_BX = readout(user_BD, {})
    assert (readout.questions, readout.width, list(task_BX)) == ([], 5, TASKS)
    for task, x_BX in task_BX.items():
        for row, x_D in enumerate(user_BD):
            expected = mixture(readout.gates[task], x_D, experts_of(readout.experts, x_D))
            torch.testing.assert_close(x_BX[row], expected)


def test_ple_is_its_equations() -> None:
    readout = make("ple", levels=2, shared_experts=2, task_experts=3, hidden=5).double()
    first, second = readout.levels
    user_BD = torch.randn(4, 3, dtype=torch.float64)
    task_BX = readout(user_BD, {})
    assert (readout.questions, readout.width, list(task_BX)) == ([], 5, TASKS)
    for row, x_D in enumerate(user_BD):
        own = {task: experts_of(first.own[task], x_D) for task in TASKS}
        shared = experts_of(first.shared, x_D)
        task_D = {task: mixture(first.gates[task], x_D, own[task] + shared) for task in TASKS}
        shared_D = mixture(first.shared_gate, x_D, [*own["churn"], *own["age"], *shared])
        for task in TASKS:
            answers = experts_of(second.own[task], task_D[task]) + experts_of(second.shared, shared_D)
            torch.testing.assert_close(task_BX[task][row], mixture(second.gates[task], task_D[task], answers))
    assert second.shared_gate is None  # nothing would read it


@pytest.mark.parametrize("kind", ["mmoe", "ple"])
def test_gradients_reach_the_user_and_every_weight(kind: str) -> None:
    readout = make(kind, hidden=2)
    check_gradients(readout, lambda x_BD: torch.cat(list(readout(x_BD, {}).values())), torch.randn(3, 3))
    sum(x_BX.square().sum() for x_BX in readout(torch.randn(20, 3, dtype=torch.float64), {}).values()).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in readout.parameters())


def test_ple_keeps_the_tasks_own_experts_apart() -> None:
    """Only the shared experts and the user's answer learn from both tasks."""
    readout = make("ple", levels=1)
    readout(torch.randn(20, 3), {})["churn"].square().sum().backward()
    (level,) = readout.levels
    assert level.own["age"].linear.weight.grad is None
    assert level.own["churn"].linear.weight.grad.any()
    assert level.shared.linear.weight.grad.any()
