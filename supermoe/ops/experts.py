"""Expert feed-forwards with a backward of their own: on a CPU in groups of rows, elsewhere by grouped products.

The rows of x, the hidden rows before and after the activation and the experts' outputs are kept for the backward.
`low_memory` keeps none of the four and works in small chunks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from supermoe.ops import grouped, layout, reference
from supermoe.ops.groups import Blocks, Even, Pieces
from supermoe.ops.layout import Layout
from supermoe.ops.reference import activate

_CHUNK_BYTES = 16 << 20  # of hidden rows
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
        rows = _Rows(x_ND, where, w_in_EDF, w_out_EFD, activation, low_memory)
        out_PD = x_ND.new_empty(len(where.token_P), w_out_EFD.shape[2])
        for group in where.groups:
            rows.compute(group, out_PD[group.start : group.end])
        mix_NK = weight_NK.to(x_ND.dtype)
        if where.kept_NK is not None:
            mix_NK = mix_NK.where(where.kept_NK, 0)
        kept = () if low_memory else (out_PD, *rows.buffers)
        ctx.save_for_backward(x_ND, weight_NK, w_in_EDF, w_out_EFD, mix_NK, *kept)
        ctx.where, ctx.activation = where, activation
        return F.embedding_bag(where.place_NK, out_PD, mode="sum", per_sample_weights=mix_NK)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_NK, w_in_EDF, w_out_EFD, mix_NK, *kept = ctx.saved_tensors
        where: Layout = ctx.where
        # Dropped choices share a slot with a real one, and add nothing to its weight.
        mix_P = mix_NK.new_zeros(len(where.token_P)).index_add_(0, where.place_NK.flatten(), mix_NK.flatten())
        grad_mix_P = torch.empty_like(mix_P)
        grad_x_PD = x_ND.new_empty(len(where.token_P), x_ND.shape[1])
        grad_in_EDF, grad_out_EFD = torch.empty_like(w_in_EDF), torch.empty_like(w_out_EFD)
        rows = _Rows(x_ND, where, w_in_EDF, w_out_EFD, ctx.activation, not kept, kept[1:])
        largest = max(group.end - group.start for group in where.groups)
        scratch_PD, scratch_PF = x_ND.new_empty(largest, x_ND.shape[1]), x_ND.new_empty(largest, w_out_EFD.shape[1])
        for group in where.groups:
            here, size = slice(group.start, group.end), group.end - group.start
            out_PD = kept[0][here] if kept else rows.compute(group, torch.empty_like(scratch_PD[:size]))
            x_PD, hidden_PF, active_PF = rows.of(group)
            grad_PD = torch.index_select(grad_ND, 0, where.token_P[here], out=scratch_PD[:size])
            torch.linalg.vecdot(grad_PD, out_PD, out=grad_mix_P[here])
            grad_PD.mul_(mix_P[here, None])
            group.add_outer(active_PF, grad_PD, grad_out_EFD)
            grad_active_PF = scratch_PF[:size]
            group.product(grad_PD, w_out_EFD.transpose(1, 2), grad_active_PF)
            grad_PF = _activation_backward(grad_active_PF, hidden_PF, ctx.activation)
            group.add_outer(x_PD, grad_PF, grad_in_EDF)
            group.product(grad_PF, w_in_EDF.transpose(1, 2), grad_x_PD[here])
        for expert in (expert for expert, count in enumerate(where.counts) if count == 0):
            grad_in_EDF[expert], grad_out_EFD[expert] = 0, 0
        kept_NK = None if where.kept_NK is None else where.kept_NK.to(x_ND.dtype)
        grad_x_ND = F.embedding_bag(where.place_NK, grad_x_PD, mode="sum", per_sample_weights=kept_NK)
        grad_weight_NK = grad_mix_P[where.place_NK].to(weight_NK.dtype)
        if where.kept_NK is not None:
            grad_weight_NK = grad_weight_NK.where(where.kept_NK, 0)
        return grad_x_ND, grad_weight_NK, grad_in_EDF, grad_out_EFD, None, None, None


class _Rows:
    """Rows of x by slot and the hidden rows they give: of all groups, or with `low_memory` of one at a time."""

    def __init__(
        self,
        x_ND: Tensor,
        where: Layout,
        w_in_EDF: Tensor,
        w_out_EFD: Tensor,
        activation: str,
        low_memory: bool,
        buffers: tuple[Tensor, ...] = (),
    ):
        self._x_ND, self._token_P, self._w_in_EDF, self._w_out_EFD = x_ND, where.token_P, w_in_EDF, w_out_EFD
        self._activation, self._low_memory = activation, low_memory
        num_rows = max(group.end - group.start for group in where.groups) if low_memory else len(where.token_P)
        widths = x_ND.shape[1], w_in_EDF.shape[2], w_out_EFD.shape[1]
        self.buffers = buffers or tuple(x_ND.new_empty(num_rows, width) for width in widths)

    def of(self, group: Pieces | Even | Blocks) -> tuple[Tensor, ...]:
        """Rows of x, and hidden rows before and after the activation."""
        start, end = (0, group.end - group.start) if self._low_memory else (group.start, group.end)
        return tuple(buffer[start:end] for buffer in self.buffers)

    def compute(self, group: Pieces | Even | Blocks, out_PD: Tensor) -> Tensor:
        """Fill the rows of the group, and its outputs."""
        x_PD, hidden_PF, active_PF = self.of(group)
        torch.index_select(self._x_ND, 0, self._token_P[group.start : group.end], out=x_PD)
        group.product(x_PD, self._w_in_EDF, hidden_PF)
        _activate(hidden_PF, self._activation, active_PF)
        group.product(active_PF, self._w_out_EFD, out_PD)
        return out_PD


def _activate(hidden: Tensor, activation: str, out: Tensor) -> None:
    """`activate` into memory at hand."""
    if activation == "gelu":
        torch.ops.aten.gelu.out(hidden, out=out)
    elif activation == "silu":
        torch.ops.aten.silu.out(hidden, out=out)
    else:
        out.copy_(activate(hidden, activation))


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
