"""Router and experts on our Triton kernels, with the backward to match; on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from supermoe.kernels import fused_ffn, gating, grouped_mm, permute, tiles
from supermoe.kernels.permute import Plan
from supermoe.ops.reference import Routing

_WIDTH_STEP = 8  # elements: rows begin where the widest load may


def refusal(op: str, *operands: Any) -> str | None:
    """Why the kernels cannot take these operands; None if they can."""
    return _refuse_route(*operands) if op == "route" else _refuse_expert_ffn(*operands)


def _refuse_route(logits_NE: Tensor, k: int, score: str, *_: Any) -> str | None:
    num_experts = logits_NE.shape[1]
    if logits_NE.dtype != torch.float32:
        return f"its router takes logits in float32, not {_name(logits_NE.dtype)}"
    if num_experts > gating.MAX_EXPERTS:
        return f"its router takes up to {gating.MAX_EXPERTS} experts, not {num_experts}"
    if score not in gating.SCORES or not 1 <= k <= num_experts:
        return f"its router takes softmax or sigmoid and 1 to {num_experts} choices, not {score!r} and {k}"
    return None


def _refuse_expert_ffn(
    x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_in_EDF: Tensor, w_out_EFD: Tensor, *_: Any
) -> str | None:
    dtypes = {x_ND.dtype, w_in_EDF.dtype, w_out_EFD.dtype}
    if len(dtypes) > 1 or x_ND.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        names = " and ".join(sorted(map(_name, dtypes)))
        return f"its kernels take rows and weights both in bfloat16, float16 or float32, not in {names}"
    widths = sorted({*w_in_EDF.shape[1:], *w_out_EFD.shape[1:]})
    if any(width % _WIDTH_STEP for width in widths):
        return f"its kernels need widths that are multiples of {_WIDTH_STEP}, not {widths}"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- router -----------------------------------------------------------------------------------------------------------


def route(logits_NE: Tensor, k: int, score: str = "softmax", bias_E: Tensor | None = None) -> Routing:
    """See `supermoe.ops.route`."""
    expert_NK, weight_NK, counts_E, probs_NE, balance = _Route.apply(logits_NE.contiguous(), k, score, bias_E)
    return Routing(expert_NK, weight_NK, counts_E, probs_NE, mean_score_E=balance[:-1], z=balance[-1])


class _Route(torch.autograd.Function):
    """Keeps the logits; the scores are made again."""

    @staticmethod
    def forward(ctx: Any, logits_NE: Tensor, k: int, score: str, bias_E: Tensor | None) -> tuple[Tensor, ...]:
        expert_NK, weight_NK, counts_E, probs_NE, balance = gating.route_fwd(logits_NE, k, score, bias_E)
        ctx.save_for_backward(logits_NE, expert_NK, weight_NK)
        ctx.score = score
        ctx.mark_non_differentiable(expert_NK, counts_E)
        ctx.set_materialize_grads(False)
        return expert_NK, weight_NK, counts_E, probs_NE, balance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, _: None, dweight_NK: Tensor | None, __: None, dprobs_NE: Tensor | None, dbalance: Tensor | None
    ) -> tuple[Tensor, None, None, None]:
        grads = (None if grad is None else grad.contiguous() for grad in (dweight_NK, dprobs_NE, dbalance))
        logits_NE, expert_NK, weight_NK = ctx.saved_tensors
        return gating.route_bwd(logits_NE, expert_NK, weight_NK, ctx.score, *grads), None, None, None


# --- experts ----------------------------------------------------------------------------------------------------------


def expert_ffn(
    x_ND: Tensor,
    expert_NK: Tensor,
    weight_NK: Tensor,
    w_in_EDF: Tensor,
    w_out_EFD: Tensor,
    activation: str,
    low_memory: bool = False,
) -> Tensor:
    """See `supermoe.ops.expert_ffn`; `low_memory` makes the hidden rows again instead of keeping them.

    Up to a width of `tiles.FUSED_WIDTH`, in 16 bits, the hidden rows never leave the chip and are never kept.
    """
    itemsize = x_ND.dtype.itemsize
    rows = tiles.plan_rows(itemsize, expert_NK.numel() / len(w_in_EDF))
    plan = permute.plan(expert_NK, len(w_in_EDF), rows)
    x_ND, weight_NK, w_in_EDF, w_out_EFD = (t.contiguous() for t in (x_ND, weight_NK, w_in_EDF, w_out_EFD))
    operands = x_ND, weight_NK, w_in_EDF, w_out_EFD, plan, activation
    if tiles.is_fused(x_ND.shape[1], itemsize, rows):
        return _FusedFFN.apply(*operands)
    return _ExpertFFN.apply(*operands, low_memory or not torch.is_grad_enabled())


class _ExpertFFN(torch.autograd.Function):
    """Keeps x and the hidden rows before the activation; the activation is made again where it is needed."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_NK: Tensor,
        w_in_EDF: Tensor,
        w_out_EFD: Tensor,
        plan: Plan,
        activation: str,
        low_memory: bool,
    ) -> Tensor:
        keep = "a" if low_memory else "za"
        z_PF, a_PF = grouped_mm.up(x_ND, w_in_EDF, plan, activation, _tile("up", plan, x_ND), keep)
        ctx.save_for_backward(x_ND, weight_NK, w_in_EDF, w_out_EFD, z_PF)
        ctx.plan, ctx.activation = plan, activation
        return _at_tokens(grouped_mm.down(a_PF, w_out_EFD, plan, _tile("down", plan, x_ND), weight_NK), plan)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_NK, w_in_EDF, w_out_EFD, z_PF = ctx.saved_tensors
        plan, activation, grad_ND = ctx.plan, ctx.activation, grad_ND.contiguous()
        if z_PF is None:
            z_PF, _ = grouped_mm.up(x_ND, w_in_EDF, plan, activation, _tile("up", plan, x_ND), "z")
        tile = _tile("hidden_grad", plan, x_ND)
        dz_PF, a_PF, dweight_NK = grouped_mm.hidden_grad(grad_ND, w_out_EFD, z_PF, weight_NK, plan, activation, tile)
        back = w_in_EDF.transpose(1, 2)
        dx_ND = _at_tokens(grouped_mm.down(dz_PF, back, plan, _tile("down", plan, x_ND), None), plan)
        stacks = _weight_grads(x_ND, grad_ND, dz_PF, a_PF, plan)
        return dx_ND, dweight_NK.to(weight_NK.dtype), *stacks, None, None, None


