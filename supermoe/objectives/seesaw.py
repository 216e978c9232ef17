"""The seesaw-aware balancer: no task pays for another.

SUPERMOE (arXiv 2207.04648) does not publish its loss; this one is ours. A task that is behind a model of its own gains
weight, one that is ahead gives some: w_t ~ exp(r_t / temperature), with the regret r_t = reference_t - gain_t in shares
of the way from the prior to a perfect metric, within a factor `bound` of the weight of a task that is level, half of
the way at each evaluation.

The other indicators are not the balancer's: which examples a task asks (`objective.py`), the task's own question (the
read-out `indicator`), and the answers of a model of the task's own (`Task.teach`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from supermoe.objectives.balancer import Balancer, Step, to_one
from supermoe.typed_yaml import Config as BaseConfig
from supermoe.typed_yaml import UserError, nearest


class Seesaw(Balancer):
    """Weights that follow each task's regret against a model of its own."""

    class Config(BaseConfig):
        type: str = "seesaw"
        reference: Path  # JSON file {task: gain of a model of its own}, which supermoe.seesaw leaves
        temperature: float = Field(0.005, gt=0)  # so far behind, a task weighs e times as much
        bound: float = Field(10.0, ge=1)  # of that factor, and of its inverse

        @model_validator(mode="before")
        @classmethod
        def _check(cls, told: Any) -> Any:
            if isinstance(told, dict) and "reference" not in told:
                raise ValueError(
                    "seesaw needs `reference`, what models of each task alone reach: python -m supermoe.seesaw trains "
                    "them and leaves it as reference.json"
                )
            return told

    validates = True
    reference_T: Tensor

    def __init__(self, config: Any, *, names: list[str]):
        super().__init__(config, names=names)
        self.register_buffer("reference_T", self._reference())

    def forward(self, step: Step) -> Tensor:
        return self.weight_T

    def observe(self, gain_T: Tensor) -> None:
        regret_T = (self.reference_T - gain_T).nan_to_num()
        ratio_T = (regret_T / self.config.temperature).exp()
        target_T = to_one(ratio_T.clamp(1 / self.config.bound, self.config.bound))
        self.weight_T = (self.weight_T + target_T) / 2

    def _reference(self) -> Tensor:
        """Gains that the tasks should reach -> [T]."""
        path, key = self.config.reference, "loss.balancer.reference"
        try:
            gains = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{key}: cannot read {path} as JSON: {error}; python -m supermoe.seesaw leaves a file of this kind"
            ) from None
        if not isinstance(gains, dict) or not all(isinstance(gain, int | float) for gain in gains.values()):
            raise UserError(f'{key}: {path} must map every task to a number, such as {{"churn": 0.31}}')
        missing = [name for name in self.names if name not in gains]
        if missing:
            raise UserError(
                f"{key}: {path} is about other tasks: it has no '{missing[0]}', {nearest(missing[0], gains)}"
            )
        return torch.tensor([float(gains[name]) for name in self.names], dtype=torch.float64)
