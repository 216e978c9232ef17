"""Balancers that weigh losses, as published: the rivals that need no gradients, and GradNorm, which needs norms.

Their papers set the weights of a step from its own losses; here they hold for the next step (see `balancer.py`).
Weights are scaled to sum to one, as the size of the whole gradient is the learning rate's and the clip's matter.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from supermoe.objectives.balancer import Balancer, Step, VectorAdam, to_one
from supermoe.typed_yaml import Config as BaseConfig

TINY = 1e-12  # below any loss: keeps logarithms and quotients finite
LEAST = 0.01  # GradNorm's weights stay above this share of an equal one, as Adam may step across zero


class Uncertainty(Balancer):
    """Homoscedastic uncertainty (arXiv 1705.07115): sum_k L_k / (2 e^s_k) + s_k / 2, with s_k learned by Adam."""

    class Config(BaseConfig):
        type: str = "uncertainty"
        lr: float = Field(0.025, gt=0)  # of s

    s_T: Tensor

    def __init__(self, config: Any, *, names: list[str]):
        super().__init__(config, names=names)
        self.register_buffer("s_T", self.full(0.0))
        self.adam = VectorAdam(len(names), config.lr)

    def forward(self, step: Step) -> Tensor:
        self.s_T = self.adam(self.s_T, (1 - step.loss_T * (-self.s_T).exp()) / 2)
        return (-self.s_T).softmax(0)


class DWA(Balancer):
    """Dynamic weight average (arXiv 1803.10704, eq. 7): w = softmax(r / temperature).

    r_k is the mean loss of the last period over that of the one before; 1 until both are known. The paper's period is
    an epoch, here `period` steps.
    """

    class Config(BaseConfig):
        type: str = "dwa"
        temperature: float = Field(2.0, gt=0)
        period: int = Field(50, ge=1)  # steps

    sum_T: Tensor
    asked_T: Tensor
    steps: Tensor
    last_T: Tensor
    before_T: Tensor

    def __init__(self, config: Any, *, names: list[str]):
        super().__init__(config, names=names)
        self.register_buffer("sum_T", self.full(0.0))
        self.register_buffer("asked_T", self.full(0.0))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("last_T", self.full(torch.nan))  # mean loss of the last whole period
        self.register_buffer("before_T", self.full(torch.nan))

    def forward(self, step: Step) -> Tensor:
        self.sum_T = self.sum_T + step.loss_T.nan_to_num()
        self.asked_T = self.asked_T + ~step.loss_T.isnan()
        self.steps = self.steps + 1
        if self.steps % self.config.period == 0:
            self.before_T, self.last_T = self.last_T, self.sum_T / self.asked_T
            self.sum_T, self.asked_T = self.full(0.0), self.full(0.0)
        ratio_T = (self.last_T / self.before_T.clamp(min=TINY)).nan_to_num(1.0)
        return (ratio_T / self.config.temperature).softmax(0)


class GradNorm(Balancer):
    """GradNorm (arXiv 1711.02257): weights learned so that gradients keep norms in proportion to training rates.

    With G_k = w_k norm(g_k) it descends on sum_k abs(G_k - mean(G) r_k^alpha), the target held constant, where r_k is
    L_k / L_k(0) over its mean. Norms are those at the user's vector, in place of the last shared layer's.
    """

    class Config(BaseConfig):
        type: str = "gradnorm"
        alpha: float = Field(1.5, ge=0)
        lr: float = Field(0.025, gt=0)  # of the weights

    every = 1

    first_T: Tensor

    def __init__(self, config: Any, *, names: list[str]):
        super().__init__(config, names=names)
        self.register_buffer("first_T", self.full(torch.nan))
        self.adam = VectorAdam(len(names), config.lr)

    def forward(self, step: Step) -> Tensor:
        assert step.gram_TT is not None
        self.first_T = torch.where(self.first_T.isnan(), step.loss_T, self.first_T)
        norm_T = step.gram_TT.diagonal().sqrt()
        asked_T = ~step.loss_T.isnan() & (norm_T > 0)
        if not bool(asked_T.any()):
            return self.weight_T
        size = len(self.names)
        weight_T = self.weight_T * size  # the paper's weights sum to the number of tasks
        rate_T = step.loss_T / self.first_T.clamp(min=TINY)
        rate_T = rate_T / rate_T[asked_T].mean()
        norms_T = weight_T * norm_T
        target_T = norms_T[asked_T].mean() * rate_T**self.config.alpha
        slope_T = torch.where(asked_T, norm_T * (norms_T - target_T).sign(), torch.nan)
        return to_one(self.adam(weight_T, slope_T).clamp(min=LEAST))


class FAMO(Balancer):
    """Fast adaptive multitask optimisation (arXiv 2306.03792, algorithm 1): every loss falls at the same rate.

    With z = softmax(xi), loss k weighs z_k / (c L_k), where c makes the sum one. After the update xi moves along the
    change of the log losses of the same batches: by Adam, as the authors' code does.
    """

    class Config(BaseConfig):
        type: str = "famo"
        lr: float = Field(0.025, gt=0)  # of xi
        decay: float = Field(0.01, ge=0)  # of xi

    looks_back = True

    xi_T: Tensor
    last_T: Tensor

    def __init__(self, config: Any, *, names: list[str]):
        super().__init__(config, names=names)
        self.register_buffer("xi_T", self.full(0.0))
        self.register_buffer("last_T", self.full(1.0))  # latest loss of each task
        self.adam = VectorAdam(len(names), config.lr)

    def forward(self, step: Step) -> Tensor:
        assert step.after_T is not None
        asked_T = ~step.loss_T.isnan()
        fall_T = step.loss_T.clamp(min=TINY).log() - step.after_T.clamp(min=TINY).log()
        z_T, fall_T = self.xi_T.softmax(0), torch.where(asked_T, fall_T, 0.0)
        slope_T = z_T * (fall_T - (z_T * fall_T).sum()) + self.config.decay * self.xi_T
        self.xi_T = self.adam(self.xi_T, torch.where(asked_T, slope_T, torch.nan))
        self.last_T = torch.where(asked_T, step.after_T, self.last_T)
        return to_one(self.xi_T.softmax(0) / self.last_T.clamp(min=TINY))


class STCH(Balancer):
    """Smooth Tchebycheff scalarisation (arXiv 2402.19078): mu log sum_k exp(log(L_k / nadir_k) / mu).

    The nadir is the mean loss over the first `warmup` steps, in which the sum of log losses is descended on instead.
    """

    class Config(BaseConfig):
        type: str = "stch"
        mu: float = Field(1.0, gt=0)
        warmup: int = Field(50, ge=1)  # steps

    sum_T: Tensor
    asked_T: Tensor
    steps: Tensor
    last_T: Tensor

    def __init__(self, config: Any, *, names: list[str]):
        super().__init__(config, names=names)
        self.register_buffer("sum_T", self.full(0.0))
        self.register_buffer("asked_T", self.full(0.0))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("last_T", self.full(1.0))  # latest loss of each task

    def forward(self, step: Step) -> Tensor:
        asked_T = ~step.loss_T.isnan()
        self.last_T = torch.where(asked_T, step.loss_T, self.last_T)
        last_T = self.last_T.clamp(min=TINY)
        if self.steps < self.config.warmup:
            self.steps = self.steps + 1
            self.sum_T, self.asked_T = self.sum_T + step.loss_T.nan_to_num(), self.asked_T + asked_T
            return to_one(1 / last_T)
        # A task that was never asked in the warm-up has the prior's loss for a nadir.
        nadir_T = torch.where(self.asked_T > 0, self.sum_T / self.asked_T, 1.0).clamp(min=TINY)
        return to_one(((last_T / nadir_T).log() / self.config.mu).softmax(0) / last_T)
