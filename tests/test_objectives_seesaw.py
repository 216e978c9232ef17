"""The seesaw-aware balancer: whom it raises, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from supermoe.objectives.balancer import to_one
from supermoe.objectives.seesaw import Seesaw
from supermoe.typed_yaml import UserError

NAMES = ["churn", "spend", "age"]
EQUAL = torch.full((3,), 1 / 3, dtype=torch.float64)


def make(folder: Path, gains: dict[str, float], **options: float) -> Seesaw:
    """A balancer whose twins reach these gains."""
    path = folder / "alone.json"
    path.write_text(json.dumps(gains))
    return Seesaw(Seesaw.Config(reference=path, **options), names=NAMES)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_weights_follow_how_far_each_task_is_behind_its_twin(tmp_path: Path) -> None:
    gains = {"age": 0.1, "churn": 0.5, "spend": 0.3, "other": 0.9}
    balancer, gain_T = make(tmp_path, gains, temperature=0.1, bound=10.0), vector(0.44, 0.3, 0.12)
    target_T = to_one(vector(0.6, 0.0, -0.2).exp())
    balancer.observe(gain_T)
    torch.testing.assert_close(balancer.weight_T, (EQUAL + target_T) / 2)  # half of the way
    balancer.observe(gain_T)
    torch.testing.assert_close(balancer.weight_T, EQUAL / 4 + target_T * 3 / 4)


def test_one_task_far_behind_does_not_hide_another(tmp_path: Path) -> None:
    """Each regret is bounded by itself: under a softmax the worst would take all the weight there is."""
    balancer = make(tmp_path, {"churn": 0.9, "spend": 0.4, "age": 0.3}, bound=4.0)
    for _ in range(40):
        balancer.observe(vector(0.3, 0.3, 0.3))
    torch.testing.assert_close(balancer.weight_T, to_one(vector(4.0, 4.0, 1.0)))


def test_a_task_without_a_metric_has_no_regret(tmp_path: Path) -> None:
    balancer = make(tmp_path, {"churn": 0.3, "spend": 0.9, "age": 0.3})
    balancer.observe(vector(0.3, float("nan"), 0.3))
    torch.testing.assert_close(balancer.weight_T, EQUAL)


def test_without_a_reference_the_remedy_is_told() -> None:
    with pytest.raises(ValueError, match=r"seesaw needs `reference`.* supermoe\.seesaw trains them"):
        Seesaw.Config()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"loss\.balancer\.reference: cannot read .*alone\.json as JSON: .*No such file"),
        ("{", r"cannot read .*alone\.json as JSON"),
        ('{"churn": "a"}', "must map every task to a number"),
        ('{"churn": 0.1, "spent": 0.2, "age": 0.3}', "is about other tasks: it has no 'spend', did you mean 'spent'"),
    ],
)
def test_a_reference_that_does_not_fit_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "alone.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        Seesaw(Seesaw.Config(reference=path), names=NAMES)
