from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fake_run import make_labels, make_model, make_run_batch, make_task, make_tasks, run_schema
from sklearn.metrics import roc_auc_score

from supermoe.data.batch import SetLabels
from supermoe.data.schema import LabelSchema
from supermoe.objectives.task import asked
from supermoe.typed_yaml import UserError

EXAMPLE_TASKS = ["churn", "spend", "age", "income", "topics"]


@pytest.fixture(scope="module")
def world():
    tasks = make_tasks()
    return tasks, make_model(tasks, {}).eval(), make_run_batch(3)


@pytest.mark.parametrize("name", EXAMPLE_TASKS)
def test_a_new_head_scores_the_prior_and_costs_its_loss(name: str, world) -> None:
    tasks, _, _ = world
    task = tasks[name]
    labels = make_labels(200, seed=9)[name]
    size = task.head_spec().size
    bias = torch.zeros(size)

    class Head:
        def __init__(self):
            self.bias = bias

    task.init_head(Head())
    mask = asked(labels)
    loss = task.losses(bias.expand(len(mask), -1), labels)[mask].mean().item()
    assert loss == pytest.approx(task.prior_loss, rel=0.02)  # the smoothing of 0.5 in 160 moves it by less
    score = task.decode(bias[None])[0].numpy()
    np.testing.assert_allclose(score, task.prior_scores(1)["score"][0], rtol=1e-5)


@pytest.mark.parametrize("name", EXAMPLE_TASKS)
def test_examples_that_are_not_asked_do_not_count(name: str, world) -> None:
    tasks, model, batch = world
    task, labels = tasks[name], batch.labels[name]
    if isinstance(labels, SetLabels):
        other = SetLabels(torch.zeros_like(labels.asked_B), torch.zeros_like(labels.offsets), labels.ids[:0])
    else:
        other = torch.full_like(labels, math.nan if labels.is_floating_point() else -1)
    output = model(batch)
    total, count = task.loss(model.heads[name], output, batch)
    assert count == task.count(batch) == int(asked(labels).sum())
    assert count > 0
    assert total.isfinite()
    nothing, none = task.loss(model.heads[name], output, replace(batch, labels={name: other}))
    assert (nothing.item(), none) == (0.0, 0)
    nothing.backward()
    assert all(p.grad.isfinite().all() for p in model.heads[name].parameters())
    model.zero_grad()


def test_losses_equal_torch() -> None:
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([0, 2, 1, 1, 0])
    multiclass = make_task("multiclass", "age", label_smoothing=0.1)
    expected = F.cross_entropy(logits, classes, label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(multiclass.losses(logits, classes), expected)
    huber = make_task("regression", "spend", loss="huber")
    huber.load_state({"mean": 2.0, "std": 4.0})
    target = torch.tensor([10.0, 2.0, 0.0, 2.0, 6.0])
    torch.testing.assert_close(
        huber.losses(logits[:, :1], target), F.huber_loss(logits[:, 0], (target - 2) / 4, reduction="none")
    )


def test_ordinal_probabilities_follow_the_declared_order() -> None:
    task = make_task("ordinal", "income", order=["low", "middle", "high"])
    logits = torch.tensor([[0.5, -1.0]])
    above_low, above_middle = 0.5, -1.0
    low = 1 - torch.sigmoid(torch.tensor(above_low))
    high = torch.sigmoid(torch.tensor(above_low)) * torch.sigmoid(torch.tensor(above_middle))
    expected = torch.stack([high, low, 1 - low - high])  # the label's own order: high, low, middle
    torch.testing.assert_close(task.decode(logits)[0], expected)
    assert task.head_spec().size == 2


def test_ordinal_order_must_name_every_class() -> None:
    with pytest.raises(UserError, match=r"tasks\.income\.order: the class 'middle'"):
        make_task("ordinal", "income", order=["low", "high"])


def test_regression_speaks_the_units_of_its_label() -> None:
    task = make_task("regression", "spend")
    task.fit_prior(torch.tensor([1.0, 3.0, math.nan]))
    assert task.state() == {"mean": 2.0, "std": 1.0}
    other = make_task("regression", "spend")
    other.load_state({"mean": 5.0, "std": 2.0})
    assert other.decode(torch.tensor([[1.5]])).item() == 8.0


def test_metrics_drop_examples_that_are_not_asked() -> None:
    task = make_task("binary", "churn")
    labels = torch.tensor([1.0, math.nan, 0.0, 1.0])
    score = np.array([0.9, 0.2, 0.4, 0.3])
    found = task.metrics({"score": score}, labels)
    assert found["auc"] == roc_auc_score([1, 0, 1], [0.9, 0.4, 0.3])
    regression = make_task("regression", "spend").metrics(
        {"score": np.array([1.0, 9.0, 4.0])}, torch.tensor([2.0, math.nan, 3.0])
    )
    assert regression == {"r2": -3.0, "rmse": 1.0, "mae": 1.0}


@pytest.mark.parametrize(
    ("kind", "name", "labels", "reason"),
    [
        ("binary", "churn", torch.tensor([1.0, 1.0, math.nan]), "all 2 labels are 1"),
        ("binary", "churn", torch.tensor([math.nan]), "no example is labelled"),
        ("regression", "spend", torch.tensor([4.0]), "all 1 labels are 4"),
        ("multiclass", "age", torch.tensor([2, 2, -1]), "all 2 labels are 2"),
        (
            "multilabel",
            "topics",
            SetLabels(torch.tensor([True, True]), torch.tensor([0, 1, 2]), torch.tensor([3, 3])),
            "no class has both",
        ),
    ],
)
def test_a_metric_that_is_not_defined_is_nan_with_a_reason(kind: str, name: str, labels, reason: str) -> None:
    task = make_task(kind, name)
    size = task.head_spec().size
    scores = {"score": np.full((len(asked(labels)), size) if kind.startswith("multi") else len(asked(labels)), 0.5)}
    assert math.isnan(task.metrics(scores, labels)[task.main_metric])
    assert reason in task.undefined(labels)


@pytest.mark.parametrize(
    ("kind", "label", "labels", "message"),
    [
        ("binary", LabelSchema(kind="number"), torch.tensor([0.0, 2.0]), "must be 0 or 1"),
        ("regression", LabelSchema(kind="number"), torch.tensor([3.0, 3.0]), "every training label is 3"),
    ],
)
def test_labels_that_do_not_fit_the_task_are_refused(kind: str, label: LabelSchema, labels, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_task(kind, "x", label=label).fit_prior(labels)


@pytest.mark.parametrize(("kind", "label_kind"), [("multiclass", "class"), ("ordinal", "class"), ("multilabel", "set")])
def test_a_label_without_classes_is_refused(kind: str, label_kind: str) -> None:
    with pytest.raises(UserError, match=r"tasks\.x"):
        make_task(kind, "x", label=LabelSchema(kind=label_kind, classes=[], num_classes=0))


def test_defined_metrics_have_no_reason(world) -> None:
    tasks, _, _ = world
    labels = make_labels(100, seed=1)
    assert {name: task.undefined(labels[name]) for name, task in tasks.items()} == dict.fromkeys(tasks, "")
    assert run_schema().labels.keys() == tasks.keys()
