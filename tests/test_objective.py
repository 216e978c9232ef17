from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from fake_run import make_labels, make_model, make_objective, make_run_batch

from supermoe.objectives.objective import FEW_USERS, NonFiniteLoss


@pytest.fixture(scope="module")
def world():
    objective = make_objective(balancer="fixed", weights={"churn": 2.0, "next": 0.5})
    return objective, make_model(objective.tasks, objective.pretraining).eval()


def total_and_gradient(objective, model, groups):
    """Loss of one step over micro-batches, and its gradient."""
    model.zero_grad()
    count_T = objective.counts(groups)
    total, sums = 0.0, torch.zeros_like(count_T)
    for batch in groups:
        loss, part_T = objective.loss(model.heads, model(batch), batch, count_T, num_batches=len(groups))
        loss.backward()
        total, sums = total + loss.item(), sums + part_T
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, sums, count_T


def test_loss_is_the_weighted_sum_of_means_on_the_scale_of_the_priors(world) -> None:
    objective, model = world
    batch = make_run_batch(1)
    total, _, sum_T, count_T = total_and_gradient(objective, model, [batch])
    output = model(batch)
    expected = sum(entry.routing.aux_loss.item() for entry in output.routings)
    for i, (name, term) in enumerate(objective.terms.items()):
        evidence = term.num_users / (term.num_users + FEW_USERS) if name in objective.tasks else 1.0
        weight = objective.balancer.weight_T[i].item() * evidence
        expected += weight * sum_T[i].item() / count_T[i].item() / term.prior_loss
        assert count_T[i] == term.count(batch) > 0, name
    assert total == pytest.approx(expected, rel=1e-5)


def test_accumulation_counts_over_the_whole_step(world) -> None:
    """Two micro-batches with unlike numbers of labels give the mean over all labels, not the mean of two means."""
    objective, model = world
    first, second = make_run_batch(1), make_run_batch(2)
    labels = dict(second.labels) | {"churn": torch.tensor([1.0] + [math.nan] * 5)}
    second = replace(second, labels=labels)
    _, _, sum_T, count_T = total_and_gradient(objective, model, [first, second])
    churn = objective.names.index("churn")
    assert count_T[churn] == 7
    alone = [objective.tasks["churn"].loss(model.heads["churn"], model(b), b)[0].item() for b in (first, second)]
    losses = objective.finish_step(sum_T, count_T)
    assert losses["churn"] == pytest.approx(sum(alone) / 7 / objective.tasks["churn"].prior_loss, rel=1e-5)


def test_a_task_that_is_asked_nothing_is_left_out(world) -> None:
    objective, model = world
    batch = make_run_batch(1)
    batch = replace(batch, labels=dict(batch.labels) | {"spend": torch.full((6,), math.nan)})
    total, gradient, sum_T, count_T = total_and_gradient(objective, model, [batch])
    spend = objective.names.index("spend")
    assert (sum_T[spend].item(), count_T[spend].item()) == (0.0, 0.0)
    assert math.isfinite(total)
    assert all(g.isfinite().all() for g in gradient.values())
    losses = objective.finish_step(sum_T, count_T)
    assert math.isnan(losses["spend"])
    assert math.isfinite(losses["churn"])


def test_a_loss_that_is_not_finite_names_task_step_and_rows(world) -> None:
    objective, model = world
    batch = make_run_batch(1)
    labels = make_labels(6, seed=1) | {"spend": torch.tensor([math.inf] * 6)}
    batch = replace(batch, labels=labels)
    with pytest.raises(NonFiniteLoss, match=r"step 7: the loss of 'spend' is inf .* store rows 6, 7, 8"):
        objective.loss(model.heads, model(batch), batch, objective.counts([batch]), step=7)
