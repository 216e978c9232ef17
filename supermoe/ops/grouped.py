"""Expert feed-forwards as two grouped matrix products over sorted rows: what a GPU runs without our kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from supermoe.ops.reference import activate

_ROW_BYTES = 16  # the kernel wants rows to be whole multiples of this


def expert_ffn(
    x_ND: Tensor,
    expert_NK: Tensor,
    weight_NK: Tensor,
    w_in_EDF: Tensor,
    w_out_EFD: Tensor,
    activation: str,
) -> Tensor:
    """See `supermoe.ops.expert_ffn`."""
    num_experts, k = len(w_in_EDF), expert_NK.shape[1]
    # -1 as the last id: dropped rows sort behind all experts and are cut off. Small integers sort several times faster.
    expert_R = expert_NK.flatten().where(expert_NK.flatten() >= 0, num_experts)
    order = expert_R.to(torch.int16).argsort(stable=True)
    ends_E = torch.bincount(expert_R, minlength=num_experts)[:num_experts].cumsum(0)
    order = order[: int(ends_E[-1])]
    hidden_RF = _grouped_mm(_Dispatch.apply(x_ND, order, k), w_in_EDF, ends_E)
    out_RD = _grouped_mm(activate(hidden_RF, activation), w_out_EFD, ends_E)
    return _Combine.apply(out_RD, weight_NK, order)


def _grouped_mm(rows_RD: Tensor, weight_EDF: Tensor, ends_E: Tensor) -> Tensor:
    if len(rows_RD) == 0:  # no product to make, yet every operand gets its (zero) gradient
        return rows_RD @ weight_EDF.sum(dim=0)
    if _grouped_mm_takes(rows_RD, weight_EDF):
        return F.grouped_mm(rows_RD, weight_EDF, offs=ends_E.to(torch.int32))
    rows = rows_RD.tensor_split(ends_E[:-1].tolist())
    return torch.cat([rows_RD @ weight_DF for rows_RD, weight_DF in zip(rows, weight_EDF.unbind(0), strict=True)])


def _grouped_mm_takes(rows_RD: Tensor, weight_EDF: Tensor) -> bool:
    """Whether grouped_mm takes these operands; a loop takes all."""
    dtypes = [torch.bfloat16] if rows_RD.is_cuda else [torch.float32, torch.bfloat16, torch.float16]
    return rows_RD.dtype in dtypes and not any(
        width * rows_RD.dtype.itemsize % _ROW_BYTES for width in weight_EDF.shape[1:]
    )


class _Dispatch(torch.autograd.Function):
    """Rows of x in expert order; `order` counts (token, choice) pairs."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.k, ctx.num_tokens = k, len(x_ND)
        return x_ND.index_select(0, order // k)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return _in_pairs(grad_RD, order, ctx.num_tokens, ctx.k).sum(dim=1), None, None


class _Combine(torch.autograd.Function):
    """Weighted sum over each token's choices, in the dtype of the rows."""

    @staticmethod
    def forward(ctx: Any, out_RD: Tensor, weight_NK: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(out_RD, weight_NK, order)
        out_NKD = _in_pairs(out_RD, order, *weight_NK.shape)
        return torch.einsum("nkd,nk->nd", out_NKD, weight_NK.to(out_RD.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, Tensor, None]:
        out_RD, weight_NK, order = ctx.saved_tensors
        grad_RD = grad_ND.index_select(0, order // weight_NK.shape[1])
        grad_weight_R = torch.linalg.vecdot(grad_RD, out_RD).to(weight_NK.dtype)
        grad_weight_NK = torch.zeros_like(weight_NK).view(-1).index_copy_(0, order, grad_weight_R).view_as(weight_NK)
        return grad_RD * weight_NK.flatten()[order, None].to(grad_RD.dtype), grad_weight_NK, None


def _in_pairs(rows_RD: Tensor, order: Tensor, num_tokens: int, k: int) -> Tensor:
    """Sorted rows back at their (token, choice), zeros where dropped: [N, K, D]."""
    place = torch.full((num_tokens * k,), len(rows_RD), device=order.device)
    place[order] = torch.arange(len(order), device=order.device)
    if len(order) < len(place):
        rows_RD = F.pad(rows_RD, (0, 0, 0, 1))
    return rows_RD.index_select(0, place).unflatten(0, (num_tokens, k))
