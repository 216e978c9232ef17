"""A whole feed-forward of a narrow model in one kernel: a tile of tokens stays on chip while the experts' weights pass.

Hidden rows never reach memory on the way forward; on the way back they are made again, chunk by chunk, together with
their gradient. Only what the gradients of the weights are made of is written: dz and the weighted a.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from supermoe.kernels.activations import CODES, SWIGLU, activate, slope
from supermoe.kernels.blocks import fits
from supermoe.kernels.permute import Plan
from supermoe.kernels.tiles import Tile, precision

_SWIGLU = tl.constexpr(SWIGLU)


def fused_fwd(
    x_ND: Tensor, weight_NK: Tensor, w_in_EDF: Tensor, w_out_EFD: Tensor, plan: Plan, activation: str, tile: Tile
) -> Tensor:
    """Weighted outputs -> at the tokens [N, D] if there is one expert each, else [P, D]; `tile.columns` of z a step."""
    out = _row_buffer(x_ND, plan)
    _fused_fwd_kernel[(plan.row_blocks(tile.rows),)](
        x_ND, weight_NK, w_in_EDF, w_out_EFD, out, plan.pair_P, plan.expert_T, plan.num_experts,
        **_shapes(x_ND, w_out_EFD, plan, activation, tile),
    )  # fmt: skip
    return out


def fused_bwd(
    grad_ND: Tensor,
    x_ND: Tensor,
    weight_NK: Tensor,
    w_in_EDF: Tensor,
    w_out_EFD: Tensor,
    plan: Plan,
    activation: str,
    tile: Tile,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of tokens and weights of combination, and the hidden rows that the matrices' gradients are made of.

    -> dx (laid out as the output of `fused_fwd`), dweight_NK, dz_PF, a_PF (weighted).
    """
    num_places = len(plan.pair_P)
    dx, dweight_NK = _row_buffer(x_ND, plan), torch.empty_like(weight_NK, dtype=torch.float32)
    dz_PF, a_PF = x_ND.new_empty(num_places, w_in_EDF.shape[2]), x_ND.new_empty(num_places, w_out_EFD.shape[1])
    _fused_bwd_kernel[(plan.row_blocks(tile.rows),)](
        grad_ND, x_ND, weight_NK, w_in_EDF, w_out_EFD, dx, dweight_NK, dz_PF, a_PF,
        plan.pair_P, plan.expert_T, plan.num_experts, **_shapes(x_ND, w_out_EFD, plan, activation, tile),
    )  # fmt: skip
    return dx, dweight_NK, dz_PF, a_PF


def _row_buffer(x_ND: Tensor, plan: Plan) -> Tensor:
    return x_ND.new_empty(plan.num_tokens if plan.top_k == 1 else len(plan.pair_P), x_ND.shape[1])


