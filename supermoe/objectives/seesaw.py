"""The seesaw-aware balancer: no task pays for another.

SUPERMOE (arXiv 2207.04648) does not publish its loss; this one is ours. It acts on three ways to lose to a model of
one's own, each switchable, for all tasks or for those that are named:

`follow`   A task behind its reference gains weight. With the regret r_t = reference_t - gain_t, in shares of the way
           from the prior to a perfect metric, the weights are the slope of the smooth maximum
           tau log sum_t exp(r_t / tau): w_t ~ exp(r_t / tau), within a factor `bound` of equal ones, half of the way
           at each evaluation.
`stop`     A task past its own best evaluation, though its training loss still falls, overfits: nothing of it reaches
           what is shared until it is better than ever. This is each task's own early stopping.
`project`  The gradient that is sent back from the user's vector is the one closest to sum_t w_t g_t that harms no task:
           min over v >= w of norm(sum_t v_t g_t), the dual of GEM's projection (arXiv 1706.08840), with inner products
           averaged over recent steps, since those of one batch are mostly noise.

The other two indicators are not the balancer's: which examples a task asks (`objective.py`), and the task's own
question (the read-out `indicator`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from supermoe.objectives.balancer import Balancer, Step, to_one
from supermoe.typed_yaml import Config, UserError, nearest

MEMORY = 0.95  # of the running training loss, per step
SWEEPS = 100  # of the projection at most; it is done when a sweep changes next to nothing


class Seesaw(Balancer):
    """Weights that follow regret, an early stop for each task, and a projection at the user's vector."""

    class Config(Config):
        type: str = "seesaw"
        follow: bool | list[str] = True
        stop: bool | list[str] = True
        project: bool | list[str] = True
        # what a task should reach: its own best so far, the prior, or a JSON file {task: gain of a model of its own}
        reference: Literal["best", "prior"] | Path = "best"
        temperature: float = Field(0.05, gt=0)  # tau: so far behind, a task weighs e times as much
        bound: float = Field(2.0, ge=1)  # of weights, over and under equal ones
        patience: int = Field(1, ge=1)  # evaluations past its best before a task stops
        every: int = Field(8, ge=1)  # steps between two measurements of the gradients
        memory: float = Field(0.9, ge=0, lt=1)  # of the inner products, per measurement

    steers = True
    reference_T: Tensor
    best_T: Tensor
    unimproved_T: Tensor
    loss_T: Tensor
    best_loss_T: Tensor
    open_T: Tensor
    gram_TT: Tensor

    def __init__(self, config: Any, *, names: list[str]):
        super().__init__(config, names=names)
        switches = {key: getattr(config, key) for key in ("follow", "stop", "project")}
        self.follow_T, self.stop_T, self.project_T = (chosen(names, key, value) for key, value in switches.items())
        self.every = config.every if bool(self.project_T.any()) else None
        self.validates = bool(self.follow_T.any() | self.stop_T.any())
        self.register_buffer("reference_T", self._reference())
        self.register_buffer("best_T", self.full(torch.nan))  # best gain
        self.register_buffer("unimproved_T", self.full(0.0))  # evaluations since then
        self.register_buffer("loss_T", self.full(torch.nan))  # running mean of the training loss
        self.register_buffer("best_loss_T", self.full(torch.nan))  # its value at the best gain
        self.register_buffer("open_T", self.full(1.0))  # 0: the task has stopped
        self.register_buffer("gram_TT", torch.zeros(len(names), len(names), dtype=torch.float64))

    def forward(self, step: Step) -> Tensor:
        known_T = torch.where(self.loss_T.isnan(), step.loss_T, self.loss_T)
        self.loss_T = torch.where(step.loss_T.isnan(), self.loss_T, torch.lerp(step.loss_T, known_T, MEMORY))
        if step.gram_TT is not None:
            self.gram_TT = torch.lerp(step.gram_TT, self.gram_TT, self.config.memory)
            self._share()
        return self.weight_T

    def observe(self, gain_T: Tensor) -> None:
        better_T = self.best_T.isnan() | (gain_T > self.best_T)
        self.best_T = torch.where(better_T & ~gain_T.isnan(), gain_T, self.best_T)
        self.best_loss_T = torch.where(better_T, self.loss_T, self.best_loss_T)
        self.unimproved_T = torch.where(better_T, 0.0, self.unimproved_T + ~gain_T.isnan())
        overfits_T = (self.unimproved_T >= self.config.patience) & (self.loss_T <= self.best_loss_T)
        self.open_T = 1.0 - (self.stop_T & overfits_T).double()
        self._follow(gain_T)
        self._share()

    def _follow(self, gain_T: Tensor) -> None:
        """Move the weights half of the way to where the regrets want them."""
        reference_T = self.best_T if self.config.reference == "best" else self.reference_T
        # Overfitting is no regret that more weight would mend.
        regret_T = torch.where(self.follow_T & (self.open_T > 0), (reference_T - gain_T).nan_to_num(), 0.0)
        ratio_T = (regret_T / self.config.temperature).softmax(0) * len(self.names)
        target_T = to_one(ratio_T.clamp(1 / self.config.bound, self.config.bound))
        self.weight_T = (self.weight_T + target_T) / 2

    def _share(self) -> None:
        """Shares of the next steps: zero for tasks that have stopped, the projection's for the others."""
        push_T = self.weight_T * self.open_T
        moved_T = project(self.gram_TT, push_T, self.project_T & (push_T > 0), self.config.bound)
        self.share_T = moved_T / self.weight_T

    def _reference(self) -> Tensor:
        """Gains that the tasks should reach -> [T]."""
        path = self.config.reference
        if not isinstance(path, Path):
            return self.full(0.0)
        key = "loss.balancer.reference"
        try:
            gains = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{key}: cannot read {path} as JSON: {error}") from None
        if not isinstance(gains, dict) or not all(isinstance(gain, int | float) for gain in gains.values()):
            raise UserError(f'{key}: {path} must map every task to a number, such as {{"churn": 0.31}}')
        missing = [name for name in self.names if name not in gains]
        if missing:
            raise UserError(
                f"{key}: {path} is about other tasks: it has no '{missing[0]}', {nearest(missing[0], gains)}"
            )
        return torch.tensor([float(gains[name]) for name in self.names], dtype=torch.float64)


