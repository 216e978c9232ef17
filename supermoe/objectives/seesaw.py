"""The seesaw-aware balancer: no task pays for another.

SUPERMOE (arXiv 2207.04648) does not publish its loss; this one is ours. Each part is switchable, for all tasks or for
those that are named:

`follow`  A task behind its reference gains weight, one that is ahead gives some: w_t ~ exp(r_t / temperature), with the
          regret r_t = reference_t - gain_t in shares of the way from the prior to a perfect metric, within a factor
          `bound` of the weight of a task that is level, half of the way at each evaluation.
`stop`    A task past its own best evaluation, though its training loss still falls, overfits: nothing of it reaches
          what is shared until it is better than ever. This is each task's own early stopping.

The other indicators are not the balancer's: which examples a task asks (`objective.py`), the task's own question (the
read-out `indicator`), and the answers of a model of the task's own (`Task.teach`).
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


class Seesaw(Balancer):
    """Weights that follow regret, and an early stop for each task."""

    class Config(Config):
        type: str = "seesaw"
        follow: bool | list[str] = True
        stop: bool | list[str] = True
        # what a task should reach: its own best so far, or a JSON file {task: gain of a model of its own}
        reference: Literal["best"] | Path = "best"
        temperature: float = Field(0.01, gt=0)  # so far behind, a task weighs e times as much
        bound: float = Field(5.0, ge=1)  # of that factor, and of its inverse
        patience: int = Field(1, ge=1)  # evaluations past its best before a task stops

    steers = True
    reference_T: Tensor
    best_T: Tensor
    unimproved_T: Tensor
    loss_T: Tensor
    best_loss_T: Tensor

    def __init__(self, config: Any, *, names: list[str]):
        super().__init__(config, names=names)
        self.follow_T, self.stop_T = (chosen(names, key, getattr(config, key)) for key in ("follow", "stop"))
        self.validates = bool(self.follow_T.any() | self.stop_T.any())
        self.register_buffer("reference_T", self._reference())
        self.register_buffer("best_T", self.full(torch.nan))  # best gain
        self.register_buffer("unimproved_T", self.full(0.0))  # evaluations since then
        self.register_buffer("loss_T", self.full(torch.nan))  # running mean of the training loss
        self.register_buffer("best_loss_T", self.full(torch.nan))  # its value at the best gain

    def forward(self, step: Step) -> Tensor:
        known_T = torch.where(self.loss_T.isnan(), step.loss_T, self.loss_T)
        self.loss_T = torch.where(step.loss_T.isnan(), self.loss_T, torch.lerp(step.loss_T, known_T, MEMORY))
        return self.weight_T

    def observe(self, gain_T: Tensor) -> None:
        better_T = self.best_T.isnan() | (gain_T > self.best_T)
        self.best_T = torch.where(better_T & ~gain_T.isnan(), gain_T, self.best_T)
        self.best_loss_T = torch.where(better_T, self.loss_T, self.best_loss_T)
        self.unimproved_T = torch.where(better_T, 0.0, self.unimproved_T + ~gain_T.isnan())
        overfits_T = (self.unimproved_T >= self.config.patience) & (self.loss_T <= self.best_loss_T)
        self.share_T = 1.0 - (self.stop_T & overfits_T).double()
        self._follow(gain_T)

    def _follow(self, gain_T: Tensor) -> None:
        """Move the weights half of the way to where the regrets want them."""
        reference_T = self.best_T if self.config.reference == "best" else self.reference_T
        # Overfitting is no regret that more weight would mend.
        regret_T = torch.where(self.follow_T & (self.share_T > 0), (reference_T - gain_T).nan_to_num(), 0.0)
        ratio_T = (regret_T / self.config.temperature).exp()
        target_T = to_one(ratio_T.clamp(1 / self.config.bound, self.config.bound))
        self.weight_T = (self.weight_T + target_T) / 2

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
