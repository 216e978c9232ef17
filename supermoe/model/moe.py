"""The feed-forward of a block: one dense network, or experts behind a router."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from supermoe import ops
from supermoe.config import MoEConfig
from supermoe.typed_yaml import build


class FeedForward(nn.Module):
    """x -> activation(x W_in) W_out; for `swiglu` W_in is twice as wide."""

    def __init__(self, dim: int, hidden: int, activation: str):
        super().__init__()
        self.activation = activation
        self.w_in = nn.Linear(dim, in_width(hidden, activation), bias=False)
        self.w_out = nn.Linear(hidden, dim, bias=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        """x_ND -> y_ND."""
        return self.w_out(ops.activate(self.w_in(x_ND), self.activation))


class Experts(nn.Module):
    """The stacked weights of E feed-forwards; what expert parallelism shards."""

    def __init__(self, experts: int, dim: int, hidden: int, activation: str, low_memory: bool = False):
        super().__init__()
        self.activation, self.low_memory = activation, low_memory
        self.w_in_EDF = nn.Parameter(uniform_fan_in(experts, dim, in_width(hidden, activation)))
        self.w_out_EFD = nn.Parameter(uniform_fan_in(experts, hidden, dim))

    def forward(self, x_ND: Tensor, routing: ops.Routing) -> Tensor:
        """Weighted sum of the chosen experts' outputs -> y_ND."""
        where = routing.expert_NK, routing.weight_NK
        return ops.expert_ffn(x_ND, *where, self.w_in_EDF, self.w_out_EFD, self.activation, self.low_memory)


class MoE(nn.Module):
    """Router, experts and, where `shared_hidden` is set, an expert that every token passes."""

    def __init__(self, config: MoEConfig, dim: int, activation: str):
        super().__init__()
        hidden = config.hidden or 4 * dim // config.top_k
        self.capacity_factor = config.capacity_factor
        sizes = {"dim": dim, "experts": config.experts, "top_k": config.top_k}
        self.router = build("supermoe.model.routers", config.router, **sizes)
        self.experts = Experts(config.experts, dim, hidden, activation, config.low_memory)
        self.shared = FeedForward(dim, config.shared_hidden, activation) if config.shared_hidden else None

    def forward(self, x_ND: Tensor) -> tuple[Tensor, ops.Routing]:
        """x_ND -> y_ND and the routing as carried out (`counts_E` counts what was asked for, dropped or not)."""
        routing = self.router(x_ND)
        if self.capacity_factor is not None and self.training:
            # in evaluation nothing is dropped: a user's vector must not depend on who else is in the batch
            routing = limit_capacity(routing, self.capacity_factor)
        return self.mix(x_ND, routing), routing

    def mix(self, x_ND: Tensor, routing: ops.Routing) -> Tensor:
        """What the chosen experts, and the shared one, make of every token -> y_ND."""
        y_ND = self.experts(x_ND, routing)
        return y_ND if self.shared is None else y_ND + self.shared(x_ND)


def limit_capacity(routing: ops.Routing, factor: float) -> ops.Routing:
    """Drop (expert -1) what exceeds an expert's room of ceil(factor * N * K / E), in token order.

    The residual carries a dropped token on. Token order keeps the history causal: no event loses its expert to a later
    one.
    """
    choice_R = routing.expert_NK.flatten()
    room = math.ceil(factor * len(choice_R) / len(routing.counts_E))
    order_R = choice_R.argsort(stable=True)
    start_E = routing.counts_E.cumsum(0) - routing.counts_E
    rank_R = torch.empty_like(order_R)
    rank_R[order_R] = torch.arange(len(order_R), device=order_R.device) - start_E[choice_R[order_R]]
    dropped_NK = (rank_R >= room).view_as(routing.expert_NK)
    return replace(routing, expert_NK=routing.expert_NK.masked_fill(dropped_NK, -1))


def in_width(hidden: int, activation: str) -> int:
    """Columns of W_in."""
    return 2 * hidden if activation == "swiglu" else hidden


def uniform_fan_in(experts: int, rows: int, columns: int) -> Tensor:
    """Every expert's matrix as `nn.Linear` would draw it: uniform in +-1 / sqrt(rows)."""
    return (torch.rand(experts, rows, columns) * 2 - 1) * rows**-0.5
