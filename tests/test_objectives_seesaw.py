"""The seesaw-aware balancer: whom it raises, whom it stops, and that nobody is harmed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from supermoe.objectives.balancer import Step, to_one
from supermoe.objectives.seesaw import Seesaw, project
from supermoe.typed_yaml import UserError

NAMES = ["churn", "spend", "age"]
OFF = {"follow": False, "stop": False, "project": False}
EQUAL = torch.full((3,), 1 / 3, dtype=torch.float64)


def make(**options) -> Seesaw:
    return Seesaw(Seesaw.Config(**options), names=NAMES)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def train(balancer: Seesaw, *loss: float, gradient_TX: Tensor | None = None) -> None:
    gram_TT = None if gradient_TX is None else gradient_TX @ gradient_TX.t()
    balancer.weight_T = balancer(Step(vector(*loss), torch.ones(3).double(), gram_TT))


# --- the projection ---------------------------------------------------------------------------------------------------


def test_two_that_conflict_end_at_right_angles_to_the_one_that_was_harmed() -> None:
    gradient_TX = vector(4.0, 0.0, -1.0, 0.5).view(2, 2)
    gram_TT, everyone = gradient_TX @ gradient_TX.t(), torch.tensor([True, True])
    pushed_X = gradient_TX.sum(0)
    harmed = gradient_TX[1]
    assert pushed_X @ harmed < 0 < pushed_X @ gradient_TX[0]
    weight_T = project(gram_TT, torch.ones(2).double(), everyone, bound=100.0)
    torch.testing.assert_close(weight_T @ gradient_TX, pushed_X - (pushed_X @ harmed) / (harmed @ harmed) * harmed)
    assert weight_T[0] == 1


@pytest.mark.parametrize("seed", range(5))
def test_the_projection_is_optimal_and_harms_nobody(seed: int) -> None:
    """The conditions of Karush, Kuhn and Tucker for min over v >= w of v G v."""
    generator = torch.Generator().manual_seed(seed)
    gradient_TX = torch.randn(6, 8, dtype=torch.float64, generator=generator)
    push_T = torch.rand(6, dtype=torch.float64, generator=generator) + 0.1
    gram_TT = gradient_TX @ gradient_TX.t()
    weight_T = project(gram_TT, push_T, torch.ones(6).bool(), bound=1e6)
    gain_T, raised_T = gram_TT @ weight_T, weight_T - push_T
    assert (gain_T > -1e-6).all()
    assert (raised_T >= 0).all()
    assert (gain_T * raised_T).abs().max() < 1e-6  # only who would be harmed is raised, and only as far as needed


def test_without_conflict_nothing_changes() -> None:
    gradient_TX = torch.rand(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    push_T = vector(0.1, 0.2, 0.3, 0.4)
    assert torch.equal(project(gradient_TX @ gradient_TX.t(), push_T, torch.ones(4).bool(), 2.0), push_T)


def test_a_raise_is_bounded_and_only_the_guarded_are_raised() -> None:
    gradient_TX = vector(10.0, 0.0, -1e-3, 0.0).view(2, 2)
    gram_TT, push_T = gradient_TX @ gradient_TX.t(), torch.ones(2).double()
    assert project(gram_TT, push_T, torch.tensor([True, True]), bound=2.0).tolist() == [1.0, 2.0]
    assert project(gram_TT, push_T, torch.tensor([True, False]), bound=2.0).tolist() == [1.0, 1.0]
    unseen = torch.zeros(2, 2).double()
    assert project(unseen, push_T, torch.tensor([True, True]), bound=2.0).tolist() == [1.0, 1.0]


def test_conflict_is_averaged_over_measurements_before_it_counts() -> None:
    balancer = make(memory=0.5)
    agree = torch.eye(3).double()
    clash = vector(4.0, 0.0, 0.0, -1.0, 0.5, 0.0, 0.0, 0.0, 1.0).view(3, 3)
    train(balancer, 1.0, 1.0, 1.0, gradient_TX=agree)
    assert balancer.share_T.tolist() == [1.0, 1.0, 1.0]
    train(balancer, 1.0, 1.0, 1.0, gradient_TX=clash)
    mean_TT = 0.25 * agree + 0.5 * (clash @ clash.t())
    expected_T = project(mean_TT, torch.ones(3).double(), torch.ones(3).bool(), 2.0)
    torch.testing.assert_close(balancer.share_T, expected_T)
    assert balancer.share_T[1] > 1


# --- weights that follow regret ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["prior", "file"])
def test_weights_are_the_slope_of_the_smooth_maximum_of_regrets(tmp_path: Path, reference: str) -> None:
    target_T = vector(0.5, 0.3, 0.1) if reference == "file" else torch.zeros(3).double()
    (tmp_path / "alone.json").write_text(json.dumps({"age": 0.1, "churn": 0.5, "spend": 0.3, "other": 0.9}))
    path = tmp_path / "alone.json" if reference == "file" else "prior"
    balancer, gain_T = make(reference=path, temperature=0.1, bound=10.0, stop=False), vector(0.44, 0.3, 0.12)
    regret_T = (target_T - gain_T).requires_grad_()
    (0.1 * (regret_T / 0.1).exp().sum().log()).backward()
    balancer.observe(gain_T)
    torch.testing.assert_close(balancer.weight_T, (EQUAL + regret_T.grad) / 2)  # half of the way
    balancer.observe(gain_T)
    torch.testing.assert_close(balancer.weight_T, EQUAL / 4 + regret_T.grad * 3 / 4)


def test_a_task_that_fell_behind_its_own_best_gains_weight_within_the_bound() -> None:
    balancer = make(temperature=1e-3, stop=False)
    balancer.observe(vector(0.3, 0.3, 0.3))
    torch.testing.assert_close(balancer.weight_T, EQUAL)
    for _ in range(40):
        balancer.observe(vector(0.3, 0.1, 0.3))
    torch.testing.assert_close(balancer.weight_T, to_one(vector(0.5, 2.0, 0.5)))


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


def test_a_stopped_task_asks_for_no_weight_and_no_guard() -> None:
    balancer = make()
    observe_after(balancer, 0.9, 0.20)
    assert observe_after(balancer, 0.7, 0.10)[0] == 0
    torch.testing.assert_close(balancer.weight_T, EQUAL)
    train(balancer, 0.6, 1.0, 1.0, gradient_TX=vector(4.0, 0.0, 0.0, -1.0, 0.5, 0.0, 0.0, 0.0, 1.0).view(3, 3))
    assert balancer.share_T.tolist() == [0.0, 1.0, 1.0]  # nothing of it is sent back, so it harms nobody


# --- switches and files -----------------------------------------------------------------------------------------------


def test_with_everything_off_it_is_equal() -> None:
    balancer = make(**OFF)
    assert (balancer.every, balancer.validates) == (None, False)
    for gain in (0.3, 0.1):
        train(balancer, gain, 1.0, 1.0)
        balancer.observe(vector(gain, 0.2, 0.2))
    torch.testing.assert_close(balancer.weight_T, EQUAL)
    assert balancer.share_T.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("key", ["follow", "stop", "project"])
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
