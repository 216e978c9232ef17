from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from fake_run import make_labels, make_model, make_objective, make_run_batch, make_task

from supermoe.objectives.balancer import Balancer
from supermoe.objectives.balancers import Equal
from supermoe.objectives.objective import FEW_USERS, NonFiniteLoss, Objective
from supermoe.typed_yaml import UserError


@pytest.fixture(scope="module")
def world():
    objective = make_objective(balancer="fixed", weights={"churn": 2.0, "spend": 0.5})
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


def test_loss_is_the_weighted_sum_of_means_over_the_roots_of_the_priors(world) -> None:
    objective, model = world
    batch = make_run_batch(1)
    total, _, sum_T, count_T = total_and_gradient(objective, model, [batch])
    output = model(batch)
    expected = sum(entry.routing.aux_loss.item() for entry in output.routings)
    for i, (name, term) in enumerate(objective.terms.items()):
        evidence = term.num_users / (term.num_users + FEW_USERS) if name in objective.tasks else 1.0
        weight = objective.weight_T[i].item() * evidence
        expected += weight * sum_T[i].item() / count_T[i].item() / term.prior_loss**0.5
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


@pytest.mark.parametrize("names", [["churn"], ["churn", "spend", "item"]])
def test_the_prior_on_a_head_counts_as_its_tasks_loss_does_beside_any_number_of_tasks(names: list[str]) -> None:
    tasks, batch = {name: task for name, task in make_objective().tasks.items() if name in names}, make_run_batch(1)
    objective = Objective(tasks, {}, Equal(Equal.Config(), names=names))
    model = make_model(tasks, {}).eval()
    count_T = objective.counts([batch])
    totals = []
    for penalty in (0.0, 7.0):
        model.heads["churn"].penalty = lambda num_users, penalty=penalty: penalty
        total = objective.loss(model.heads, model(batch), batch, count_T, num_batches=2)[0]
        totals.append(total.item())
    task = tasks["churn"]
    evidence = task.num_users / (task.num_users + FEW_USERS)
    assert totals[1] - totals[0] == pytest.approx(7 / 2 * evidence / task.prior_loss**0.5 / len(names), rel=1e-4)


# --- gradients at the user's vector -----------------------------------------------------------------------------------


class Recorder(Balancer):
    """Measures gradients at every step and keeps what it is shown; steers as it is told."""

    Config = Equal.Config
    steers, every = True, 1

    def steer(self, gram_TT):
        self.seen = gram_TT
        return self.wanted_T

    def forward(self, step):
        self.step = step
        return self.weight_T


def recording(share: float = 1.0):
    """An objective and a model in evaluation mode, whose heads have weights."""
    objective = make_objective()
    balancer = objective.balancer = Recorder(Equal.Config(), names=list(objective.tasks))
    balancer.wanted_T = torch.full((len(objective.tasks),), share, dtype=torch.float64)
    model = make_model(objective.tasks, objective.pretraining).eval()
    with torch.no_grad():
        for head in model.heads.values():
            for parameter in head.parameters():
                parameter += 0.1 * torch.randn(parameter.shape)
    return objective, model


def users_gradients(objective, model, batch, count_T) -> torch.Tensor:
    """Gradient of every task's scaled mean loss at the users' vectors, one backward pass each -> [T, B * D]."""
    rows = []
    for i, (name, task) in enumerate(objective.tasks.items()):
        output = model(batch)
        loss = task.loss(model.heads[name], output, batch)[0]
        if name not in output.task_BX:
            rows.append(torch.zeros_like(output.user_BD).flatten())
            continue
        (gradient,) = torch.autograd.grad(loss, output.user_BD)
        scale = task.num_users / (task.num_users + FEW_USERS) / task.prior_loss**0.5 / count_T[i].item()
        rows.append(scale * gradient.flatten())
    return torch.stack(rows)


def test_inner_products_are_those_of_the_tasks_gradients_and_batches_add_up() -> None:
    objective, model = recording()
    batches = [make_run_batch(1), make_run_batch(2)]
    _, _, sum_T, count_T = total_and_gradient(objective, model, batches)
    objective.finish_step(sum_T, count_T)
    expected_TT = 0.0
    for batch in batches:
        gradient_TX = users_gradients(objective, model, batch, count_T)
        expected_TT = expected_TT + gradient_TX @ gradient_TX.t()
    torch.testing.assert_close(objective.balancer.seen, (gradient_TX @ gradient_TX.t()).double(), rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(objective.balancer.step.gram_TT, expected_TT.double(), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("task", ["churn", "basket", "item"])
def test_a_share_scales_what_passes_below_the_head_and_nothing_else(task: str) -> None:
    batch, share, found = make_run_batch(1), 0.25, {}
    objective, model = recording()
    index = list(objective.tasks).index(task)
    for wanted in (1.0, share, 0.0):
        objective.balancer.wanted_T[index] = wanted
        _, found[wanted], _, _ = total_and_gradient(objective, model, [batch])
    own = f"heads.{task}_."
    tied = {"embedding.tables.type_.weight"} if task in ("basket", "item") else set()  # a head's own reach
    for name, whole in found[1.0].items():
        if name.startswith("heads."):
            torch.testing.assert_close(found[0.0].get(name, torch.zeros(())), whole, msg=name)
        elif name not in tied:
            rest = found[0.0].get(name, torch.zeros_like(whole))
            torch.testing.assert_close(found[share][name], rest + share * (whole - rest), rtol=1e-3, atol=1e-7)
    trunk = "encoder.blocks.0.feed_forward.w_in.weight"
    assert not torch.equal(found[0.0][trunk], found[1.0][trunk])
    assert any(name.startswith(own) and gradient.any() for name, gradient in found[0.0].items())


def test_a_read_out_that_passes_no_gradient_on_is_refused() -> None:
    objective, model = recording()
    batch = make_run_batch(1)
    output = model(batch)
    cut = replace(output, task_BX={name: x_BX.detach() for name, x_BX in output.task_BX.items()})
    with pytest.raises(UserError, match=r"loss\.balancer=equal needs .* and model\.readout passes none of 'churn' on"):
        objective.loss(model.heads, cut, batch, objective.counts([batch]))


def test_tasks_that_all_learn_from_events_have_no_gradients_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    item = {"item": make_task("next_item", "item")}
    spec = replace(item["item"].head_spec(), reads="event")
    monkeypatch.setattr(item["item"], "head_spec", lambda: spec)
    balancer = Recorder(Equal.Config(), names=["item"])
    with pytest.raises(UserError, match=r"no task reads it: all learn from events\. Choose a balancer of losses alone"):
        Objective(item, {}, balancer)


@pytest.mark.parametrize(("units", "power"), [("nats", 0), ("prior", 1)])
def test_other_units_and_no_evidence(units: str, power: float) -> None:
    tasks, batch = make_objective().tasks, make_run_batch(1)
    model = make_model(tasks, {}).eval()
    objective = Objective(tasks, {}, Equal(Equal.Config(), names=list(tasks)), units=units, few_users=0)
    loss, sum_T = objective.loss(model.heads, model(batch), batch, objective.counts([batch]))
    priors = torch.tensor([task.prior_loss for task in tasks.values()], dtype=torch.float64)
    total = (sum_T / objective.counts([batch]) / priors**power).mean().item()
    total += sum(entry.routing.aux_loss.item() for entry in model(batch).routings)
    assert loss.item() == pytest.approx(total, rel=1e-5)
