"""Boosted trees beside the network: that they are scikit-learn's, and when they have a say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_run import make_task
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

from supermoe.model.trees import MODELS, BoostedTrees
from supermoe.objectives.task import Task
from supermoe.training.boosting import MIN_EXAMPLES, TREES, UNSEEN, best_share, fit_trees

SIZE, ROUNDS = 600, 5
SEED = 3


def make_store(kind: str, seed: int = 0) -> Any:
    """Two features tell the label, some of both missing; a third has no value in training."""
    rng = np.random.default_rng(seed)
    features = rng.random((SIZE, 3)).astype(np.float32)
    signal = features[:, 0] + (features[:, 1] > 0.5)
    features[rng.random((SIZE, 3)) < 0.1] = np.nan
    features[:, 2] = np.where(np.arange(SIZE) < 500, np.nan, 1.0)
    missing = rng.random(SIZE) < 0.2
    labels = {
        "churn": np.where(missing, np.nan, signal > 1).astype(np.float32),
        "spend": np.where(missing, np.nan, 3 * signal + 7).astype(np.float32),
        "age": np.where(missing, -1, np.digitize(signal, [0.6, 1.2])).astype(np.int32),
    }
    return SimpleNamespace(labels={kind: labels[kind]}, features=features, rows_of=lambda split: np.arange(500))


def planted(task: Task, store: Any) -> BoostedTrees:
    trees, fitted = BoostedTrees(ROUNDS, task.head_spec().size), fit_trees(task, store, ROUNDS, SEED)
    assert fitted is not None
    trees.plant(*fitted)
    return trees


def logits(task: Task, store: Any) -> np.ndarray:
    return planted(task, store)(torch.from_numpy(store.features)).numpy()


def prepared(kind: str, name: str, store: Any) -> Task:
    task = make_task(kind, name)
    task.fit_prior(torch.from_numpy(store.labels[name][:500]))
    return task


def models(cls: type, store: Any, name: str) -> list[Any]:
    options = {**TREES, "max_iter": ROUNDS}
    return [cls(**options, random_state=MODELS * SEED + m).fit(*known(store, name)) for m in range(MODELS)]


def known(store: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    label = store.labels[name][:500]
    rows = np.flatnonzero(~np.isnan(label) if label.dtype.kind == "f" else label >= 0)
    return store.features[rows, :2], label[rows]


def test_trees_of_a_binary_label_answer_what_the_library_answers() -> None:
    store = make_store("churn")
    fitted = models(HistGradientBoostingClassifier, store, "churn")
    expected = np.mean([model.decision_function(store.features[:, :2]) for model in fitted], axis=0)
    assert np.ptp(expected) > 1
    np.testing.assert_allclose(logits(prepared("binary", "churn", store), store)[:, 0], expected, rtol=1e-5, atol=1e-6)


def test_trees_of_a_number_answer_in_its_units() -> None:
    store = make_store("spend")
    task = prepared("regression", "spend", store)
    fitted = models(HistGradientBoostingRegressor, store, "spend")
    expected = np.mean([model.predict(store.features[:, :2]) for model in fitted], axis=0)
    answer = task.decode(torch.from_numpy(logits(task, store)))
    assert answer.std() > 0.3
    np.testing.assert_allclose(answer, expected, rtol=1e-4)


@pytest.mark.parametrize("classes", [[0, 1, 2], [0, 2], [1, 2]])
def test_trees_of_classes_know_those_that_training_has_shown(classes: list[int]) -> None:
    store = make_store("age")
    age = store.labels["age"]
    age[~np.isin(age, classes)] = -1
    fitted = models(HistGradientBoostingClassifier, store, "age")
    found = logits(prepared("multiclass", "age", store), store)
    probability = torch.from_numpy(found[:, classes]).softmax(1)
    log_p = [np.log(model.predict_proba(store.features[:, :2])) for model in fitted]
    expected = torch.from_numpy(np.mean(log_p, axis=0)).softmax(1)
    np.testing.assert_allclose(probability, expected, atol=1e-5)
    unseen = [c for c in range(3) if c not in classes]
    start = min(0.0, fitted[0]._baseline_prediction.min()) - UNSEEN
    np.testing.assert_allclose(found[:, unseen], start, rtol=1e-5)


def test_few_labels_or_labels_that_do_not_vary_get_no_trees() -> None:
    store = make_store("churn")
    task = prepared("binary", "churn", store)
    store.labels["churn"][MIN_EXAMPLES - 1 :] = np.nan
    assert fit_trees(task, store, ROUNDS, seed=0) is None
    store = make_store("churn")
    store.labels["churn"][:] = 1.0
    assert fit_trees(task, store, ROUNDS, seed=0) is None


def test_the_share_follows_who_is_right() -> None:
    task, rng = make_task("binary", "churn"), torch.Generator().manual_seed(0)
    labels = (torch.rand(500, generator=rng) > 0.5).float()
    right, noise = 3 * labels - 1.5, torch.randn(500, generator=rng)
    other = 3 * labels - 1.5 + 2 * torch.randn(500, generator=rng)
    blurred = right + 2 * torch.randn(500, generator=rng)
    assert best_share(task, right.sigmoid(), noise[:, None], labels) == 0.0
    assert best_share(task, noise.sigmoid(), right[:, None], labels) == 1.0
    assert best_share(task, blurred.sigmoid(), blurred[:, None], labels) == 0.5  # neither is
    assert 0.3 < best_share(task, blurred.sigmoid(), other[:, None], labels) < 0.7
    assert best_share(task, noise.sigmoid(), right[:, None], torch.full_like(labels, torch.nan)) == 0.0


def test_only_labels_in_time_lean_to_halves() -> None:
    """Ten examples on which the trees are a little worse."""
    labels = torch.tensor([0.0, 1.0]).repeat(5)
    network, trees = (labels - 0.5) * 2, (labels - 0.5) * 1.6
    in_time, attribute = make_task("binary", "churn"), make_task("binary", "churn")
    attribute.config = attribute.config.model_copy(update={"label": SimpleNamespace(attribute="plan")})
    assert 0.4 <= best_share(in_time, network.sigmoid(), trees[:, None], labels) <= 0.5
    assert best_share(attribute, network.sigmoid(), trees[:, None], labels) == 0.0


def test_a_smaller_loss_is_not_bought_with_the_metric() -> None:
    """The network orders everyone rightly and is far too sure; the constant has the smaller loss."""
    task, labels = make_task("binary", "churn"), torch.tensor([0.0, 0.0, 1.0, 1.0])
    sure = torch.tensor([-20.0, 19.0, 20.0, 30.0])
    share = best_share(task, sure.sigmoid(), torch.zeros(4, 1), labels)
    assert 0 < share < 1