def chosen(names: list[str], key: str, value: bool | list[str]) -> Tensor:
    """A switch of the config as a mask of the tasks -> bool [T]."""
    named = names if value is True else value or []
    for name in named:
        if name not in names:
            raise UserError(f"loss.balancer.{key}: there is no task '{name}', {nearest(name, names)}")
    return torch.tensor([name in named for name in names])


def project(gram_TT: Tensor, push_T: Tensor, guarded_T: Tensor, bound: float) -> Tensor:
    """Weights of the gradient closest to sum_t push_t g_t that harms no guarded task: sum_s G_ts v_s >= 0 for these.

    Its dual is min over v >= push of v G v, with v = push where not guarded, solved by coordinate descent (Hildreth).
    `bound` keeps a guarded task's weight below that multiple of its push, also where harm remains: a task whose own
    gradient vanishes would ask for any weight.
    """
    weight_T, norm_T = push_T.clone(), gram_TT.diagonal()
    guarded = (guarded_T & (norm_T > 0)).nonzero()[:, 0].tolist()
    for _ in range(SWEEPS):
        before_T = weight_T.clone()
        for t in guarded:
            relaxed = weight_T[t] - gram_TT[t] @ weight_T / norm_T[t]
            weight_T[t] = relaxed.clamp(push_T[t], bound * push_T[t])
        if torch.allclose(before_T, weight_T, rtol=1e-9, atol=0):
            break
    return weight_T
