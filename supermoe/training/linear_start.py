"""Heads of static attributes start as the linear models that a data scientist would fit to hand-made features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from supermoe.data.batches import label_rows
from supermoe.data.store import Store
from supermoe.objectives.task import Task, asked
from supermoe.training.warm_start import CHUNK, at_most

PRIORS = (1600.0, 400.0, 100.0, 25.0, 6.0, 1.5)  # users' worth of evidence that a weight must overcome, strongest first
FOLDS = 5  # of users, to choose among them
MAX_USERS = 20_000  # enough for some thousand weights; keeps their inputs in memory
ITERATIONS = 20  # towards each prior, from what was best under a stronger one; four times as many for the last fit
TOLERANCE = 1e-4  # largest entry of a gradient; at the prior they are some 0.1


def fit_direct(head: Any, task: Task, store: Store, inputs: Callable[[np.ndarray], Tensor], seed: int) -> None:
    """Fit the weights of a head's direct inputs, its bias, and how strong the prior on its weights is.

    Of every user the last example counts that is asked in training. The prior is the one under which users whom the
    model has not seen are told best: strong signals want a weak prior, and weak ones of few users a strong one.

    Args:
        inputs: examples of the store -> what the head reads directly, [n, X].
    """
    if head.direct_CX is None:  # neither features nor bags
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # thousands of small steps: threads would wait for each other
    try:
        _fit_direct(head, task, store, inputs, seed)
    finally:
        torch.set_num_threads(threads)


def _fit_direct(head: Any, task: Task, store: Store, inputs: Callable[[np.ndarray], Tensor], seed: int) -> None:
    examples = at_most(MAX_USERS, _last_of_users(task, store), seed)
    labels = label_rows(store.labels[task.name], examples)
    if task.undefined(labels):
        return
    start_CX = torch.cat([head.direct_CX, head.bias[:, None]], dim=1).detach()
    x_NX = start_CX.new_ones(len(examples), start_CX.shape[1])  # a last input for the bias
    for first in range(0, len(examples), CHUNK):
        x_NX[first : first + CHUNK, :-1] = inputs(examples[first : first + CHUNK])

    def losses(weight_CX: Tensor) -> Tensor:
        return task.losses(F.linear(x_NX, weight_CX), labels)

    fold_N = torch.arange(len(examples)) % FOLDS
    known = [fold_N != fold for fold in range(FOLDS)]
    fits, least = [start_CX] * FOLDS, float("inf")
    for prior in PRIORS:
        fits = [_fit(losses, known_N, prior / task.num_users, fit) for known_N, fit in zip(known, fits, strict=True)]
        loss = sum(float(losses(fit)[~known_N].sum()) for known_N, fit in zip(known, fits, strict=True))
        if loss > least:
            break
        least, head.direct_prior = loss, prior
    weight_CX = _fit(losses, torch.ones_like(known[0]), head.direct_prior / task.num_users, start_CX, 4 * ITERATIONS)
    with torch.no_grad():
        head.direct_CX.copy_(weight_CX[:, :-1])
        head.bias.copy_(weight_CX[:, -1])


def _last_of_users(task: Task, store: Store) -> np.ndarray:
    """The latest training example of every user who is asked in one."""
    rows = store.rows_of("train")
    rows = rows[asked(label_rows(store.labels[task.name], rows)).numpy()]
    user_N = np.asarray(store.examples.user)[rows]
    order = np.lexsort((np.asarray(store.examples.cut)[rows], user_N))
    is_last = np.append(np.diff(user_N[order]) != 0, True)
    return np.sort(rows[order][is_last])


def _fit(
    losses: Callable[[Tensor], Tensor], known_N: Tensor, penalty: float, start_CX: Tensor, iterations: int = ITERATIONS
) -> Tensor:
    """argmin of the mean loss of the known + penalty * |weights|^2, by L-BFGS; the last column, a bias, is free."""
    weight_CX = start_CX.clone().requires_grad_()
    options: dict[str, Any] = {"tolerance_grad": TOLERANCE, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([weight_CX], max_iter=iterations, **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = losses(weight_CX)[known_N].mean() + penalty * weight_CX[:, :-1].square().sum()
        total.backward()
        return total

    optimizer.step(closure)
    return weight_CX.detach()
