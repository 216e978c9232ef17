"""The bootstrap over users: metrics under many resamples at once, and intervals of them.

A resample is a number of times that each user was drawn. Two models measured under the same resamples are paired: what
is easy or hard about the drawn users cancels in their difference. Letters: R resamples, U users, n predictions.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]

CELLS = 250_000  # weights held at once, resamples times predictions: what a cache holds


def resamples(num_users: int, number: int, widest: int, seed: int = 0) -> Iterator[Array]:
    """`number` resamples of the users in blocks -> weight_RU; `widest`: most predictions a metric is taken over."""
    rng = np.random.default_rng(seed)
    block = max(1, CELLS // max(widest, num_users, 1))
    for start in range(0, number, block):
        rows = min(block, number - start)
        drawn = rng.integers(0, num_users, (rows, num_users)) + num_users * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * num_users).reshape(rows, num_users).astype(np.float64)


def weighted_mean(weight_Rn: Array, value_n: Array) -> Array:
    """Mean of the values that are not NaN -> [R]."""
    known = ~np.isnan(value_n)
    return _divide(weight_Rn[:, known] @ value_n[known], weight_Rn[:, known].sum(axis=1))


def weighted_r2(weight_Rn: Array, target_n: Array, value_n: Array) -> Array:
    """Share of the targets' variance that is explained -> [R]; NaN where the drawn targets are constant."""
    target = target_n.astype(np.float64) - target_n.mean(dtype=np.float64)  # centred: squares do not cancel
    error = (target_n - value_n).astype(np.float64)
    total_R = weight_Rn.sum(axis=1)
    variance_R = weight_Rn @ target**2 - _divide((weight_Rn @ target) ** 2, total_R)
    return 1 - _divide(weight_Rn @ error**2, variance_R)


def weighted_auc(weight_Rn: Array, target_n: NDArray, score_n: Array) -> Array:
    """Area under the ROC curve, ties counting half -> [R]; NaN where one class was not drawn."""
    order = np.argsort(score_n, kind="stable")
    score_n, positive_n = score_n[order], target_n.astype(bool)[order]
    # Of its equals, for each positive: the place of the first, and the place behind the last.
    start_P, end_P = (np.searchsorted(score_n, score_n[positive_n], side) for side in ("left", "right"))
    losses_Rn = np.zeros((len(weight_Rn), len(order) + 1))  # of those before each place
    np.cumsum(np.take(weight_Rn, order, axis=1) * ~positive_n, axis=1, out=losses_Rn[:, 1:])
    wins_RP = np.take(weight_Rn, order[positive_n], axis=1)
    below_RP = (np.take(losses_Rn, start_P, axis=1) + np.take(losses_Rn, end_P, axis=1)) / 2
    return _divide(np.einsum("rp,rp->r", wins_RP, below_RP), wins_RP.sum(axis=1) * losses_Rn[:, -1])


def weighted_macro_auc(weight_Rn: Array, target_nC: NDArray, score_nC: Array) -> Array:
    """Mean one-against-rest AUC over the classes that are defined in each resample -> [R]; NaN where none is."""
    by_class_CR = np.array([weighted_auc(weight_Rn, target_nC[:, c], score_nC[:, c]) for c in range(score_nC.shape[1])])
    defined_CR = ~np.isnan(by_class_CR)
    return _divide(np.where(defined_CR, by_class_CR, 0.0).sum(axis=0), defined_CR.sum(axis=0).astype(np.float64))


def interval(value_R: Array, level: float = 0.95) -> tuple[float, float]:
    """The middle `level` of the resamples that have a value; NaN when none has."""
    known = value_R[~np.isnan(value_R)]
    if len(known) == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _divide(above_R: Array, below_R: Array) -> Array:
    """above / below; NaN where below is 0."""
    return np.divide(above_R, below_R, out=np.full(len(below_R), np.nan), where=below_R > 0)