def _shapes(x_ND: Tensor, w_out_EFD: Tensor, plan: Plan, activation: str, tile: Tile) -> dict[str, object]:
    _, hidden, dim = w_out_EFD.shape
    step = tile.columns // 2 if activation == "swiglu" else tile.columns
    return {
        "D": dim, "F": hidden, "K": plan.top_k, "ACTIVATION": CODES[activation], "DIRECT": plan.top_k == 1,
        "PLAN_ROWS": plan.rows, "ROWS": tile.rows, "STEP": step, "WIDTH": max(triton.next_power_of_2(dim), 16),
        "PRECISION": precision(x_ND), "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


@triton.jit
def _fused_fwd_kernel(
    x_ND, weight_R, w_in_EDF, w_out_EFD, out, pair_P, expert_T, num_experts,
    D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, ACTIVATION: tl.constexpr, DIRECT: tl.constexpr,
    PLAN_ROWS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    GATED: tl.constexpr = ACTIVATION == _SWIGLU
    STRIDE: tl.constexpr = 2 * F if GATED else F
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.load(expert_T + tl.program_id(0) * ROWS // PLAN_ROWS)
    if expert > num_experts or (expert == num_experts and not DIRECT):
        return
    pair = tl.load(pair_P + place)
    dim = tl.arange(0, WIDTH)
    inside = (pair >= 0)[:, None] & fits(dim, D)[None, :]
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    if expert < num_experts:  # dropped tokens keep the zeros
        x = tl.load(x_ND + (pair // K).to(tl.int64)[:, None] * D + dim[None, :], mask=inside, other=0.0)
        w_in = w_in_EDF + expert.to(tl.int64) * D * STRIDE
        w_out = w_out_EFD + expert.to(tl.int64) * F * D
        for start in range(0, F, STEP):
            hidden = start + tl.arange(0, STEP)
            z = tl.dot(x, _columns(w_in, dim, hidden, D, F, STRIDE), input_precision=PRECISION)
            a = activate(z, ACTIVATION)
            if GATED:
                a *= tl.dot(x, _columns(w_in + F, dim, hidden, D, F, STRIDE), input_precision=PRECISION)
            acc = tl.dot(a.to(x.dtype), _columns(w_out, hidden, dim, F, D, D), acc, input_precision=PRECISION)
        acc *= tl.load(weight_R + pair, mask=pair >= 0, other=0.0).to(tl.float32)[:, None]
    target = (pair if DIRECT else place).to(tl.int64) * D
    tl.store(out + target[:, None] + dim[None, :], acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _columns(w, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr):
    """A block of a row-major matrix, zero outside it."""
    mask = fits(row, ROWS)[:, None] & fits(column, COLUMNS)[None, :]
    return tl.load(w + row[:, None] * STRIDE + column[None, :], mask=mask, other=0.0)


@triton.jit
def _fused_bwd_kernel(
    grad_ND, x_ND, weight_R, w_in_EDF, w_out_EFD, dx, dweight_R, dz_PF, a_PF, pair_P, expert_T, num_experts,
    D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, ACTIVATION: tl.constexpr, DIRECT: tl.constexpr,
    PLAN_ROWS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    GATED: tl.constexpr = ACTIVATION == _SWIGLU
    STRIDE: tl.constexpr = 2 * F if GATED else F
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.load(expert_T + tl.program_id(0) * ROWS // PLAN_ROWS)
    if expert > num_experts:
        return
    pair = tl.load(pair_P + place)
    dim = tl.arange(0, WIDTH)
    inside = (pair >= 0)[:, None] & fits(dim, D)[None, :]
    dweight = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    if expert < num_experts:
        token = (pair // K).to(tl.int64)[:, None] * D + dim[None, :]
        x = tl.load(x_ND + token, mask=inside, other=0.0)
        grad = tl.load(grad_ND + token, mask=inside, other=0.0)
        weight = tl.load(weight_R + pair, mask=pair >= 0, other=0.0).to(tl.float32)[:, None]
        w_in = w_in_EDF + expert.to(tl.int64) * D * STRIDE
        w_out = w_out_EFD + expert.to(tl.int64) * F * D
        dz_rows, a_rows = place.to(tl.int64)[:, None] * STRIDE, place.to(tl.int64)[:, None] * F
        for start in range(0, F, STEP):
            hidden = start + tl.arange(0, STEP)
            column, near = hidden[None, :], fits(hidden, F)[None, :]
            w_gate = _columns(w_in, dim, hidden, D, F, STRIDE)
            z = tl.dot(x, w_gate, input_precision=PRECISION)
            w_back = tl.trans(_columns(w_out, hidden, dim, F, D, D))
            da = tl.dot(grad, w_back, input_precision=PRECISION)
            a = activate(z, ACTIVATION)
            dz = da * slope(z, ACTIVATION) * weight
            if GATED:
                w_value = _columns(w_in + F, dim, hidden, D, F, STRIDE)
                value = tl.dot(x, w_value, input_precision=PRECISION)
                dvalue = (da * a * weight).to(x.dtype)
                tl.store(dz_PF + dz_rows + F + column, dvalue, mask=near)
                acc = tl.dot(dvalue, tl.trans(w_value), acc, input_precision=PRECISION)
                a *= value
                dz *= value
            dweight += tl.sum(da * a, axis=1)
            tl.store(a_PF + a_rows + column, (a * weight).to(x.dtype), mask=near)
            tl.store(dz_PF + dz_rows + column, dz.to(x.dtype), mask=near)
            acc = tl.dot(dz.to(x.dtype), tl.trans(w_gate), acc, input_precision=PRECISION)
    tl.store(dweight_R + pair, dweight, mask=pair >= 0)
    if expert < num_experts or DIRECT:
        target = (pair if DIRECT else place).to(tl.int64) * D
        tl.store(dx + target[:, None] + dim[None, :], acc.to(dx.dtype.element_ty), mask=inside)
