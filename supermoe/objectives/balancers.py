"""The balancers that can be named in YAML: how the weights of the tasks follow training; see `balancer.py`.

Add one by a class with its own `Config` and the methods of `Balancer`; name it in `REGISTRY`, or in the config by its
import path.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import field_validator
from torch import Tensor

from supermoe.objectives.balancer import Balancer, Step, to_one
from supermoe.objectives.jacobian_descent import Aligned, CAGrad, Nash, PCGrad, UPGrad
from supermoe.objectives.seesaw import Seesaw
from supermoe.objectives.task_weighting import DWA, FAMO, STCH, GradNorm, Uncertainty
from supermoe.typed_yaml import Config as BaseConfig
from supermoe.typed_yaml import UserError, nearest


class Equal(Balancer):
    """Every task weighs the same."""

    class Config(BaseConfig):
        type: str = "equal"

    def forward(self, step: Step) -> Tensor:
        return self.weight_T


class Fixed(Balancer):
    """Weights from the config; a task that is not named weighs 1. Only their proportions matter."""

    class Config(BaseConfig):
        type: str = "fixed"
        weights: dict[str, float]

        @field_validator("weights")
        @classmethod
        def _positive(cls, weights: dict[str, float]) -> dict[str, float]:
            wrong = [name for name, weight in weights.items() if weight <= 0]
            if wrong:
                raise ValueError(
                    f"the weight of '{wrong[0]}' must be above 0; to leave a task out, set tasks.{wrong[0]}=null"
                )
            return weights

    def __init__(self, config: Any, *, names: list[str]):
        super().__init__(config, names=names)
        for name in config.weights:
            if name not in names:
                raise UserError(f"loss.balancer.weights.{name}: there is no such task, {nearest(name, names)}")
        self.weight_T = to_one(torch.tensor([config.weights.get(name, 1.0) for name in names], dtype=torch.float64))

    def forward(self, step: Step) -> Tensor:
        return self.weight_T


REGISTRY = {
    "equal": Equal,
    "fixed": Fixed,
    "uncertainty": Uncertainty,
    "dwa": DWA,
    "gradnorm": GradNorm,
    "famo": FAMO,
    "stch": STCH,
    "pcgrad": PCGrad,
    "cagrad": CAGrad,
    "nash": Nash,
    "aligned": Aligned,
    "upgrad": UPGrad,
    "seesaw": Seesaw,
}
