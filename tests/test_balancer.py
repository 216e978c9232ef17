"""The base, and what all balancers have in common: alike on all ranks, right under bf16, accumulation and absence."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
from fake_run import make_model, make_objective, make_run_batch, seesaw_balancer

from supermoe.data.batch import Batch
from supermoe.model.supermoe import SuperMoE
from supermoe.objectives.balancer import VectorAdam, to_one
from supermoe.objectives.balancers import REGISTRY
from supermoe.objectives.jacobian_descent import JacobianDescent
from supermoe.objectives.objective import Objective


def test_vector_adam_is_adam_in_buffers() -> None:
    torch.manual_seed(0)
    value_T = torch.randn(3, dtype=torch.float64)
    ours, theirs = VectorAdam(3, lr=0.1), torch.nn.Parameter(value_T.clone())
    optimizer = torch.optim.Adam([theirs], lr=0.1)
    for _ in range(5):
        theirs.grad = torch.randn(3, dtype=torch.float64)
        value_T = ours(value_T, theirs.grad)
        optimizer.step()
        torch.testing.assert_close(value_T, theirs.detach())
    assert set(ours.state_dict()) == {"mean_T", "square_T", "steps_T"}


def test_vector_adam_rests_where_the_gradient_is_not_known() -> None:
    ours, alone = VectorAdam(2, lr=0.1), VectorAdam(1, lr=0.1)
    value_T, only = torch.zeros(2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for grad in (1.0, float("nan"), -3.0):
        value_T = ours(value_T, torch.tensor([grad, 0.5], dtype=torch.float64))
        if grad == grad:
            only = alone(only, torch.tensor([grad], dtype=torch.float64))
    assert value_T[0] == only[0]
    assert ours.steps_T.tolist() == [2, 3]


def test_to_one() -> None:
    assert to_one(torch.tensor([1.0, 3.0])).tolist() == [0.25, 0.75]


# --- all of them, in an objective -------------------------------------------------------------------------------------

OPTIONS: dict[str, dict] = {name: {} for name in REGISTRY} | {
    "fixed": {"weights": {"churn": 2.0}},
    "dwa": {"period": 1},
    "stch": {"warmup": 1},
}


def available(name: str) -> bool:
    return not issubclass(REGISTRY[name], JacobianDescent) or importlib.util.find_spec("torchjd") is not None


def make_world(name: str, folder: Path) -> tuple[Objective, SuperMoE]:
    objective = make_objective(**(seesaw_balancer(folder) if name == "seesaw" else {"balancer": name} | OPTIONS[name]))
    return objective, make_model(objective.tasks, objective.pretraining).eval()  # no dropout, so that ranks compare


def take_step(objective: Objective, model: SuperMoE, batches: list[Batch], step: int) -> None:
    """What the trainer does around the balancer in one step; the weights move a little, on all ranks alike."""
    model.zero_grad()
    count_T, sum_T = objective.counts(batches), torch.zeros(len(objective.names)).double()
    for batch in batches:
        loss, part_T = objective.loss(model.heads, model(batch), batch, count_T, num_batches=len(batches), step=step)
        loss.backward()
        sum_T += part_T
    with torch.no_grad():
        for n, parameter in enumerate(model.parameters()):
            parameter += 1e-3 * math.sin(n + step)
    after_T = None
    if objective.balancer.looks_back:
        after_T = sum(objective.sums(model.heads, model(batch), batch) for batch in batches)
    objective.finish_step(sum_T, count_T, after_T)
    objective.observe({name: 0.1 * math.sin(step + n) for n, name in enumerate(objective.tasks)})


def without(batch: Batch, task: str) -> Batch:
    return replace(batch, labels=dict(batch.labels) | {task: torch.full_like(batch.labels[task], torch.nan)})


def answers(name: str, folder: Path, batches_of: Callable[[int], list[Batch]]) -> list[list[float]]:
    """Weights and shares after each of two steps."""
    objective, model = make_world(name, folder)
    found = []
    for step in (1, 2):
        take_step(objective, model, batches_of(step), step)
        found.append(torch.cat([objective.weight_T, objective.balancer.share_T]).tolist())
    return found


def batch_of(rank: int, step: int) -> Batch:
    batch = make_run_batch(10 * step + rank)
    return without(batch, "churn") if rank == 1 else batch  # a task that one rank does not ask


def work(folder: Path) -> None:
    """One of two ranks: a batch of its own in every step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    names = [name for name in OPTIONS if available(name)]
    own = folder / f"rank{rank}"
    own.mkdir()
    found = {name: answers(name, own, lambda step: [batch_of(rank, step)]) for name in names}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def test_all_ranks_get_the_same_weights_and_those_of_one_process_that_accumulates(tmp_path: Path) -> None:
    ranks.launch(2, work, tmp_path)
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert one == other
    assert len(one) >= len(OPTIONS) - 5
    for name, found in one.items():
        if issubclass(REGISTRY[name], JacobianDescent):
            continue  # combines the gradients of the batches that are read at once, here two, there one
        together = answers(name, tmp_path, lambda step: [batch_of(rank, step) for rank in range(2)])
        torch.testing.assert_close(torch.tensor(found), torch.tensor(together), rtol=1e-4, atol=1e-5)  # fp32 losses


@pytest.mark.parametrize("name", [*REGISTRY])
def test_bf16_accumulation_and_absent_tasks(name: str, tmp_path: Path) -> None:
    """A task that one micro-batch does not ask, one that no batch asks, and a read-out under autocast."""
    if not available(name):
        pytest.skip("the extra `torchjd` is not installed")
    objective, model = make_world(name, tmp_path)
    model.train()
    batches = [without(make_run_batch(1), "churn"), make_run_batch(2)]
    with torch.autocast("cpu", torch.bfloat16):
        take_step(objective, model, [without(batch, "spend") for batch in batches], step=1)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert float(objective.weight_T.sum()) == pytest.approx(1)
    assert bool((objective.weight_T >= 0).all())
    assert bool(objective.balancer.share_T.isfinite().all())
    assert all(bool(gradient.any()) for gradient in (model.heads["churn"].weight.grad, model.heads["age"].weight.grad))
