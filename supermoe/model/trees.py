"""Boosted trees as tensors: what they answer is a few gathers per level, on any device and without another library."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from supermoe.data.batch import Batch
from supermoe.model.second_opinion import SecondOpinion

LEAVES = 8  # of one tree at most
MODELS = 3  # that are averaged: they draw other features, and err in other places
NODES = 2 * LEAVES - 1


class BoostedTrees(SecondOpinion):
    """logits_c = start_c + the leaves that an example falls into in the trees of class c, `rounds` of every model.

    A node sends an example to its left if the feature is at most the threshold, or missing and `missing_left`. A leaf
    is a node that leads to itself. Before `plant` all trees are a single leaf of value 0.
    """

    feature_WO: Tensor
    threshold_WO: Tensor
    missing_left_WO: Tensor
    child_WO2: Tensor
    leaf_WO: Tensor
    start_C: Tensor

    def __init__(self, rounds: int, size: int):
        super().__init__()
        self.rounds = rounds
        shape = (MODELS * rounds * size, NODES)
        self.register_buffer("feature_WO", torch.zeros(shape, dtype=torch.int32))
        self.register_buffer("threshold_WO", torch.zeros(shape))
        self.register_buffer("missing_left_WO", torch.zeros(shape, dtype=torch.bool))
        self.register_buffer("child_WO2", torch.zeros(*shape, 2, dtype=torch.int32))
        self.register_buffer("leaf_WO", torch.zeros(shape))
        self.register_buffer("start_C", torch.zeros(size))

    def forward(self, features_BP: Tensor) -> Tensor:
        """Features, NaN missing -> logits_BC."""
        num_trees = len(self.feature_WO)
        first_W = NODES * torch.arange(num_trees, device=features_BP.device)
        node_BW = first_W.expand(len(features_BP), num_trees)
        for _ in range(LEAVES - 1):  # no tree is deeper
            x_BW = features_BP.gather(1, self.feature_WO.flatten()[node_BW].long()).float()
            left_BW = x_BW <= self.threshold_WO.flatten()[node_BW]
            left_BW = torch.where(x_BW.isnan(), self.missing_left_WO.flatten()[node_BW], left_BW)
            before_BW, node_BW = node_BW, first_W + self.child_WO2.flatten(0, 1)[node_BW, (~left_BW).long()]
            if torch.equal(before_BW, node_BW):
                break
        value_BW = self.leaf_WO.flatten()[node_BW]
        return self.start_C + value_BW.unflatten(1, (-1, len(self.start_C))).sum(dim=1)

    def logits(self, batch: Batch) -> Tensor:
        """What the trees say of the batch's examples -> logits_BC."""
        return self(batch.features_BP)

    @torch.no_grad()
    def plant(self, start_C: NDArray, trees: Mapping[int, NDArray]) -> None:
        """Take over fitted trees by their place, class by class within each round of each model; others stay at 0.

        A tree is an array of nodes with the fields of scikit-learn's: `is_leaf`, `value`, `feature_idx`,
        `num_threshold`, `missing_go_to_left`, `left`, `right`.
        """
        self.start_C.copy_(torch.from_numpy(start_C))
        for t, nodes in trees.items():
            leaf, itself = nodes["is_leaf"].astype(bool), np.arange(len(nodes))
            children = [np.where(leaf, itself, nodes[side]) for side in ("left", "right")]
            columns = {
                self.feature_WO: np.where(leaf, 0, nodes["feature_idx"]),
                self.threshold_WO: nodes["num_threshold"],
                self.missing_left_WO: nodes["missing_go_to_left"].astype(bool),
                self.child_WO2: np.stack(children, axis=1),
                self.leaf_WO: np.where(leaf, nodes["value"], 0),
            }
            for buffer, column in columns.items():
                buffer[t, : len(nodes)] = torch.from_numpy(column.astype(np.float64)).to(buffer.dtype)
