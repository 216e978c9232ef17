"""How the weights of the losses follow training. A balancer is asked after every step and answers for the next one.

Losses arrive divided by their prior's, summed over ranks and accumulation steps, so that every rank gets the same
weights. Weights sum to one. All state is in buffers, so that it is part of the checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import field_validator
from torch import Tensor, nn

from supermoe.typed_yaml import Config, UserError, nearest


class Balancer(nn.Module):
    """Base: `weight_T` holds the weights of the next step, `names` the losses in order."""

    weight_T: Tensor

    def __init__(self, config: Any, *, names: list[str]):
        super().__init__()
        self.config, self.names = config, names
        self.register_buffer("weight_T", torch.full((len(names),), 1 / len(names)))

    def forward(self, loss_T: Tensor, count_T: Tensor, grad_TD: Tensor | None = None) -> Tensor:
        """Weights of the next step from this step's mean losses (NaN where nothing was asked) and counts.

        `grad_TD`: gradients of the losses at the user representation, for balancers that need them.
        """
        raise NotImplementedError


class Equal(Balancer):
    """Every loss weighs the same."""

    class Config(Config):
        type: str = "equal"

    def forward(self, loss_T: Tensor, count_T: Tensor, grad_TD: Tensor | None = None) -> Tensor:
        return self.weight_T


class Fixed(Balancer):
    """Weights from the config; a loss that is not named weighs 1. Only their proportions matter."""

    class Config(Config):
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
        weight_T = torch.tensor([config.weights.get(name, 1.0) for name in names])
        self.weight_T = weight_T / weight_T.sum()

    def forward(self, loss_T: Tensor, count_T: Tensor, grad_TD: Tensor | None = None) -> Tensor:
        return self.weight_T


REGISTRY = {"equal": Equal, "fixed": Fixed}