class _FusedFFN(torch.autograd.Function):
    """Keeps x alone: hidden rows are made again on the chip."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_NK: Tensor, w_in_EDF: Tensor, w_out_EFD: Tensor, plan: Plan, activation: str
    ) -> Tensor:
        ctx.save_for_backward(x_ND, weight_NK, w_in_EDF, w_out_EFD)
        ctx.plan, ctx.activation = plan, activation
        tile = _tile("fused_fwd", plan, x_ND)
        return _at_tokens(fused_ffn.fused_fwd(x_ND, weight_NK, w_in_EDF, w_out_EFD, plan, activation, tile), plan)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_NK, w_in_EDF, w_out_EFD = ctx.saved_tensors
        plan, grad_ND = ctx.plan, grad_ND.contiguous()
        dx, dweight_NK, dz_PF, a_PF = fused_ffn.fused_bwd(
            grad_ND, x_ND, weight_NK, w_in_EDF, w_out_EFD, plan, ctx.activation, _tile("fused_bwd", plan, x_ND)
        )
        stacks = _weight_grads(x_ND, grad_ND, dz_PF, a_PF, plan)
        return _at_tokens(dx, plan), dweight_NK.to(weight_NK.dtype), *stacks, None, None


def _weight_grads(x_ND: Tensor, grad_ND: Tensor, dz_PF: Tensor, a_PF: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Gradients of both stacks."""
    tile = _tile("weight_grad", plan, x_ND)
    return (
        grouped_mm.weight_grad(x_ND, dz_PF, plan, tile, gather_left=True),
        grouped_mm.weight_grad(a_PF, grad_ND, plan, tile, gather_left=False),
    )


def _at_tokens(rows: Tensor, plan: Plan) -> Tensor:
    """Rows summed over each token's choices; with one choice they are stored at their tokens already."""
    return rows if plan.top_k == 1 else permute.combine(rows, plan)


def _tile(kernel: str, plan: Plan, operand: Tensor) -> tiles.Tile:
    return tiles.TILES[kernel, operand.dtype.itemsize, plan.rows][0]
