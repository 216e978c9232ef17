"""Expert feed-forwards with a backward of their own: on a CPU in groups of rows, elsewhere by grouped products.

The hidden rows before and after the activation and the experts' outputs are kept for the backward; rows of x are
gathered again. `low_memory` keeps none of the three and works in small chunks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from supermoe.ops import grouped, layout, reference
from supermoe.ops.layout import Layout
from supermoe.ops.reference import activate

_CHUNK_BYTES = 16 << 20  # of hidden rows; blocks above 32 MB glibc gives back, to be cleared anew at every step
_SMALL_CHUNK_BYTES = 2 << 20  # what one core's cache holds
_MIN_CHUNK = 512  # rows; fewer make poor products with wide matrices


def expert_ffn(
    x_ND: Tensor,
    expert_NK: Tensor,
    weight_NK: Tensor,
    w_in_EDF: Tensor,
    w_out_EFD: Tensor,
    activation: str,
    low_memory: bool = False,
) -> Tensor:
    """See `supermoe.ops.expert_ffn`."""
    operands = x_ND, expert_NK, weight_NK, w_in_EDF, w_out_EFD, activation
    if x_ND.device.type != "cpu":
        return grouped.expert_ffn(*operands)
    if not (expert_NK >= 0).any():
        return reference.expert_ffn(*operands)
    num_experts, _, width = w_in_EDF.shape
    chunk_bytes = _SMALL_CHUNK_BYTES if low_memory else _CHUNK_BYTES
    chunk_rows = max(chunk_bytes // (width * x_ND.itemsize), _MIN_CHUNK)
    # 16-bit products are compiled for every size anew (oneDNN), and calls cost more than small products themselves.
    plan = layout.padded if x_ND.itemsize == 2 else layout.packed
    where = plan(expert_NK, num_experts, chunk_rows)
    return _ExpertFFN.apply(x_ND, weight_NK, w_in_EDF, w_out_EFD, where, activation, low_memory)


class _ExpertFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_NK: Tensor,
        w_in_EDF: Tensor,
        w_out_EFD: Tensor,
        where: Layout,
        activation: str,
        low_memory: bool,
    ) -> Tensor:
        out_PD = x_ND.new_empty(len(where.token_P), w_out_EFD.shape[2])
        hidden = []
        for group in where.groups:
            hidden_PF = group.product(x_ND.index_select(0, where.token_P[group.start : group.end]), w_in_EDF)
            active_PF = activate(hidden_PF, activation)
            out_PD[group.start : group.end] = group.product(active_PF, w_out_EFD)
            if not low_memory:
                hidden += [hidden_PF, active_PF]
        mix_NK = weight_NK.to(x_ND.dtype)
        if where.kept_NK is not None:
            mix_NK = mix_NK.where(where.kept_NK, 0)
        ctx.save_for_backward(x_ND, weight_NK, w_in_EDF, w_out_EFD, mix_NK, None if low_memory else out_PD, *hidden)
        ctx.where, ctx.activation = where, activation
        return F.embedding_bag(where.place_NK, out_PD, mode="sum", per_sample_weights=mix_NK)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_NK, w_in_EDF, w_out_EFD, mix_NK, out_PD, *hidden = ctx.saved_tensors
        where: Layout = ctx.where
        # Dropped choices share a slot with a real one, and add nothing to its weight.
        mix_P = mix_NK.new_zeros(len(where.token_P)).index_add_(0, where.place_NK.flatten(), mix_NK.flatten())
        grad_mix_P = torch.empty_like(mix_P)
        grad_x_PD = x_ND.new_empty(len(where.token_P), x_ND.shape[1])
        grad_in_EDF, grad_out_EFD = torch.empty_like(w_in_EDF), torch.empty_like(w_out_EFD)
        for number, group in enumerate(where.groups):
            here = slice(group.start, group.end)
            x_PD = x_ND.index_select(0, where.token_P[here])
            grad_PD = grad_ND.index_select(0, where.token_P[here])
            if out_PD is None:
                hidden_PF = group.product(x_PD, w_in_EDF)
                active_PF = activate(hidden_PF, ctx.activation)
                mine_PD = group.product(active_PF, w_out_EFD)
            else:
                (hidden_PF, active_PF), mine_PD = hidden[2 * number :][:2], out_PD[here]
            torch.linalg.vecdot(grad_PD, mine_PD, out=grad_mix_P[here])
            grad_PD.mul_(mix_P[here, None])
            group.add_outer(active_PF, grad_PD, grad_out_EFD)
            grad_active_PF = group.product(grad_PD, w_out_EFD.transpose(1, 2))
            grad_PF = _activation_backward(grad_active_PF, hidden_PF, ctx.activation)
            group.add_outer(x_PD, grad_PF, grad_in_EDF)
            grad_x_PD[here] = group.product(grad_PF, w_in_EDF.transpose(1, 2))
        for expert in (expert for expert, count in enumerate(where.counts) if count == 0):
            grad_in_EDF[expert], grad_out_EFD[expert] = 0, 0
        kept_NK = None if where.kept_NK is None else where.kept_NK.to(x_ND.dtype)
        grad_x_ND = F.embedding_bag(where.place_NK, grad_x_PD, mode="sum", per_sample_weights=kept_NK)
        grad_weight_NK = grad_mix_P[where.place_NK].to(weight_NK.dtype)
        if where.kept_NK is not None:
            grad_weight_NK = grad_weight_NK.where(where.kept_NK, 0)
        return grad_x_ND, grad_weight_NK, grad_in_EDF, grad_out_EFD, None, None, None


def _activation_backward(grad: Tensor, hidden: Tensor, activation: str) -> Tensor:
    """Gradient of `activate` for its input, in the memory of `grad` where it has the size."""
    if activation == "gelu":
        return torch.ops.aten.gelu_backward.grad_input(grad, hidden, grad_input=grad)
    if activation == "silu":
        return torch.ops.aten.silu_backward.grad_input(grad, hidden, grad_input=grad)
    if activation == "relu2":
        return 2 * F.relu(hidden) * grad
    gate, value = hidden.chunk(2, dim=-1)
    return torch.cat([torch.ops.aten.silu_backward(grad * value, gate), grad * F.silu(gate)], dim=-1)
