"""Inputs enter the feature network the larger the more they tell about the tasks: features are selected softly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from supermoe.data.batch import SetLabels
from supermoe.data.batches import label_rows
from supermoe.data.store import Store
from supermoe.objectives.task import Labels, Task, asked, set_rows
from supermoe.training.warm_start import CHUNK, at_most, network_inputs

MAX_EXAMPLES = 20_000  # enough to tell correlations of some hundredths from none
MAX_CLASSES = 64  # of a task, its most frequent ones: what tells the rare ones is mostly noise
TINY = 1e-9  # variance of what does not vary, up to rounding


def weigh_inputs(model: Any, tasks: Mapping[str, Task], store: Store, seed: int) -> None:
    """Weigh the feature network's inputs by their correlation with labels over training examples.

    An input has the weight it has for the task to which it matters most; the best one of each task weighs alike, and
    the inputs together vary as much as before. Small steps of gradient descent learn first, and regularisation leaves
    longest, what comes in large: a few strong features are not drowned in thousands of inputs. Half of the size is for
    all inputs alike, as some tell nothing but together with others. Static attributes, whose heads read the features
    themselves, and rankings are not asked.
    """
    encoder = model.indicators.features
    rows = at_most(MAX_EXAMPLES, store.rows_of("train"), seed)
    targets = [
        target_columns(label_rows(store.labels[name], rows))
        for name, task in tasks.items()
        if task.head_spec().kind == "linear" and not task.is_static
    ]
    targets = [(asked_rows, y_nC) for asked_rows, y_nC in targets if y_nC.numel()]
    if encoder.network is None or not targets:
        return
    inputs = (network_inputs(model, store, chunk) for chunk in np.split(rows, range(CHUNK, len(rows), CHUNK)))
    squares, variance_J = squared_correlations(inputs, targets)
    told_J = torch.stack([square_J / square_J.max().clamp(min=1e-12) for square_J in squares]).amax(0)
    if told_J.any():
        weight_J = (told_J + told_J.mean()).sqrt()
        encoder.weigh(weight_J * (variance_J.sum() / (variance_J * weight_J.square()).sum()).sqrt())


def target_columns(labels: Labels) -> tuple[Tensor, Tensor]:
    """Labels -> rows of the examples that are asked [n], and what they are asked, as columns y_nC of numbers."""
    rows = asked(labels).nonzero()[:, 0]
    if not isinstance(labels, SetLabels) and labels.is_floating_point():
        return rows, labels[rows, None].float()
    if isinstance(labels, SetLabels):
        example, classes = set_rows(labels), labels.ids.long()
    else:
        example, classes = rows, labels[rows].long()
    counts_C = torch.bincount(classes)
    frequent_C = counts_C.argsort(descending=True, stable=True)[:MAX_CLASSES]
    column_C = torch.full_like(counts_C, -1)
    column_C[frequent_C] = torch.arange(len(frequent_C))
    kept = column_C[classes] >= 0
    y_BC = torch.zeros(len(asked(labels)), len(frequent_C))
    y_BC[example[kept], column_C[classes[kept]]] = 1.0
    return rows, y_BC[rows]


def squared_correlations(
    chunks: Iterable[Tensor], targets: Sequence[tuple[Tensor, Tensor]]
) -> tuple[list[Tensor], Tensor]:
    """Squared correlation of every input with a target, the largest over its columns, less what chance gives.

    Args:
        chunks: inputs x_NJ of all examples, in their order.
        targets: rows of the examples that count [n], and their values y_nC.

    Returns: of every target square_J in [0, 1], and the inputs' variances variance_J over all examples.
    """
    sums, everyone, start = [_Sums() for _ in targets], _Sums(), 0
    for x_NJ in chunks:
        everyone.add(x_NJ, x_NJ[:, :0])
        for of_target, (rows, y_nC) in zip(sums, targets, strict=True):
            inside = (rows >= start) & (rows < start + len(x_NJ))
            of_target.add(x_NJ[rows[inside] - start], y_nC[inside])
        start += len(x_NJ)
    return [of_target.squared_correlation() for of_target in sums], everyone.variance(everyone.xx_J, everyone.x_J)


class _Sums:
    """What correlations of inputs and targets are made of, added up chunk by chunk."""

    def __init__(self) -> None:
        self.count = 0
        self.x_J = self.xx_J = self.y_C = self.yy_C = self.xy_JC = torch.zeros(1, dtype=torch.float64)

    def add(self, x_NJ: Tensor, y_NC: Tensor) -> None:
        self.count += len(x_NJ)
        self.x_J, self.xx_J = self.x_J + x_NJ.sum(0), self.xx_J + x_NJ.square().sum(0)
        self.y_C, self.yy_C = self.y_C + y_NC.sum(0), self.yy_C + y_NC.square().sum(0)
        self.xy_JC = self.xy_JC + x_NJ.t() @ y_NC

    def variance(self, square: Tensor, total: Tensor) -> Tensor:
        return (square / self.count - (total / self.count).square()).clamp(min=0)

    def squared_correlation(self) -> Tensor:
        covariance_JC = self.xy_JC / self.count - torch.outer(self.x_J, self.y_C) / self.count**2
        variance_JC = torch.outer(self.variance(self.xx_J, self.x_J), self.variance(self.yy_C, self.y_C))
        square_JC = torch.where(variance_JC > TINY, covariance_JC.square() / variance_JC, 0.0)
        return (square_JC - 1 / self.count).clamp(min=0).amax(1)
