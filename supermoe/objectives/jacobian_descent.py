"""Balancers that combine the tasks' gradients at the user's vector, by the aggregators of `torchjd` (extra `torchjd`).

All of them choose a combination sum_k w_k g_k by the inner products of the gradients alone. So the T x T matrix of
these is all that is measured and reduced over ranks; the combination is sent back once, as each task's share of the
gradient below what its head reads. Heads learn with equal weights. Shares average 1, as the learning rate and the clip
set the size. A task without a gradient there, not asked in the batch or reading events, keeps the share 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from supermoe.objectives.balancer import Balancer, Step
from supermoe.typed_yaml import Config as BaseConfig
from supermoe.typed_yaml import UserError

Solver = Callable[[Tensor], Tensor]  # inner products of k gradients -> their weights


class JacobianDescent(Balancer):
    """Base of the balancers below: each names its aggregator in `solver`, for k tasks."""

    class Config(BaseConfig):
        """What all of them are told."""

        type: str
        every: int = Field(1, ge=1)  # steps between two choices of the weights

    steers = True

    def __init__(self, config: Any, *, names: list[str]):
        super().__init__(config, names=names)
        self.every = config.every
        self._solvers: dict[int, Solver] = {}
        self._solver_of(len(names))  # what is missing is missed at the start

    def solver(self, aggregation: Any, size: int) -> Solver:
        """The aggregator's weights, from the module `torchjd.aggregation`."""
        raise NotImplementedError

    def forward(self, step: Step) -> Tensor:
        return self.weight_T

    def steer(self, gram_TT: Tensor) -> Tensor:
        index = gram_TT.diagonal().nonzero()[:, 0]
        self.share_T = self.full(1.0)
        if len(index) > 1:
            # On one scale whatever the losses', as the solvers' tolerances are absolute.
            gram_KK = gram_TT[index][:, index] * (len(index) / gram_TT.diagonal().sum())
            weight_K = self._solver_of(len(index))(gram_KK)
            # All zero where no direction helps every task: then nothing is sent back.
            self.share_T[index] = weight_K * (len(index) / weight_K.abs().sum().clamp(min=1e-12))
        return self.share_T

    def _solver_of(self, size: int) -> Solver:
        if size not in self._solvers:
            try:
                from torchjd import aggregation

                self._solvers[size] = self.solver(aggregation, size)
            except ImportError as error:
                raise UserError(
                    f"loss.balancer={self.config.type} needs the extra: pip install 'supermoe[torchjd]' ({error})"
                ) from None
        return self._solvers[size]


class PCGrad(JacobianDescent):
    """Projecting conflicting gradients (arXiv 2001.06782, algorithm 1), in an order drawn anew every time."""

    class Config(JacobianDescent.Config):
        type: str = "pcgrad"

    drawn: Tensor

    def __init__(self, config: Any, *, names: list[str]):
        super().__init__(config, names=names)
        self.register_buffer("drawn", torch.tensor(0))

    def solver(self, aggregation: Any, size: int) -> Solver:
        return aggregation.PCGradWeighting()

    def steer(self, gram_TT: Tensor) -> Tensor:
        self.drawn = self.drawn + 1
        with torch.random.fork_rng(devices=[]):  # the same order on every rank, and after a resume
            torch.default_generator.manual_seed(int(self.drawn))
            return super().steer(gram_TT)


class CAGrad(JacobianDescent):
    """Conflict-averse gradient descent (arXiv 2110.14048, algorithm 1)."""

    class Config(JacobianDescent.Config):
        type: str = "cagrad"
        c: float = Field(0.4, ge=0)  # radius of the ball around the mean gradient, over that gradient's norm

    def solver(self, aggregation: Any, size: int) -> Solver:
        return aggregation.CAGradWeighting(c=self.config.c)


class Nash(JacobianDescent):
    """Nash-MTL (arXiv 2202.01017, algorithm 1): weights with G w = 1 / w, from equal ones every time."""

    class Config(JacobianDescent.Config):
        type: str = "nash"
        iterations: int = Field(20, ge=1)

    def solver(self, aggregation: Any, size: int) -> Solver:
        options = {"max_norm": 0.0, "update_weights_every": 1, "optim_niter": self.config.iterations}
        weighting = aggregation.NashMTL(n_tasks=size, **options).weighting

        def solve(gram_KK: Tensor) -> Tensor:
            weighting.reset()
            value_K, vector_KK = torch.linalg.eigh(gram_KK)
            with warnings.catch_warnings():  # about one iteration, from whose answer the next one goes on
                warnings.filterwarnings("ignore", message="You are solving a parameterized problem that is not DPP")
                warnings.filterwarnings("ignore", message="Solution may be inaccurate")
                return weighting(vector_KK * value_K.clamp(min=0).sqrt())  # rows with the same inner products

        return solve


class Aligned(JacobianDescent):
    """Aligned-MTL (arXiv 2305.19000, algorithm 1): gradients of equal singular values, the smallest one's."""

    class Config(JacobianDescent.Config):
        type: str = "aligned"

    def solver(self, aggregation: Any, size: int) -> Solver:
        return aggregation.AlignedMTLWeighting()


class UPGrad(JacobianDescent):
    """UPGrad (arXiv 2406.16232, section 3): mean of the gradients, each projected where it harms no task."""

    class Config(JacobianDescent.Config):
        type: str = "upgrad"

    def solver(self, aggregation: Any, size: int) -> Solver:
        return aggregation.UPGradWeighting()
