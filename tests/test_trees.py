"""Boosted trees as tensors: where an example falls, and what is added up."""

from __future__ import annotations

import numpy as np
import torch

from supermoe.model.trees import BoostedTrees

FIELDS = [
    ("is_leaf", "u1"),
    ("value", "f8"),
    ("feature_idx", "i8"),
    ("num_threshold", "f8"),
    ("missing_go_to_left", "u1"),
    ("left", "u4"),
    ("right", "u4"),
]


def stump(feature: int, threshold: float, missing_left: bool, low: float, high: float) -> np.ndarray:
    rows = [(0, 9.0, feature, threshold, missing_left, 1, 2), (1, low, 0, 0, 0, 0, 0), (1, high, 0, 0, 0, 0, 0)]
    return np.array(rows, dtype=FIELDS)


def test_without_trees_every_answer_is_zero() -> None:
    assert BoostedTrees(3, 2)(torch.rand(4, 5)).tolist() == [[0.0, 0.0]] * 4


def test_a_rank_may_be_dealt_nobody() -> None:
    assert BoostedTrees(3, 2)(torch.rand(0, 5)).shape == (0, 2)


def test_an_example_falls_left_up_to_the_threshold_and_where_missing_values_go() -> None:
    trees = BoostedTrees(2, 1)
    trees.plant(np.array([10.0]), {0: stump(1, 0.5, True, -1.0, 1.0), 1: stump(0, 0.25, False, -3.0, 3.0)})
    features_BP = torch.tensor([[0.25, 0.5], [0.3, 0.6], [torch.nan, torch.nan]])
    assert trees(features_BP).flatten().tolist() == [10 - 1 - 3, 10 + 1 + 3, 10 - 1 + 3]


def test_half_precision_features_meet_thresholds_as_they_are_stored() -> None:
    trees = BoostedTrees(1, 1)
    trees.plant(np.zeros(1), {0: stump(0, 0.1, True, -1.0, 1.0)})
    assert trees(torch.tensor([[0.1]], dtype=torch.float16)).item() == -1.0  # 0.09998
    assert trees(torch.tensor([[0.1001]], dtype=torch.float16)).item() == 1.0


def test_trees_of_several_classes_take_turns() -> None:
    trees = BoostedTrees(2, 2)
    trees.plant(np.array([0.5, 0.0]), {0: stump(0, 0.5, True, 1.0, 0.0), 3: stump(0, 0.5, True, 0.0, 4.0)})
    assert trees(torch.tensor([[0.0], [1.0]])).tolist() == [[1.5, 0.0], [0.5, 4.0]]
