"""Measures of predictions in plain numpy. A measure that is not defined on its input is NaN, never an exception."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


def auc(target_n: NDArray, score_n: Array) -> float:
    """Area under the ROC curve of scores for 0/1 targets; ties count half. NaN when one class is missing."""
    positive = target_n.astype(bool)
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if num_positive == 0 or num_negative == 0:
        return float("nan")
    ranks = _average_ranks(score_n)
    return float((ranks[positive].sum() - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))


def _average_ranks(values_n: Array) -> Array:
    """1-based ranks; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values_n, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse.reshape(-1)]


def average_precision(target_n: NDArray, score_n: Array) -> float:
    """Area under the precision-recall curve, sum of precision times recall step. NaN without a positive."""
    order = np.argsort(-score_n, kind="stable")
    hits = target_n.astype(bool)[order]
    if not hits.any():
        return float("nan")
    ends = np.flatnonzero(np.append(np.diff(score_n[order]) != 0, True))  # the last row of each group of equal scores
    true_positives = np.cumsum(hits)[ends]
    recall_steps = np.diff(true_positives, prepend=0) / hits.sum()
    return float((true_positives / (ends + 1) * recall_steps).sum())


def log_loss(target_n: NDArray, probability_n: Array) -> float:
    """Mean negative log-likelihood of 0/1 targets; probabilities are kept 1e-7 away from 0 and 1."""
    if len(target_n) == 0:
        return float("nan")
    p = np.clip(probability_n.astype(np.float64), 1e-7, 1 - 1e-7)
    return float(-np.where(target_n.astype(bool), np.log(p), np.log1p(-p)).mean())


def calibration(target_n: NDArray, probability_n: Array, num_bins: int = 15) -> tuple[Array, Array, NDArray[np.int64]]:
    """Mean prediction, mean target and size of bins that hold about equally many predictions."""
    order = np.argsort(probability_n, kind="stable")
    bins = [b for b in np.array_split(order, num_bins) if len(b)]
    predicted = np.array([probability_n[b].mean(dtype=np.float64) for b in bins])
    observed = np.array([target_n[b].mean(dtype=np.float64) for b in bins])
    return predicted, observed, np.array([len(b) for b in bins], np.int64)


def calibration_error(target_n: NDArray, probability_n: Array) -> float:
    """Expected calibration error over 15 bins of equal mass (Naeini et al. 2015)."""
    if len(target_n) == 0:
        return float("nan")
    predicted, observed, sizes = calibration(target_n, probability_n)
    return float((np.abs(predicted - observed) * sizes).sum() / sizes.sum())


def macro_auc(target_nC: NDArray, score_nC: Array) -> float:
    """Mean one-against-rest AUC over the classes that occur and are not universal; NaN when there is none."""
    values = [auc(target_nC[:, c], score_nC[:, c]) for c in range(target_nC.shape[1])]
    defined = [v for v in values if not np.isnan(v)]
    return float(np.mean(defined)) if defined else float("nan")


def r2(target_n: Array, value_n: Array) -> float:
    """Share of the targets' variance that is explained. NaN for fewer than two or constant targets."""
    target = target_n.astype(np.float64)
    total = ((target - target.mean()) ** 2).sum() if len(target) > 1 else 0.0
    return float(1 - ((target - value_n) ** 2).sum() / total) if total > 0 else float("nan")


def ranking(top_nk: NDArray, offsets: NDArray, ids: NDArray, k: int = 10) -> dict[str, float]:
    """NDCG, hit rate and recall of the first k of ranked ids against sets of relevant ids.

    Args:
        top_nk: ids by falling score; -1 where there is none.
        offsets, ids: the relevant ids of row i are `ids[offsets[i]:offsets[i + 1]]`; rows without one are left out.
    """
    relevant = np.diff(offsets) > 0
    by_row = ranking_by_row(top_nk, offsets, ids, k)
    return {name: float(row_n[relevant].mean()) if relevant.any() else float("nan") for name, row_n in by_row.items()}


def ranking_by_row(top_nk: NDArray, offsets: NDArray, ids: NDArray, k: int = 10) -> dict[str, Array]:
    """The measures of `ranking` of every row -> [n]; NaN for rows without a relevant id."""
    sizes = np.diff(offsets)
    top = top_nk[:, :k]
    base = int(max(top.max(initial=0), ids.max(initial=0))) + 1
    relevant = np.sort(np.repeat(np.arange(len(sizes)), sizes) * base + ids)  # one sortable number per (row, id)
    wanted = np.arange(len(sizes))[:, None] * base + top
    place = np.searchsorted(relevant, wanted)
    found = np.append(relevant, -1)[place] == wanted
    found &= top >= 0
    discount = 1 / np.log2(np.arange(2, top.shape[1] + 2))
    ideal = np.append(np.nan, np.cumsum(1 / np.log2(np.arange(2, k + 2))))[np.minimum(sizes, k)]
    hits = found.sum(1)
    missing = np.where(sizes > 0, 0.0, np.nan)
    return {
        f"ndcg@{k}": found @ discount / ideal,
        f"hr@{k}": (hits > 0) + missing,
        f"recall@{k}": hits / np.where(sizes > 0, sizes, np.nan),
    }
