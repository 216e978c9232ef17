"""One loss out of many: each task's mean over all it asked in the step, on the scale of its prior, times its weight.

    L = sum_t w_t * weight_t * (sum_i d_it l_it / sum_i d_it) / prior_t + router losses

Both sums run over all accumulation steps and ranks, so that a task with few labels is neither drowned nor noisy by
accident.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from supermoe.data.batch import Batch
from supermoe.objectives.balancers import Balancer
from supermoe.objectives.task import Task
from supermoe.typed_yaml import UserError

FEW_USERS = 1000  # a task with this many labelled users has half a say in what is shared
HEAD_PRIOR = 150.0  # users' worth of evidence that the heads of static attributes must overcome to leave zero


class NonFiniteLoss(UserError):
    """A loss became NaN or infinite; the weights are still those before the step."""


class Objective:
    """The tasks and pre-training objectives of a run, and the balancer that weighs their T losses."""

    def __init__(self, tasks: dict[str, Task], pretraining: dict[str, Any], balancer: Balancer):
        self.tasks, self.pretraining, self.balancer = tasks, pretraining, balancer
        self.terms: dict[str, Any] = {**tasks, **pretraining}
        self.names = list(self.terms)
        evidence = {name: task.num_users / (task.num_users + FEW_USERS) for name, task in tasks.items()}
        self._weights = {name: term.config.weight * evidence.get(name, 1.0) for name, term in self.terms.items()}
        self._scale_T = torch.tensor([self._weights[name] / term.prior_loss for name, term in self.terms.items()])

    def counts(self, batches: list[Batch]) -> Tensor:
        """How often each loss is asked in one optimiser step -> float64 [T], summed over micro-batches and ranks."""
        counts = [[term.count(batch) for term in self.terms.values()] for batch in batches]
        return _all_reduce(torch.tensor(counts, dtype=torch.float64).sum(0))

    def loss(
        self, heads: Any, output: Any, batch: Batch, count_T: Tensor, *, num_batches: int = 1, step: int = 0
    ) -> tuple[Tensor, Tensor]:
        """This micro-batch's share of the step's loss (with a gradient), and the sums of losses (float64 [T]).

        Args:
            count_T: `counts` of the whole step.
            num_batches: micro-batches in the step; router losses are averaged over them.
        Raises:
            NonFiniteLoss: naming the task, the step and the examples.
        """
        sum_T = torch.stack([self._sum(name, heads, output, batch) for name in self.names])
        self._check(sum_T, batch, step)
        weight_T = (self.balancer.weight_T * self._scale_T / count_T.clamp(min=1)).to(sum_T)
        total = (weight_T * sum_T).sum()
        if dist.is_initialized():  # data parallelism averages gradients over ranks; the counts are of all ranks
            total = total * dist.get_world_size()
        for name, task in self.tasks.items():
            strength = self._weights[name] * HEAD_PRIOR / task.num_users
            total = total + strength * heads[name].penalty() / num_batches
        for entry in output.routings:
            if entry.routing.aux_loss is not None:
                total = total + entry.routing.aux_loss / num_batches
        return total, sum_T.detach().double().cpu()

    def finish_step(self, sum_T: Tensor, count_T: Tensor) -> dict[str, float]:
        """Tell the balancer how the step went -> mean loss by term over its prior's; NaN where nothing was asked."""
        priors_T = torch.tensor([term.prior_loss for term in self.terms.values()], dtype=torch.float64)
        loss_T = _all_reduce(sum_T) / count_T / priors_T
        self.balancer.weight_T = self.balancer(loss_T.float(), count_T.float())
        return dict(zip(self.names, loss_T.tolist(), strict=True))

    def _sum(self, name: str, heads: Any, output: Any, batch: Batch) -> Tensor:
        if name in self.tasks:
            return self.tasks[name].loss(heads[name], output, batch)[0]
        return self.pretraining[name].loss(heads, output, batch)[0]

    def _check(self, sum_T: Tensor, batch: Batch, step: int) -> None:
        sums = sum_T.detach().cpu()
        if not bool(sums.isfinite().all()):
            index = int((~sums.isfinite()).nonzero()[0])
            rows = ", ".join(map(str, batch.example_B[:5].tolist()))
            raise NonFiniteLoss(
                f"step {step}: the loss of '{self.names[index]}' is {float(sums[index])} on the batch of "
                f"{batch.num_examples} examples that holds store rows {rows}. The weights before this step are kept: "
                f"lower training.lr or training.clip_norm, use training.precision=fp32, or look at these examples"
            )


def _all_reduce(values: Tensor) -> Tensor:
    """Sum over all ranks."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values
