from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sk

from supermoe.objectives import measures

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("ties", [False, True])
def test_auc_and_average_precision_equal_sklearn(ties: bool) -> None:
    for n in (2, 3, 17, 200):
        target = np.append([0, 1], RNG.integers(0, 2, n - 2))
        score = RNG.integers(0, 5, n) / 5 if ties else RNG.random(n)
        assert measures.auc(target, score) == pytest.approx(sk.roc_auc_score(target, score), abs=1e-12)
        assert measures.average_precision(target, score) == pytest.approx(
            sk.average_precision_score(target, score), abs=1e-12
        )
        assert measures.log_loss(target, score) == pytest.approx(
            sk.log_loss(target, np.clip(score, 1e-7, 1 - 1e-7)), abs=1e-9
        )


@pytest.mark.parametrize("target", [[], [1, 1], [0, 0]])
def test_measures_of_one_class_are_nan(target: list[int]) -> None:
    scores = np.linspace(0.1, 0.9, len(target))
    assert np.isnan(measures.auc(np.array(target), scores))
    assert np.isnan(measures.macro_auc(np.array(target).reshape(-1, 1), scores.reshape(-1, 1)))
    assert np.isnan(measures.r2(np.array(target, float), scores))


def test_macro_auc_skips_classes_without_both_labels() -> None:
    target = np.array([[1, 0, 1], [0, 0, 1], [1, 0, 1]])
    score = np.array([[0.9, 0.5, 0.5], [0.1, 0.5, 0.4], [0.4, 0.5, 0.3]])
    assert measures.macro_auc(target, score) == 1.0


def test_r2_equals_sklearn() -> None:
    target, value = RNG.normal(size=50), RNG.normal(size=50)
    assert measures.r2(target, value) == pytest.approx(sk.r2_score(target, value), abs=1e-12)


def test_calibration_error_of_honest_and_of_overconfident_predictions() -> None:
    probability = RNG.random(20_000)
    target = RNG.random(20_000) < probability
    assert measures.calibration_error(target, probability) < 0.02  # 15 bins of 1,333: standard error about 0.012 each
    assert measures.calibration_error(np.zeros(10), np.full(10, 0.7)) == pytest.approx(0.7)


def test_ranking_by_hand() -> None:
    top = np.array([[5, 3, 9], [4, 2, -1], [7, 8, 6]])
    offsets, ids = np.array([0, 2, 2, 3]), np.array([3, 1, 7])  # the middle row has nothing to find
    found = measures.ranking(top, offsets, ids, k=3)
    first = (1 / np.log2(3)) / (1 + 1 / np.log2(3))  # one of two relevant ids, at place 2
    assert found["ndcg@3"] == pytest.approx((first + 1) / 2)
    assert found["hr@3"] == 1.0
    assert found["recall@3"] == pytest.approx((0.5 + 1) / 2)


def test_ranking_does_not_confuse_rows_or_count_padding() -> None:
    found = measures.ranking(np.array([[7, -1], [3, -1]]), np.array([0, 1, 2]), np.array([3, 7]), k=2)
    assert found == {"ndcg@2": 0.0, "hr@2": 0.0, "recall@2": 0.0}


def test_ranking_with_nothing_to_find_is_nan() -> None:
    assert np.isnan(measures.ranking(np.zeros((2, 3), int), np.zeros(3, int), np.zeros(0, int))["ndcg@10"])
