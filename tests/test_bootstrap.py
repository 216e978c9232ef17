"""Known answers of the bootstrap over users: what weights mean, coverage, and what pairing is worth."""

from __future__ import annotations

import numpy as np
import pytest

from supermoe.objectives import measures
from supermoe.studies.bootstrap import (
    interval,
    resamples,
    weighted_auc,
    weighted_macro_auc,
    weighted_mean,
    weighted_r2,
)

RNG = np.random.default_rng(0)
TARGET = RNG.integers(0, 2, 60)
SCORE = np.round(RNG.normal(TARGET, 1.0), 1)  # rounded: many ties
TIMES = RNG.integers(0, 3, (4, 60)).astype(float)  # four resamples


@pytest.mark.parametrize(
    ("weighted", "plain"),
    [
        (lambda w: weighted_auc(w, TARGET, SCORE), lambda i: measures.auc(TARGET[i], SCORE[i])),
        (lambda w: weighted_r2(w, TARGET + 1e4, SCORE + 1e4), lambda i: measures.r2(TARGET[i] + 1e4, SCORE[i] + 1e4)),
        (lambda w: weighted_mean(w, SCORE), lambda i: SCORE[i].mean()),
    ],
)
def test_a_weight_is_a_number_of_copies(weighted, plain):
    expected = [plain(np.repeat(np.arange(60), row.astype(int))) for row in TIMES]
    np.testing.assert_allclose(weighted(TIMES), expected, rtol=1e-9)


def test_macro_auc_leaves_out_classes_that_were_not_drawn():
    one_hot = np.eye(3)[RNG.integers(0, 3, 60)].astype(bool)
    score = RNG.normal(one_hot, 1.0)
    weights = np.ones((2, 60))
    weights[1, one_hot[:, 2]] = 0
    rest = ~one_hot[:, 2]
    expected = [measures.macro_auc(one_hot, score), measures.macro_auc(one_hot[rest], score[rest])]
    np.testing.assert_allclose(weighted_macro_auc(weights, one_hot, score), expected)


def test_what_is_not_defined_is_nan_and_no_interval_is_made_of_it():
    ones = np.ones((1, 3))
    assert np.isnan(weighted_auc(ones, np.ones(3), np.arange(3.0))[0])
    assert np.isnan(weighted_r2(ones, np.ones(3), np.arange(3.0))[0])
    assert np.isnan(weighted_mean(ones, np.full(3, np.nan))[0])
    assert np.isnan(weighted_macro_auc(ones, np.ones((3, 1), bool), np.ones((3, 1)))[0])
    assert np.isnan(interval(np.full(5, np.nan))).all()
    assert interval(np.append(np.arange(101.0), np.nan)) == pytest.approx((2.5, 97.5))


def test_resamples_draw_as_many_users_as_there_are_and_do_not_depend_on_the_blocks():
    whole = np.concatenate(list(resamples(50, 7, widest=1, seed=3)))
    blocks = list(resamples(50, 7, widest=125_000, seed=3))
    assert len(blocks) == 4
    np.testing.assert_array_equal(np.concatenate(blocks), whole)
    assert (whole.sum(axis=1) == 50).all()


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says():
    """Of 300 samples the 95 % interval holds the truth in 95 % +- 4 (three standard errors and some bias)."""
    rng = np.random.default_rng(1)
    weights = np.concatenate(list(resamples(80, 400, widest=1)))
    covered = 0
    for _ in range(300):
        low, high = interval(weighted_mean(weights, rng.normal(0.3, 1.0, 80)))
        covered += low <= 0.3 <= high
    assert 0.91 <= covered / 300 <= 0.99


def test_pairing_removes_what_two_models_share():
    rng = np.random.default_rng(2)
    shared = rng.normal(size=400)
    first, second = shared + 0.02, shared + rng.normal(0, 0.01, 400)
    weights = np.concatenate(list(resamples(400, 500, widest=1)))
    low, high = interval(weighted_mean(weights, first) - weighted_mean(weights, second))
    assert 0 < low < 0.02 < high + 0.005
    assert high - low < 0.005
    other = np.concatenate(list(resamples(400, 500, widest=1, seed=9)))
    low, high = interval(weighted_mean(weights, first) - weighted_mean(other, second))
    assert high - low > 0.2
