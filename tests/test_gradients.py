"""Cosines of the tasks' gradients at the user vector, on heads whose gradients are known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from supermoe.model.heads import HeadSpec
from supermoe.studies import gradients


class Head:
    """A task whose loss is direction . user vectors, summed; `direction` None: it does not read the vector."""

    def __init__(self, direction: list[float] | None, reads: str = "example"):
        self.direction, self.reads = direction, reads

    def head_spec(self) -> HeadSpec:
        return HeadSpec("linear", reads=self.reads)

    def loss(self, head, output, batch):
        if self.direction is None:
            return torch.zeros(()), 0
        return (output.user_BD * torch.tensor(self.direction)).sum(), 2


class Model(torch.nn.Module):
    def __init__(self, names):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(2))
        self.heads = dict.fromkeys(names)

    def forward(self, batch):
        return SimpleNamespace(user_BD=torch.ones(3, 2) + self.bias)


def test_opposite_orthogonal_and_absent_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = {
        "up": Head([1.0, 0.0]),
        "down": Head([-5.0, 0.0]),
        "aside": Head([0.0, 0.1]),
        "absent": Head(None),
        "events": Head([1.0, 1.0], reads="event"),
    }
    batch = SimpleNamespace(to=lambda device: batch)
    monkeypatch.setattr(gradients, "batches", lambda *args: SimpleNamespace(epoch=lambda number: iter([batch] * 3)))
    model = Model(tasks)
    run = SimpleNamespace(tasks=tasks, config=None, store=None, trainer=SimpleNamespace(load_best=lambda: model))
    found = gradients.gradient_cosines(run)
    assert found["tasks"] == ["up", "down", "aside", "absent"]
    *cosine, absent = found["cosine"]
    assert [row.pop() for row in cosine] == [None, None, None]
    torch.testing.assert_close(
        torch.tensor(cosine), torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    )
    assert absent == [None] * 4
