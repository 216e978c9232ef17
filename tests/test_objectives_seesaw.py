"""The seesaw-aware balancer: whom it raises and whom it stops."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from supermoe.objectives.balancer import Step, to_one
from supermoe.objectives.seesaw import Seesaw
from supermoe.typed_yaml import UserError

NAMES = ["churn", "spend", "age"]
OFF = {"follow": False, "stop": False}
EQUAL = torch.full((3,), 1 / 3, dtype=torch.float64)


def make(**options) -> Seesaw:
    return Seesaw(Seesaw.Config(**options), names=NAMES)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def train(balancer: Seesaw, *loss: float) -> None:
    balancer.weight_T = balancer(Step(vector(*loss), torch.ones(3).double()))


# --- weights that follow regret ---------------------------------------------------------------------------------------


def test_weights_follow_how_far_each_task_is_behind_its_twin(tmp_path: Path) -> None:
    path = tmp_path / "alone.json"
    path.write_text(json.dumps({"age": 0.1, "churn": 0.5, "spend": 0.3, "other": 0.9}))
    balancer, gain_T = make(reference=path, temperature=0.1, bound=10.0, stop=False), vector(0.44, 0.3, 0.12)
    target_T = to_one(vector(0.6, 0.0, -0.2).exp())
    balancer.observe(gain_T)
    torch.testing.assert_close(balancer.weight_T, (EQUAL + target_T) / 2)  # half of the way
    balancer.observe(gain_T)
    torch.testing.assert_close(balancer.weight_T, EQUAL / 4 + target_T * 3 / 4)


def test_one_task_far_behind_does_not_hide_another(tmp_path: Path) -> None:
    """Each regret is bounded by itself: under a softmax the worst would take all the weight there is."""
    path = tmp_path / "alone.json"
    path.write_text(json.dumps({"churn": 0.9, "spend": 0.4, "age": 0.3}))
    balancer = make(reference=path, bound=4.0)
    for _ in range(40):
        balancer.observe(vector(0.3, 0.3, 0.3))
    torch.testing.assert_close(balancer.weight_T, to_one(vector(4.0, 4.0, 1.0)))


def test_a_task_that_fell_behind_its_own_best_gains_weight_within_the_bound() -> None:
    balancer = make(temperature=1e-3, bound=2.0, stop=False)
    balancer.observe(vector(0.3, 0.3, 0.3))
    torch.testing.assert_close(balancer.weight_T, EQUAL)
    for _ in range(40):
        balancer.observe(vector(0.3, 0.1, 0.3))
    torch.testing.assert_close(balancer.weight_T, to_one(vector(1.0, 2.0, 1.0)))


def test_a_task_without_a_metric_has_no_regret() -> None:
    balancer = make(stop=False)
    balancer.observe(vector(0.3, float("nan"), 0.3))
    torch.testing.assert_close(balancer.weight_T, EQUAL)
    assert balancer.best_T.isnan().tolist() == [False, True, False]


# --- the stop ---------------------------------------------------------------------------------------------------------


def observe_after(balancer: Seesaw, loss: float, gain: float) -> list[float]:
    """Train until the running loss of `churn` has moved, evaluate it, and see who is open; the others improve."""
    for _ in range(50):
        train(balancer, loss, 1.0, 1.0)
    best = balancer.best_T.nan_to_num(0.0)[1:] + 0.01
    balancer.observe(torch.cat([vector(gain), best]))
    return balancer.share_T.tolist()


def test_a_task_past_its_best_stops_while_it_overfits_and_opens_again_when_it_is_better_than_ever() -> None:
    balancer = make(follow=False)
    assert observe_after(balancer, 0.9, 0.20) == [1.0, 1.0, 1.0]
    assert observe_after(balancer, 0.7, 0.15) == [0.0, 1.0, 1.0]
    assert observe_after(balancer, 0.6, 0.19) == [0.0, 1.0, 1.0]
    assert observe_after(balancer, 0.5, 0.21) == [1.0, 1.0, 1.0]
    torch.testing.assert_close(balancer.weight_T, EQUAL)  # its head goes on


def test_a_task_that_others_harm_is_not_stopped() -> None:
    """Its training loss rises with its metric's fall: that is no overfitting."""
    balancer = make(follow=False)
    observe_after(balancer, 0.7, 0.20)
    assert observe_after(balancer, 0.8, 0.15) == [1.0, 1.0, 1.0]


def test_patience_and_names() -> None:
    patient, others = make(patience=2), make(stop=["spend", "age"])
    for balancer in (patient, others):
        observe_after(balancer, 0.9, 0.20)
        assert observe_after(balancer, 0.7, 0.15)[0] > 0
    assert observe_after(patient, 0.6, 0.15)[0] == 0
    assert observe_after(others, 0.6, 0.15)[0] > 0


def test_a_stopped_task_asks_for_no_weight() -> None:
    balancer = make()
    observe_after(balancer, 0.9, 0.20)
    assert observe_after(balancer, 0.7, 0.10)[0] == 0
    torch.testing.assert_close(balancer.weight_T, EQUAL)


# --- switches and files -----------------------------------------------------------------------------------------------


def test_with_everything_off_it_is_equal() -> None:
    balancer = make(**OFF)
    assert not balancer.validates
    for gain in (0.3, 0.1):
        train(balancer, gain, 1.0, 1.0)
        balancer.observe(vector(gain, 0.2, 0.2))
    torch.testing.assert_close(balancer.weight_T, EQUAL)
    assert balancer.share_T.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("key", ["follow", "stop"])
def test_a_switch_for_a_task_that_is_not_there_is_refused(key: str) -> None:
    with pytest.raises(UserError, match=rf"loss\.balancer\.{key}: there is no task 'chrun', did you mean 'churn'"):
        make(**{key: ["chrun"]})


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
        make(reference=path)
