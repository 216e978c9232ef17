"""Routers: which experts each token goes to, and how their load is kept even.

Add one by a class with its own `Config`, `__init__(config, dim, experts, top_k)`, `forward(x_ND) -> Routing` and
`update(counts_E)`; name it in `REGISTRY`, or in the config by its import path.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from supermoe import ops, typed_yaml

INIT_STD = 0.02  # small: at first all experts look alike (ST-MoE, arXiv 2202.08906)


class RouterConfig(typed_yaml.Config):
    """Load balancing that every router here offers."""

    type: str
    balance: Literal["bias", "aux", "none"] = "bias"  # selection bias (arXiv 2408.15664), auxiliary loss (2101.03961)
    bias_rate: float = Field(1e-3, gt=0)  # step of the selection bias, per optimiser step
    aux_weight: float = Field(1e-2, ge=0)
    z_weight: float = Field(1e-3, ge=0)  # of mean(logsumexp(logits)^2), which keeps logits small (ST-MoE)


class Router(nn.Module):
    """Token-choice top-k over a linear map, in fp32 also under autocast; subclasses say how logits become scores."""

    Config: type[RouterConfig]
    score: str
    bias_E: Tensor

    def __init__(self, config: RouterConfig, dim: int, experts: int, top_k: int):
        super().__init__()
        self.config, self.top_k = config, top_k
        self.weight = nn.Parameter(torch.randn(experts, dim) * INIT_STD)
        self.register_buffer("bias_E", torch.zeros(experts))

    def forward(self, x_ND: Tensor) -> ops.Routing:
        """Experts of every token, with `aux_loss` (weighted, a scalar) set."""
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NE = F.linear(x_ND.to(self.weight.dtype), self.weight)
            bias_E = self.bias_E if self.config.balance == "bias" else None
            routing = ops.route(logits_NE, self.top_k, self.score, bias_E)
            return replace(routing, aux_loss=self.losses(logits_NE, routing))

    def losses(self, logits_NE: Tensor, routing: ops.Routing) -> Tensor:
        """z-loss, and with `balance: aux` E sum_e f_e P_e (f: share of choices, P: mean score) -> scalar."""
        num_tokens = max(len(logits_NE), 1)
        z = logits_NE.logsumexp(dim=1).square().sum() / num_tokens if routing.z is None else routing.z
        loss = self.config.z_weight * z
        if self.config.balance == "aux":
            mean_score_E = routing.mean_score_E
            if mean_score_E is None:
                mean_score_E = F.normalize(routing.probs_NE, p=1, dim=1).sum(0) / num_tokens
            share_E = routing.counts_E / (num_tokens * self.top_k)
            loss = loss + self.config.aux_weight * logits_NE.shape[1] * (share_E * mean_score_E).sum()
        return loss

    @torch.no_grad()
    def update(self, counts_E: Tensor) -> None:
        """Once per optimiser step, with the counts of all its tokens: b_e += rate * sign(mean load - load_e)."""
        if self.config.balance == "bias":
            load_E = counts_E.to(self.bias_E.dtype)
            self.bias_E += self.config.bias_rate * torch.sign(load_E.mean() - load_E)


class SoftmaxRouter(Router):
    """Scores compete: softmax over the experts, weights normalised over the chosen."""

    class Config(RouterConfig):
        """`{type: softmax}`."""

        type: str = "softmax"

    score = "softmax"


class SigmoidRouter(Router):
    """Scores are independent (DeepSeek-V3): sigmoid, weights normalised over the chosen."""

    class Config(RouterConfig):
        """`{type: sigmoid}`."""

        type: str = "sigmoid"

    score = "sigmoid"


REGISTRY = {"softmax": SoftmaxRouter, "sigmoid": SigmoidRouter}
