"""What a balancer is asked and answers: how much each task weighs, and how much of it reaches what the tasks share.

A balancer weighs the T tasks of a run. It is asked after every step and answers for the next one; what it is told is
summed over micro-batches and ranks, so that accumulation, mixed precision and ranks make no difference and every rank
gets the same answer. All state is in buffers, so that it is part of the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Step:
    """What one optimiser step showed; all float64.

    `loss_T` and `after_T` are means over all that was asked, divided by the prior's loss; NaN where nothing was asked.
    """

    loss_T: Tensor
    count_T: Tensor  # how often each task was asked
    gram_TT: Tensor | None = None  # see `Balancer.every`; a task without a gradient there has a row of zeros
    after_T: Tensor | None = None  # see `Balancer.looks_back`


class Balancer(nn.Module):
    """Base: `weight_T` multiplies the losses of the next step and sums to one.

    `share_T`, of balancers that `steer`, multiplies what of a task's gradient passes below what its head reads: the
    head learns as before, the read-out and the encoder learn with weight_T * share_T.
    """

    steers = False
    every: int | None = None  # steps between measurements of the tasks' gradients at the user's vector; None: never
    looks_back = False  # whether it wants the losses of a step's batches after the update too: one more forward pass
    validates = False  # whether it needs `observe`

    weight_T: Tensor
    share_T: Tensor

    def __init__(self, config: Any, *, names: list[str]):
        super().__init__()
        self.config, self.names = config, names
        self.register_buffer("weight_T", self.full(1 / len(names)))
        self.register_buffer("share_T", self.full(1.0))

    def full(self, value: float) -> Tensor:
        """The same number for every task -> float64 [T]."""
        return torch.full((len(self.names),), value, dtype=torch.float64)

    def forward(self, step: Step) -> Tensor:
        """Weights of the next step -> [T], positive or zero, with sum one."""
        raise NotImplementedError

    def steer(self, gram_TT: Tensor) -> Tensor:
        """Shares for the micro-batch whose gradients have these inner products (of all ranks; float64) -> [T]."""
        return self.share_T

    def observe(self, gain_T: Tensor) -> None:
        """Hear of an evaluation on the validation split: gains over the prior, NaN where not defined; float64."""


def to_one(weight_T: Tensor) -> Tensor:
    """The same proportions with sum one."""
    return weight_T / weight_T.sum()


class VectorAdam(nn.Module):
    """Adam (arXiv 1412.6980, algorithm 1) on T numbers with its state in buffers.

    Where the gradient is NaN, neither number nor state moves.
    """

    mean_T: Tensor
    square_T: Tensor
    steps_T: Tensor

    def __init__(self, size: int, lr: float, betas: tuple[float, float] = (0.9, 0.999)):
        super().__init__()
        self.lr, self.betas = lr, betas
        for name in ("mean_T", "square_T", "steps_T"):
            self.register_buffer(name, torch.zeros(size, dtype=torch.float64))

    def forward(self, value_T: Tensor, grad_T: Tensor) -> Tensor:
        """Numbers and their gradient -> the numbers after one step."""
        moves_T, (beta1, beta2) = ~grad_T.isnan(), self.betas
        self.steps_T = self.steps_T + moves_T
        self.mean_T = torch.where(moves_T, torch.lerp(grad_T, self.mean_T, beta1), self.mean_T)
        self.square_T = torch.where(moves_T, torch.lerp(grad_T.square(), self.square_T, beta2), self.square_T)
        mean_T = self.mean_T / (1 - beta1**self.steps_T)
        root_T = (self.square_T / (1 - beta2**self.steps_T)).sqrt()
        return torch.where(moves_T, value_T - self.lr * mean_T / (root_T + 1e-8), value_T)
