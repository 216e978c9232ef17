"""Boosted trees beside a task's network: they see steps and products that a network needs far more examples for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from torch import Tensor

from supermoe.data.batches import label_rows
from supermoe.data.store import IdLists, Store, is_asked
from supermoe.model.trees import LEAVES, MODELS
from supermoe.objectives.task import Labels, Task, asked
from supermoe.training.warm_start import at_most

TREES: dict[str, Any] = {
    "learning_rate": 0.1,
    "max_leaf_nodes": LEAVES,
    "min_samples_leaf": 50,
    "l2_regularization": 5.0,
    "max_features": 0.2,
    "max_bins": 63,
    "early_stopping": False,
}
MAX_EXAMPLES = 50_000  # of a task's; keeps their features in memory
MIN_EXAMPLES = 4 * TREES["min_samples_leaf"]  # with fewer, trees can tell next to nothing apart
SHARES = np.linspace(0, 1, 21)
HALVES = 5.0  # nats of evidence that it takes to leave one side out, as the next cut is another one
UNSEEN = 3.0  # nats by which a class that trees have not seen is less likely than the rarest that they have


def fit_trees(task: Task, store: Store, rounds: int, seed: int) -> tuple[NDArray, dict[int, NDArray]] | None:
    """Trees on the training examples' features, as `BoostedTrees.plant` wants them; None where labels are too few.

    They are the mean of several models: with seeds of their own, as each sees a part of the features at every split.
    """
    label, rows = store.labels[task.name], store.rows_of("train")
    assert not isinstance(label, IdLists), "sets have no trees"
    rows = at_most(MAX_EXAMPLES, rows[is_asked(label)[rows]], seed)
    if len(rows) < MIN_EXAMPLES or task.undefined(label_rows(label, rows)):
        return None
    features_nP = np.array(store.features[rows], np.float32)
    told = np.flatnonzero(~np.isnan(features_nP).all(axis=0))  # scikit-learn fails on features without any value
    target_n, size = np.array(label[rows]), task.head_spec().size
    if task.config.type == "regression":
        kind, target_n = HistGradientBoostingRegressor, task.encode(torch.from_numpy(target_n))[:, 0].numpy()
    else:
        kind, target_n = HistGradientBoostingClassifier, target_n.astype(int)
    start_C, trees = np.zeros(size, np.float32), {}
    for m in range(MODELS):
        model = kind(**TREES, max_iter=rounds, random_state=MODELS * seed + m).fit(features_nP[:, told], target_n)
        its_start_C, places = _start(model, size)
        start_C += its_start_C / MODELS
        for turn, predictors in enumerate(model._predictors):
            for place, predictor in zip(places, predictors, strict=True):
                nodes = trees[(m * rounds + turn) * size + place] = predictor.nodes.copy()
                nodes["feature_idx"] = told[nodes["feature_idx"]]
                nodes["value"] /= MODELS
    return start_C, trees


def _start(model: Any, size: int) -> tuple[NDArray, Sequence[int]]:
    """What a fitted model answers before its first tree [size], and which logits its trees add to."""
    start_K = np.ravel(model._baseline_prediction)
    if size == 1:
        return start_K, [0]
    places = model.classes_[-len(start_K) :]  # of two classes, trees tell the second
    start_C = np.full(size, min(0.0, start_K.min()) - UNSEEN)
    start_C[model.classes_] = 0.0
    start_C[places] = start_K
    return start_C, places


def best_share(task: Task, scores_n: Tensor, trees_nC: Tensor, labels: Labels) -> float:
    """The share of trees of least loss among those under which the task's metric is at least the network's.

    Labels in time have a prior for halves: two models err together less than either. Attributes have none, as their
    heads read bags, which trees do not.

    Args:
        scores_n: what the network answers, as `Task.decode` gives it.
        trees_nC: the trees' logits for the same examples.
    """
    network_nC, asked_n = task.encode(scores_n), asked(labels)
    losses, metrics = [], []
    for share in SHARES:
        mixed_nC = torch.lerp(network_nC, trees_nC, share)
        losses.append(float(task.losses(mixed_nC, labels)[asked_n].double().sum()))
        metrics.append(task.metrics({"score": task.decode(mixed_nC).numpy()}, labels)[task.main_metric])
    if not metrics[0] <= max(metrics):  # there is none
        return 0.0
    prior = 0.0 if task.is_static else HALVES * (2 * SHARES - 1) ** 2
    return float(SHARES[np.where(np.array(metrics) >= metrics[0], np.array(losses) + prior, np.inf).argmin()])
