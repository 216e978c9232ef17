"""What a data scientist would do with the same features: boosted trees and ridge regression, one model per task."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from sklearn.decomposition import TruncatedSVD
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.linear_model import Ridge
from tqdm import tqdm

from supermoe.data.batches import label_rows
from supermoe.data.schema import FIRST_ID
from supermoe.data.store import SPLITS, IdLists, Store, is_asked
from supermoe.training.boosting import TREES
from supermoe.typed_yaml import UserError

BAG_DIRECTIONS = 32  # singular vectors of every bag's TF-IDF matrix
RIDGE_PENALTY = 1000.0
OPTIONS: dict[str, Any] = {**TREES, "max_iter": 75, "random_state": 0}
RANKED_EXAMPLES = 4_000  # training examples of the ranking model
NEGATIVES = 40  # ids per training example that were not taken
POPULAR = 200  # ids that everyone may be recommended
CHUNK = 500  # examples ranked at once


def boosting(store: Store, tasks: dict[str, Any], split: str) -> dict[str, dict[str, float]]:
    """Train a model per task on the training examples' features, evaluate on `split` -> metrics by task.

    Numbers and classes: gradient boosting. Sets of few classes: ridge regression on all classes at once. Ids of a
    vocabulary: gradient boosting of (example, id) pairs on the id's counts. Tasks asked of every event have no such
    baseline.
    """
    code = np.asarray(store.examples.split)
    train, test = (np.flatnonzero(code == SPLITS[name]) for name in ("train", split))
    inputs = _inputs(store, train)
    if inputs.shape[1] == 0:
        raise UserError("report.boosting: there are no `features` to learn from; declare some, or set it to false")
    found: dict[str, dict[str, float]] = {}
    for name, task in tqdm(tasks.items(), desc="baseline", leave=False):
        label = store.labels[name]
        if task.config.type == "next_item":
            continue
        if not isinstance(label, IdLists):
            scores = _trees(inputs, task, np.asarray(label), train, test)
        elif task.config.type == "retrieval":
            scores = _rank(store, task, label, train, test)
        else:
            scores = _ridge(inputs, task, label, train, test)
        found[name] = task.metrics(scores, label_rows(label, test))
    return found


def _inputs(store: Store, train: NDArray) -> NDArray:
    """Features and the leading directions of all bags, one row per example."""
    columns = [np.asarray(store.features)]
    for name, bag in store.bags.items():
        counts = _matrix(bag, store.schema.bags[name].size)
        tfidf = TfidfTransformer(sublinear_tf=True).fit(counts[train]).transform(counts)
        directions = min(BAG_DIRECTIONS, counts.shape[1] - 1)
        columns.append(TruncatedSVD(directions, n_iter=3, random_state=0).fit(tfidf[train]).transform(tfidf))
    return np.concatenate(columns, axis=1)


def _seen(inputs: NDArray, rows: NDArray) -> NDArray:
    """The columns that have a value in some of the rows: the others tell nothing, and scikit-learn fails on them."""
    return inputs[:, ~np.isnan(inputs[rows]).all(axis=0)]


def _trees(inputs: NDArray, task: Any, label: NDArray, train: NDArray, test: NDArray) -> dict[str, NDArray]:
    rows = train[is_asked(label[train])]
    inputs = _seen(inputs, rows)
    if task.config.type == "regression":
        return {"score": HistGradientBoostingRegressor(**OPTIONS).fit(inputs[rows], label[rows]).predict(inputs[test])}
    model = HistGradientBoostingClassifier(**OPTIONS).fit(inputs[rows], label[rows])
    probability = model.predict_proba(inputs[test])
    if label.dtype.kind == "f":
        return {"score": probability[:, 1]}
    scores = np.zeros((len(test), task.label.num_classes))
    scores[:, model.classes_] = probability
    return {"score": scores}


def _ridge(inputs: NDArray, task: Any, label: IdLists, train: NDArray, test: NDArray) -> dict[str, NDArray]:
    rows = train[is_asked(label)[train]]
    inputs = _seen(inputs, rows)
    center, spread = np.nanmean(inputs[rows], axis=0), np.nanstd(inputs[rows], axis=0)
    scaled = np.nan_to_num((inputs - center) / np.where(spread > 1e-6, spread, 1.0))
    target = _matrix(label, task.label.num_classes)[rows].toarray()
    model = Ridge(alpha=RIDGE_PENALTY).fit(scaled[rows], target)
    return {"score": np.clip(model.predict(scaled[test]), 1e-4, 1 - 1e-4)}


def _rank(store: Store, task: Any, label: IdLists, train: NDArray, test: NDArray) -> dict[str, NDArray]:
    """Boosting of (example, id) pairs: counts of the id in every bag of the field, and how popular the id is."""
    size = store.schema.fields[task.field].size
    bags = [_matrix(bag, size) for name, bag in store.bags.items() if store.schema.bags[name].field == task.field]
    target = _matrix(label, size)
    rng = np.random.default_rng(0)
    rows = train[target[train].getnnz(axis=1) > 0]
    popularity = np.asarray(target[rows].sum(axis=0)).ravel()
    popular = np.argsort(-popularity)[:POPULAR]
    rows = rng.permutation(rows)[:RANKED_EXAMPLES]
    example, ids = _candidates(bags, rows, popular, size)
    hit = np.asarray(target[rows[example], ids]).ravel() > 0
    keep = hit | (rng.random(len(ids)) < NEGATIVES * len(rows) / max((~hit).sum(), 1))
    pairs = _pair_inputs(bags, rows, example[keep], ids[keep], popularity)
    model = HistGradientBoostingClassifier(**OPTIONS | {"max_features": 1.0}).fit(pairs, hit[keep])
    top_k = np.full((len(test), task.config.top_k), -1)
    best_k = np.full(top_k.shape, -np.inf)
    for start in range(0, len(test), CHUNK):
        part = test[start : start + CHUNK]
        example, ids = _candidates(bags, part, popular, size)
        score = model.predict_proba(_pair_inputs(bags, part, example, ids, popularity))[:, 1]
        order = np.lexsort((-score, example))
        place = np.arange(len(order)) - np.searchsorted(example, example)
        kept = place < task.config.top_k
        top_k[start + example[kept], place[kept]] = ids[order][kept]
        best_k[start + example[kept], place[kept]] = score[order][kept]
    return {"top_k": top_k, "scores": best_k}


def _candidates(bags: list[Any], rows: NDArray, popular: NDArray, size: int) -> tuple[NDArray, NDArray]:
    """(example, id) pairs worth scoring, sorted by example: what the example's bags hold, and what is popular."""
    keys = [(np.arange(len(rows))[:, None] * size + popular).ravel()]
    for bag in bags:
        pairs = bag[rows].tocoo()
        keys.append(pairs.row.astype(np.int64) * size + pairs.col)
    example, ids = np.divmod(np.unique(np.concatenate(keys)), size)
    return example[ids >= FIRST_ID], ids[ids >= FIRST_ID]


def _pair_inputs(bags: list[Any], rows: NDArray, example: NDArray, ids: NDArray, popularity: NDArray) -> NDArray:
    columns = [popularity[ids]]
    for bag in bags:
        counts = np.asarray(bag[rows[example], ids]).ravel()
        total = np.asarray(bag[rows].sum(axis=1)).ravel()
        columns += [counts, counts / np.maximum(total, 1)[example]]
    return np.stack(columns, axis=1).astype(np.float32)


def _matrix(lists: IdLists, size: int) -> csr_matrix:
    """Lists of ids as a sparse matrix [n, size] of their counts."""
    values = np.ones(len(lists.ids), np.float32) if lists.counts is None else np.asarray(lists.counts)
    return csr_matrix((values, np.asarray(lists.ids), np.asarray(lists.offsets)), shape=(len(lists.offsets) - 1, size))
