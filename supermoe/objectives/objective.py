"""One loss out of many: each task's mean over all it asked in the step, in units of its prior's root, times its weight.

    L = sum_t w_t * weight_t * evidence_t * (sum_i d_it l_it / sum_i d_it + penalty_t) / prior_t ** 0.5 + router losses

Losses are negative log-likelihoods. One of whose prior's H nats a share f can be explained sends gradients of the size
(2 f H) ** 0.5 into what is shared, most of them noise; over the root of H, all tasks send alike much. Both sums run
over all accumulation steps and ranks, so that a task with few labels is neither drowned nor noisy by accident. w_t is
the balancer's; pre-training objectives, which it does not weigh, keep the weight of equal losses.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from supermoe.data.batch import Batch
from supermoe.model.gradient import share_gradient
from supermoe.objectives.balancer import Balancer, Step
from supermoe.objectives.task import Task
from supermoe.typed_yaml import UserError

UNITS = {"root": 0.5, "prior": 1.0, "nats": 0.0}  # powers of the prior's loss that losses are divided by
FEW_USERS = 1000.0  # a task with this many labelled users has half a say in what is shared


class NonFiniteLoss(UserError):
    """A loss became NaN or infinite; the weights are still those before the step."""


class Objective:
    """The tasks and pre-training objectives of a run, T losses in all, and the balancer that weighs the tasks.

    Args:
        units: what every loss is divided by, see `UNITS`.
        few_users: evidence_t = n / (n + few_users) for a task of n labelled users; 0 gives every task a whole say.
    """

    def __init__(
        self,
        tasks: dict[str, Task],
        pretraining: dict[str, Any],
        balancer: Balancer,
        *,
        units: Literal["root", "prior", "nats"] = "root",
        few_users: float = FEW_USERS,
    ):
        self.tasks, self.pretraining, self.balancer = tasks, pretraining, balancer
        self.terms: dict[str, Any] = {**tasks, **pretraining}
        self.names = list(self.terms)
        evidence = {name: task.num_users / (task.num_users + few_users) for name, task in tasks.items()}
        self._weights = {name: term.config.weight * evidence.get(name, 1.0) for name, term in self.terms.items()}
        self._prior_T = torch.tensor([term.prior_loss for term in self.terms.values()], dtype=torch.float64)
        self._scale_T = torch.tensor(list(self._weights.values()), dtype=torch.float64) / self._prior_T ** UNITS[units]
        self._gram_TT: Tensor | None = None  # of the step so far
        if balancer.every and not any(task.head_spec().reads_examples for task in tasks.values()):
            raise UserError(
                f"loss.balancer={balancer.config.type} needs the tasks' gradients at the user's vector, and no task "
                f"reads it: all learn from events. Choose a balancer of losses alone, such as equal"
            )

    @property
    def weight_T(self) -> Tensor:
        """Weights of the T losses, tasks first, with sum one -> float64 [T]."""
        weight_T = torch.full_like(self._prior_T, 1 / len(self.names))
        weight_T[: len(self.tasks)] = self.balancer.weight_T * len(self.tasks) / len(self.names)
        return weight_T

    def balance(self) -> dict[str, dict[str, float]]:
        """What the balancer has chosen, by name: `weight` of every loss and, where it steers, `share` of every task."""
        chosen = {"weight": dict(zip(self.names, self.weight_T.tolist(), strict=True))}
        if self.balancer.steers:
            chosen["share"] = dict(zip(self.tasks, self.balancer.share_T.tolist(), strict=True))
        return chosen

    def counts(self, batches: list[Batch]) -> Tensor:
        """How often each loss is asked in one optimiser step -> float64 [T], summed over micro-batches and ranks."""
        counts = [[term.count(batch) for term in self.terms.values()] for batch in batches]
        return _all_reduce(torch.tensor(counts, dtype=torch.float64).sum(0))

    def tokens(self, batches: list[Batch]) -> dict[str, float]:
        """Events and examples of one optimiser step, over micro-batches and ranks, by the pass that reads them."""
        sizes = torch.tensor([[batch.num_events, batch.num_examples] for batch in batches], dtype=torch.float64)
        return dict(zip(("history", "indicator"), _all_reduce(sizes.sum(0)).tolist(), strict=True))

    def sums(self, heads: Any, output: Any, batch: Batch) -> Tensor:
        """Sums of this micro-batch's losses -> float64 [T], without a gradient."""
        with torch.no_grad():
            return torch.stack([self._sum(name, heads, output, batch) for name in self.names]).double().cpu()

    def loss(
        self,
        heads: Any,
        output: Any,
        batch: Batch,
        count_T: Tensor,
        *,
        num_batches: int = 1,
        tokens: dict[str, float] | None = None,
        step: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """This micro-batch's share of the step's loss (with a gradient), and the sums of losses (float64 [T]).

        Args:
            count_T: `counts` of the whole step.
            num_batches: micro-batches in the step on this rank.
            tokens: `tokens` of the whole step, over which router losses are averaged; default: of this batch.
        Raises:
            NonFiniteLoss: naming the task, the step and the examples.
        """
        measures = self.balancer.every is not None and step % self.balancer.every == 0
        share_T = self.balancer.share_T.clone()
        if measures:
            share_T.fill_(1.0)  # until the gradients are known
        read = dict.fromkeys(self.names, output)
        if self.balancer.steers:
            read |= {name: _steered(output, name, share) for name, share in zip(self.tasks, share_T, strict=True)}
        sums = [self._sum(name, heads, read[name], batch) for name in self.names]
        sum_T = torch.stack(sums)
        self._check(sum_T, batch, step)
        scale_T = self._scale_T / count_T.clamp(min=1)
        if measures:
            share_T.copy_(self.balancer.steer(self._measure(sums, scale_T, output)))
        total = ((self.weight_T * scale_T).to(sum_T) * sum_T).sum()
        total = total + self._router_losses(output, batch, tokens or self.tokens([batch]))
        if dist.is_initialized():  # data parallelism averages gradients over ranks; the counts are of all ranks
            total = total * dist.get_world_size()
        for (name, task), scale in zip(self.tasks.items(), self.weight_T * self._scale_T, strict=False):
            total = total + float(scale) * heads[name].penalty(task.num_users) / num_batches  # as its loss is scaled
        return total, sum_T.detach().double().cpu()

    def finish_step(self, sum_T: Tensor, count_T: Tensor, after_T: Tensor | None = None) -> dict[str, float]:
        """Tell the balancer how the step went -> mean loss by term over its prior's; NaN where nothing was asked.

        `after_T`: `sums` of the same batches after the update, where `balancer.looks_back`.
        """
        loss_T, after_T = self._mean(sum_T, count_T), None if after_T is None else self._mean(after_T, count_T)
        size = len(self.tasks)
        step = Step(loss_T[:size], count_T[:size], self._gram_TT, None if after_T is None else after_T[:size])
        self._gram_TT = None
        self.balancer.weight_T = self.balancer(step)
        return dict(zip(self.names, loss_T.tolist(), strict=True))

    def observe(self, gains: dict[str, float]) -> None:
        """Tell the balancer what an evaluation on the validation split found: gains over the prior, where defined."""
        gain_T = [gains.get(name, torch.nan) for name in self.tasks]
        self.balancer.observe(torch.tensor(gain_T, dtype=torch.float64))

    def _router_losses(self, output: Any, batch: Batch, tokens: dict[str, float]) -> Tensor | float:
        """This micro-batch's part of the routers' losses, which are means over its tokens."""
        part = {"history": batch.num_events, "indicator": batch.num_examples}
        losses = [(entry.tokens, entry.routing.aux_loss) for entry in output.routings]
        return sum(loss * (part[kind] / max(tokens[kind], 1.0)) for kind, loss in losses if loss is not None)

    def _mean(self, sum_T: Tensor, count_T: Tensor) -> Tensor:
        return _all_reduce(sum_T) / count_T / self._prior_T

    def _measure(self, sums: list[Tensor], scale_T: Tensor, output: Any) -> Tensor:
        """Inner products of the tasks' gradients at the users' vectors of all ranks' batches -> float64 [T, T].

        A vector of its own for every example, so that batches and ranks simply add up.
        """
        user_BD = output.user_BD
        gradient_TX = user_BD.new_zeros((len(self.tasks), user_BD.numel()), dtype=torch.float32)
        with torch.autocast(user_BD.device.type, enabled=False):
            for t, name in enumerate(self.tasks):
                if name in output.task_BX:
                    gradient_TX[t] = self._gradient(name, sums[t] * float(scale_T[t]), user_BD).flatten()
            gram_TT = _all_reduce((gradient_TX @ gradient_TX.t()).double().cpu())
        self._gram_TT = gram_TT if self._gram_TT is None else self._gram_TT + gram_TT
        return gram_TT

    def _gradient(self, name: str, loss: Tensor, user_BD: Tensor) -> Tensor:
        """d loss / d user_BD, by way of the task's head and the read-out alone."""
        found = None
        if loss.requires_grad and user_BD.requires_grad:
            (found,) = torch.autograd.grad(loss, user_BD, retain_graph=True, allow_unused=True)
        if found is None:
            raise UserError(
                f"loss.balancer={self.balancer.config.type} needs the tasks' gradients at the user's vector, and "
                f"model.readout passes none of '{name}' on: choose a differentiable read-out that reads the answer to "
                f"`user`, or a balancer of losses alone, such as equal"
            )
        return found

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


def _steered(output: Any, name: str, share: Tensor) -> Any:
    """The output as a task reads it: below what its head reads only a share of its gradient passes."""
    event_ND = None if output.event_ND is None else share_gradient(output.event_ND, share)
    task_BX = {name: share_gradient(output.task_BX[name], share)} if name in output.task_BX else {}
    return dataclasses.replace(output, event_ND=event_ND, task_BX=task_BX)


def _all_reduce(values: Tensor) -> Tensor:
    """Sum over all ranks."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values
