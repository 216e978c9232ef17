"""What earlier choices are worth as a ranking: fitted to the labels of training examples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from supermoe.data.batch import Batch
from supermoe.model.habits import FADING, Habits
from supermoe.model.packed import read_of_events
from supermoe.objectives.ranking import relevant_ids

MAX_LABELS = 50_000  # ids to find: enough for a handful of weights
MIN_LABELS = 200
PRIOR_COUNTS = 20.0  # choices that the prior is worth at the start


def fit_habits(task: Any, habits: Habits, batches: Iterable[Batch]) -> tuple[Tensor, Tensor] | None:
    """Weights and prior as `Habits.plant` wants them, of most likelihood; None where labels are too few.

    p_v = (sum_k a_k count_kv + m p'_v) / (sum_k a_k count_k + m), with p' what is popular among the labels.
    """
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    num_labels = 0
    for batch in batches:
        example_n, id_n = relevant_ids(batch.labels[task.name])
        own_nK, all_nK = counts_of(habits, batch, example_n, id_n)
        found.append((own_nK, all_nK, id_n))
        num_labels += len(id_n)
        if num_labels >= MAX_LABELS:
            break
    if num_labels < MIN_LABELS:
        return None
    own_nK, all_nK, id_n = (torch.cat(parts) for parts in zip(*found, strict=True))
    popular_V = torch.zeros(len(habits.prior_V))
    popular_V[-len(task.prior_C) :] = task.prior_C
    weight_K, worth = _fit(own_nK.double(), all_nK.double(), popular_V[id_n].double())
    return weight_K, worth * popular_V


def ask_last(batch: Batch, name: str, habits: Habits) -> Batch:
    """Ask for the last event that an example sees, and take it out of its history: labels for those who have none."""
    has_events_B = batch.visible_B > 0
    visible_B = batch.visible_B - has_events_B.long()
    label_B = torch.full_like(batch.visible_B, -1)
    label_B[has_events_B] = batch.fields[habits.field][(batch.offsets_S[batch.read_B] + visible_B)[has_events_B]]
    bags = batch.bags
    if habits.bag is not None:
        bag = bags[habits.bag]
        assert bag.weights is not None, "bags are counted"
        last_R = bag.ids == label_B[read_of_events(bag.offsets, len(bag.ids))]
        bags = {**bags, habits.bag: replace(bag, weights=(bag.weights - last_R.float()).clamp(min=0))}
    return replace(batch, visible_B=visible_B, bags=bags, labels={**batch.labels, name: label_B})


def counts_of(habits: Habits, batch: Batch, example_n: Tensor, id_n: Tensor) -> tuple[Tensor, Tensor]:
    """How often these examples chose these ids before, and anything -> own_nK, all_nK."""
    size = len(habits.prior_V)
    example_R, id_R, count_RK = habits.choices(batch)
    cell_u, place_R = torch.unique(example_R * size + id_R, return_inverse=True)
    count_uK = torch.zeros(len(cell_u) + 1, len(FADING)).index_add_(0, place_R, count_RK)  # the last: never chosen
    wanted_n = example_n * size + id_n
    place_n = torch.searchsorted(cell_u, wanted_n)
    known_n = torch.cat([cell_u, cell_u.new_full((1,), -1)])[place_n] == wanted_n
    all_BK = torch.zeros(batch.num_examples, len(FADING)).index_add_(0, example_R, count_RK)
    return count_uK[torch.where(known_n, place_n, len(cell_u))], all_BK[example_n]


def _fit(own_nK: Tensor, all_nK: Tensor, popular_n: Tensor) -> tuple[Tensor, float]:
    """The a_k and m of most likelihood."""
    start = torch.tensor([1.0] * len(FADING) + [PRIOR_COUNTS], dtype=torch.float64)
    log_weight = start.log().requires_grad_()
    optimizer = torch.optim.LBFGS([log_weight], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        weight = log_weight.exp()
        chosen_n = own_nK @ weight[:-1] + weight[-1] * popular_n
        return -(chosen_n / (all_nK @ weight[:-1] + weight[-1])).log().mean()

    def closure() -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return float(value.detach())

    optimizer.step(closure)
    weight = log_weight.detach().exp()
    return weight[:-1].float(), float(weight[-1])
