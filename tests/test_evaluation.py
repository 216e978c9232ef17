from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from fake_run import FakeBatches, make_model, make_tasks

from supermoe.data.batch import Batch
from supermoe.objectives.task import gain
from supermoe.training.evaluation import evaluate


class Backwards(FakeBatches):
    """The same batches in reverse order."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        return reversed(self.batches)


@pytest.fixture(scope="module")
def world():
    tasks = make_tasks()
    return tasks, make_model(tasks, {}), evaluate(make_model(tasks, {}), tasks, FakeBatches(3), "valid")


def test_predictions_are_in_the_stores_order_whatever_the_batches(world) -> None:
    tasks, model, found = world
    assert found.example_n.tolist() == list(range(18))
    again = evaluate(model, tasks, Backwards(3), "valid")
    for name in tasks:
        for key, values in found.scores[name].items():
            np.testing.assert_array_equal(values, again.scores[name][key])
    assert found.metrics == again.metrics


def test_predictions_are_those_of_the_model(world) -> None:
    tasks, model, found = world
    batch = FakeBatches(3).batches[1]
    model.eval()
    with torch.no_grad():
        expected = tasks["spend"].scores(model.heads["spend"], model(batch), batch)["score"]
    np.testing.assert_array_equal(found.scores["spend"]["score"][6:12], expected.numpy())
    np.testing.assert_array_equal(found.labels["spend"][6:12], batch.labels["spend"])


def test_metrics_prior_and_gains(world) -> None:
    tasks, _, found = world
    assert found.prior["churn"]["auc"] == 0.5
    for name, task in tasks.items():
        main = task.main_metric
        assert found.gains[name] == pytest.approx(gain(found.metrics[name][main], found.prior[name][main]))
    assert found.selection == pytest.approx(np.mean(list(found.gains.values())))
    assert found.undefined == {}


def test_the_models_mode_and_random_state_are_kept(world) -> None:
    tasks, model, _ = world
    model.train()
    before = torch.get_rng_state()
    evaluate(model, tasks, FakeBatches(1), "valid")
    assert model.training
    assert torch.equal(before, torch.get_rng_state())


def test_a_task_without_a_metric_is_left_out_of_the_selection(world) -> None:
    tasks, model, _ = world
    batches = FakeBatches(2)
    batches.batches = [replace(b, labels=dict(b.labels) | {"churn": torch.ones(6)}) for b in batches.batches]
    found = evaluate(model, tasks, batches, "test")
    assert math.isnan(found.gains["churn"])
    assert found.undefined == {"churn": "all 12 labels are 1"}
    assert found.selection == pytest.approx(np.mean([value for name, value in found.gains.items() if name != "churn"]))
