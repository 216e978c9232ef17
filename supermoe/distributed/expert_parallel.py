"""Experts that live on several ranks: tokens travel to them and back, every other part of the layer stays as it is.

A token is sent once to each rank that holds any of its experts; that rank returns the weighted sum of their outputs, so
what travels per token does not grow with the number of experts it visits there. Every rank takes part in every
exchange, also one that has no tokens or gets none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from supermoe import ops
from supermoe.distributed.row_shard import RowShard, shard_parameter
from supermoe.model.moe import MoE
from supermoe.typed_yaml import UserError


class ExpertParallelMoE(MoE):
    """An MoE layer of which this rank holds the experts `shard.first` to `shard.last`; made by `shard_experts`."""

    shard: RowShard

    def mix(self, x_ND: Tensor, routing: ops.Routing) -> Tensor:
        """See `MoE.mix`; the shared expert works while tokens travel."""
        trip = plan_trip(routing.expert_NK, self.shard)
        dtype = (
            torch.get_autocast_dtype(x_ND.device.type) if torch.is_autocast_enabled(x_ND.device.type) else x_ND.dtype
        )
        rows, rows_RD = trip.send(x_ND.to(dtype).index_select(0, trip.token_R))
        # Ids and weights travel together: ids are small whole numbers, which fp32 holds exactly.
        local_RK = routing.expert_NK.index_select(0, trip.token_R) - self.shard.block * trip.rank_R[:, None]
        weight_RK = routing.weight_NK.index_select(0, trip.token_R)
        choices, choice_R2K = trip.send(torch.cat([local_RK.to(weight_RK.dtype), weight_RK], dim=1))
        shared_ND = None if self.shared is None else self.shared(x_ND)
        rows.wait()
        choices.wait()
        arrived = _arrived_routing(choice_R2K, self.shard)
        done, y_RD = trip.send_back(self.experts(rows_RD, arrived))
        done.wait()
        y_ND = torch.zeros_like(x_ND).index_add(0, trip.token_R, y_RD.to(x_ND.dtype))
        return y_ND if shared_ND is None else y_ND + shared_ND


def _arrived_routing(choice_R2K: Tensor, shard: RowShard) -> ops.Routing:
    """The routing of rows that arrived, among the experts here; -1 for those that live elsewhere, or were dropped."""
    expert_RK, weight_RK = choice_R2K.chunk(2, dim=1)
    expert_RK = expert_RK.long()
    here_RK = (expert_RK >= 0) & (expert_RK < shard.block)
    place_R = expert_RK.where(here_RK, shard.block).flatten()  # one beyond the last, unlike bincount without a wait
    counts_E = place_R.new_zeros(shard.block + 1).scatter_add_(0, place_R, torch.ones_like(place_R))[:-1]
    return ops.Routing(expert_RK.where(here_RK, -1), weight_RK, counts_E, weight_RK.new_zeros(len(weight_RK), 0))


@dataclass(frozen=True)
class Trip:
    """Which rows go from this rank to which, and how many come from each; the way back is the same."""

    group: dist.ProcessGroup
    sent: list[int]
    received: list[int]
    rank_R: Tensor  # where each row goes, rising
    token_R: Tensor  # the token it is

    def send(self, rows: Tensor) -> tuple[dist.Work, Tensor]:
        """Start to send rows -> what to wait for, and the rows that then have arrived here, by rank of origin."""
        return _exchange(rows, self.sent, self.received, self.group)

    def send_back(self, rows: Tensor) -> tuple[dist.Work, Tensor]:
        """The inverse of `send`."""
        return _exchange(rows, self.received, self.sent, self.group)


def plan_trip(expert_NK: Tensor, shard: RowShard) -> Trip:
    """One row for each rank that a token has an expert on. The host waits once, for the counts."""
    group, num_ranks = shard.mesh.get_group(), shard.mesh.size()
    home_NK = torch.where(expert_NK >= 0, expert_NK // shard.block, num_ranks)  # dropped: to nobody
    goes_NP = torch.zeros(len(expert_NK), num_ranks + 1, dtype=torch.bool, device=expert_NK.device)
    goes_PN = goes_NP.scatter_(1, home_NK, True)[:, :num_ranks].t()
    sent_P = goes_PN.sum(dim=1)
    received_P = torch.empty_like(sent_P)
    dist.all_to_all_single(received_P, sent_P, group=group)
    sent, received = torch.stack([sent_P, received_P]).tolist()
    rank_R, token_R = goes_PN.nonzero_static(size=sum(sent)).unbind(1)
    return Trip(group, sent, received, rank_R, token_R)


def shard_experts(model: nn.Module, mesh: DeviceMesh) -> None:
    """Keep of every MoE layer's experts only this rank's part, in place; names of parameters stay as they are.

    Each rank of `mesh` (of one dimension) keeps as many experts. Gradients of experts are sums over the tokens of the
    mesh's ranks: see `parallelize.py` for what remains to be added up.

    Raises:
        UserError: where the experts cannot be dealt out evenly.
    """
    for layer in [module for module in model.modules() if isinstance(module, MoE)]:
        num_experts = len(layer.experts.w_in_EDF)
        if num_experts % mesh.size():
            raise UserError(
                f"distributed.expert: {num_experts} experts (model.moe.experts) cannot be dealt out evenly to "
                f"{mesh.size()} ranks; choose a divisor of {num_experts}"
            )
        layer.__class__ = ExpertParallelMoE
        shard = RowShard(mesh, num_experts)
        layer.shard = shard  # type: ignore[assignment]  # no tensor, and no module
        for name, _ in list(layer.experts.named_parameters()):
            shard_parameter(layer.experts, name, shard)


def _exchange(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> tuple[dist.Work, Tensor]:
    started: list[dist.Work] = []
    arrived = _Exchange.apply(rows, sent, received, group, started)
    return started[0], arrived


class _Exchange(torch.autograd.Function):
    """all_to_all_single of rows, started and not waited for; gradients travel the other way, and are waited for."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup, started: list[dist.Work]
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        started.append(dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group, async_op=True))
        return arrived

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        back = grad.new_empty(sum(ctx.sent), *grad.shape[1:])
        dist.all_to_all_single(back, grad.contiguous(), ctx.sent, ctx.received, group=ctx.group)
        return back, None, None, None, None
