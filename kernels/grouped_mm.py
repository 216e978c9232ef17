"""The matrix products of the experts over a plan's rows, each with what comes before and after it fused in.

Forward: `up` gathers tokens in its loads and activates in its stores; `down` weights its rows and, with one expert per
token, stores them at the token. Backward: `hidden_grad` gathers the outputs' gradient, makes the activation again and
in one epilogue the gradients of the hidden rows and of the weights of combination; `down` on transposed matrices makes
the rows' gradient; `weight_grad` sums over an expert's rows in fp32. Sums have a fixed order: equal runs, equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from supermoe.kernels.activations import CODES, SWIGLU, activate, slope
from supermoe.kernels.blocks import fits, halves
from supermoe.kernels.permute import Plan
from supermoe.kernels.tiles import NUM_SMS, Tile, precision

_SWIGLU = tl.constexpr(SWIGLU)


def up(
    x_ND: Tensor, w_in_EDF: Tensor, plan: Plan, activation: str, tile: Tile, keep: str
) -> tuple[Tensor | None, Tensor | None]:
    """Hidden rows before and after the activation, each if `keep` has its letter ("z", "a") -> z_PF, a_PF.

    For swiglu z has 2F columns, the gate's first. Padding rows are zero; unused tiles are not written.
    """
    _, dim, width = w_in_EDF.shape
    hidden = width // 2 if activation == "swiglu" else width
    num_places = len(plan.pair_P)
    z_PF = x_ND.new_empty(num_places, width) if "z" in keep else None
    a_PF = x_ND.new_empty(num_places, hidden) if "a" in keep else None
    columns = tile.columns // 2 if activation == "swiglu" else tile.columns  # of the activated rows
    _up_kernel[(plan.row_blocks(tile.rows) * triton.cdiv(hidden, columns),)](
        x_ND, w_in_EDF, z_PF, a_PF, plan.pair_P, plan.expert_T, plan.num_experts,
        D=dim, F=hidden, K=plan.top_k, ACTIVATION=CODES[activation], KEEP_Z="z" in keep, KEEP_A="a" in keep,
        **_blocks(plan, tile, x_ND),
    )  # fmt: skip
    return z_PF, a_PF


def down(rows_PF: Tensor, w_EFD: Tensor, plan: Plan, tile: Tile, weight_NK: Tensor | None) -> Tensor:
    """Rows times their expert's matrix, times their weight (None: 1); `w_EFD` may be a transposed view.

    -> at the tokens [N, D] if each has one expert, else at the places [P, D].
    """
    dim = w_EFD.shape[2]
    direct = plan.top_k == 1
    out = rows_PF.new_empty(plan.num_tokens if direct else len(rows_PF), dim)
    _down_kernel[(plan.row_blocks(tile.rows) * triton.cdiv(dim, tile.columns),)](
        rows_PF, w_EFD, out, weight_NK, plan.pair_P, plan.expert_T, plan.num_experts,
        F=rows_PF.shape[1], D=dim, STRIDE_F=w_EFD.stride(1), STRIDE_D=w_EFD.stride(2),
        DIRECT=direct, WEIGHTED=weight_NK is not None, **_blocks(plan, tile, rows_PF),
    )  # fmt: skip
    return out


def hidden_grad(
    grad_ND: Tensor, w_out_EFD: Tensor, z_PF: Tensor, weight_NK: Tensor, plan: Plan, activation: str, tile: Tile
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of z, weighted activated rows for `weight_grad`, gradient of the weights -> dz_PF, a_PF, dweight_NK."""
    _, hidden, dim = w_out_EFD.shape
    num_columns = triton.cdiv(hidden, tile.columns)
    dz_PF, a_PF = torch.empty_like(z_PF), z_PF.new_empty(len(z_PF), hidden)
    dweight_CNK = weight_NK.new_empty(num_columns, *weight_NK.shape, dtype=torch.float32)
    _hidden_grad_kernel[(plan.row_blocks(tile.rows) * num_columns,)](
        grad_ND, w_out_EFD, z_PF, weight_NK, dz_PF, a_PF, dweight_CNK,
        plan.pair_P, plan.expert_T, plan.num_experts, weight_NK.numel(),
        D=dim, F=hidden, K=plan.top_k, ACTIVATION=CODES[activation], **_blocks(plan, tile, z_PF),
    )  # fmt: skip
    return dz_PF, a_PF, dweight_CNK.sum(0)


def weight_grad(left: Tensor, right: Tensor, plan: Plan, tile: Tile, gather_left: bool) -> Tensor:
    """Per expert the sum over its rows of left^T right -> [E, left's width, right's width].

    The gathered side is [N, .], read at the rows' tokens; the other is [P, .], zero in padding rows.
    """
    shape = plan.num_experts, left.shape[1], right.shape[1]
    num_products = plan.num_experts * triton.cdiv(shape[1], tile.rows) * triton.cdiv(shape[2], tile.columns)
    splits = min(triton.cdiv(NUM_SMS, num_products), 16)  # few large experts: their rows are shared out
    out = left.new_empty(splits, *shape, dtype=left.dtype if splits == 1 else torch.float32)
    _weight_grad_kernel[(num_products, splits)](
        left, right, out, plan.pair_P, plan.first_tile_E, plan.num_experts,
        M=shape[1], N=shape[2], K=plan.top_k, SPLITS=splits, GATHER_LEFT=gather_left,
        **_blocks(plan, tile, left),
    )  # fmt: skip
    return out[0] if splits == 1 else out.sum(0).to(left.dtype)


def _blocks(plan: Plan, tile: Tile, operand: Tensor) -> dict[str, object]:
    """What every launch is told about blocks and precision."""
    return {
        "PLAN_ROWS": plan.rows, "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth,
        "PRECISION": precision(operand), "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


@triton.jit
def _up_kernel(
    x_ND, w_EDF, z_PF, a_PF, pair_P, expert_T, num_experts,
    D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, ACTIVATION: tl.constexpr,
    KEEP_Z: tl.constexpr, KEEP_A: tl.constexpr,
    PLAN_ROWS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    GATED: tl.constexpr = ACTIVATION == _SWIGLU
    HALF: tl.constexpr = COLUMNS // 2
    WIDTH: tl.constexpr = 2 * F if GATED else F
    STEP: tl.constexpr = HALF if GATED else COLUMNS  # columns of the activated rows
    num_columns: tl.constexpr = (F + STEP - 1) // STEP
    place = tl.program_id(0) // num_columns * ROWS + tl.arange(0, ROWS)
    expert = tl.load(expert_T + tl.program_id(0) // num_columns * ROWS // PLAN_ROWS)
    if expert >= num_experts:
        return
    pair = tl.load(pair_P + place)
    first = tl.program_id(0) % num_columns * STEP
    # the halves of the tile: neighbouring columns, or for swiglu the gate's and the value's
    column = tl.arange(0, COLUMNS)
    inner = first + (column % HALF if GATED else column)
    outer = inner + (column // HALF * F if GATED else 0)
    w_DF = w_EDF + expert.to(tl.int64) * D * WIDTH
    x_rows = x_ND + (pair // K).to(tl.int64) * D
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, D, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        x_tile = tl.load(
            x_rows[:, None] + depth[None, :], mask=(pair >= 0)[:, None] & fits(depth, D)[None, :], other=0.0
        )
        w_tile = tl.load(
            w_DF + depth[:, None] * WIDTH + outer[None, :],
            mask=fits(depth, D)[:, None] & fits(inner, F)[None, :],
            other=0.0,
        )
        acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
    left, right = halves(acc, ROWS, COLUMNS)
    z_rows, a_rows = place.to(tl.int64) * WIDTH, place.to(tl.int64) * F
    near = first + tl.arange(0, HALF)
    if GATED:
        inside = fits(near, F)[None, :]
        if KEEP_Z:
            tl.store(z_PF + z_rows[:, None] + near[None, :], left.to(z_PF.dtype.element_ty), mask=inside)
            tl.store(z_PF + z_rows[:, None] + F + near[None, :], right.to(z_PF.dtype.element_ty), mask=inside)
        if KEEP_A:
            a = activate(left, ACTIVATION) * right
            tl.store(a_PF + a_rows[:, None] + near[None, :], a.to(a_PF.dtype.element_ty), mask=inside)
    else:
        _keep(left, near, z_PF, a_PF, a_rows, F, ACTIVATION, KEEP_Z, KEEP_A)
        _keep(right, near + HALF, z_PF, a_PF, a_rows, F, ACTIVATION, KEEP_Z, KEEP_A)


@triton.jit
def _keep(
    z, column, z_PF, a_PF, rows,
    F: tl.constexpr, ACTIVATION: tl.constexpr, KEEP_Z: tl.constexpr, KEEP_A: tl.constexpr,
):  # fmt: skip
    address = rows[:, None] + column[None, :]
    inside = (column < F)[None, :]
    if KEEP_Z:
        tl.store(z_PF + address, z.to(z_PF.dtype.element_ty), mask=inside)
    if KEEP_A:
        tl.store(a_PF + address, activate(z, ACTIVATION).to(a_PF.dtype.element_ty), mask=inside)


@triton.jit
def _down_kernel(
    rows_PF, w_EFD, out, weight_R, pair_P, expert_T, num_experts,
    F: tl.constexpr, D: tl.constexpr, STRIDE_F: tl.constexpr, STRIDE_D: tl.constexpr,
    DIRECT: tl.constexpr, WEIGHTED: tl.constexpr,
    PLAN_ROWS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    num_columns: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    place = tl.program_id(0) // num_columns * ROWS + tl.arange(0, ROWS)
    expert = tl.load(expert_T + tl.program_id(0) // num_columns * ROWS // PLAN_ROWS)
    if expert > num_experts or (expert == num_experts and not DIRECT):
        return
    pair = tl.load(pair_P + place)
    column = tl.program_id(0) % num_columns * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    if expert < num_experts:  # dropped tokens keep the zeros
        acc = _product(
            rows_PF + place.to(tl.int64) * F, w_EFD + expert.to(tl.int64) * F * D, pair >= 0, column,
            acc, F, D, STRIDE_F, STRIDE_D, DEPTH, PRECISION,
        )  # fmt: skip
        if WEIGHTED:
            acc *= tl.load(weight_R + pair, mask=pair >= 0, other=0.0).to(tl.float32)[:, None]
    target = (pair if DIRECT else place).to(tl.int64) * D
    inside = (pair >= 0)[:, None] & fits(column, D)[None, :]
    tl.store(out + target[:, None] + column[None, :], acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _product(
    rows, w, real, column, acc,
    DIM: tl.constexpr, WIDTH: tl.constexpr, STRIDE_DEPTH: tl.constexpr, STRIDE_COLUMN: tl.constexpr,
    DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + rows [., DIM] times w [DIM, WIDTH] at some columns; rows that are not real count as zero."""
    for start in range(0, DIM, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        left = tl.load(rows[:, None] + depth[None, :], mask=real[:, None] & fits(depth, DIM)[None, :], other=0.0)
        right = tl.load(
            w + depth[:, None] * STRIDE_DEPTH + column[None, :] * STRIDE_COLUMN,
            mask=fits(depth, DIM)[:, None] & fits(column, WIDTH)[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _hidden_grad_kernel(
    grad_ND, w_EFD, z_PF, weight_R, dz_PF, a_PF, dweight_CR, pair_P, expert_T, num_experts, num_pairs,
    D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, ACTIVATION: tl.constexpr,
    PLAN_ROWS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = COLUMNS // 2
    num_columns: tl.constexpr = (F + COLUMNS - 1) // COLUMNS
    place = tl.program_id(0) // num_columns * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(0) % num_columns
    expert = tl.load(expert_T + tl.program_id(0) // num_columns * ROWS // PLAN_ROWS)
    if expert > num_experts:
        return
    pair = tl.load(pair_P + place)
    dweight = dweight_CR + block.to(tl.int64) * num_pairs + pair
    if expert == num_experts:
        tl.store(dweight, tl.zeros((ROWS,), tl.float32), mask=pair >= 0)
        return
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    acc = _product(
        grad_ND + (pair // K).to(tl.int64) * D, w_EFD + expert.to(tl.int64) * F * D, pair >= 0, column,
        tl.zeros((ROWS, COLUMNS), tl.float32), D, F, 1, D, DEPTH, PRECISION,
    )  # fmt: skip
    left, right = halves(acc, ROWS, COLUMNS)
    weight = tl.load(weight_R + pair, mask=pair >= 0, other=0.0).to(tl.float32)
    near = block * COLUMNS + tl.arange(0, HALF)
    total = _hidden_grad_half(left, near, place, weight, z_PF, dz_PF, a_PF, F, ACTIVATION)
    total += _hidden_grad_half(right, near + HALF, place, weight, z_PF, dz_PF, a_PF, F, ACTIVATION)
    tl.store(dweight, total, mask=pair >= 0)


@triton.jit
def _hidden_grad_half(da, column, place, weight, z_PF, dz_PF, a_PF, F: tl.constexpr, ACTIVATION: tl.constexpr):
    """Store dz and the weighted a of half a tile -> this half's part of the weights' gradient."""
    GATED: tl.constexpr = ACTIVATION == _SWIGLU
    inside = (column < F)[None, :]
    address = place.to(tl.int64)[:, None] * F + column[None, :]
    z_address = place.to(tl.int64)[:, None] * (2 * F if GATED else F) + column[None, :]
    z = tl.load(z_PF + z_address, mask=inside, other=0.0).to(tl.float32)
    a = activate(z, ACTIVATION)
    dz = da * slope(z, ACTIVATION) * weight[:, None]
    if GATED:
        value = tl.load(z_PF + z_address + F, mask=inside, other=0.0).to(tl.float32)
        tl.store(dz_PF + z_address + F, (da * a * weight[:, None]).to(dz_PF.dtype.element_ty), mask=inside)
        a *= value
        dz *= value
    tl.store(dz_PF + z_address, dz.to(dz_PF.dtype.element_ty), mask=inside)
    tl.store(a_PF + address, (a * weight[:, None]).to(a_PF.dtype.element_ty), mask=inside)
    return tl.sum(da * a, axis=1)


@triton.jit
def _weight_grad_kernel(
    left, right, out, pair_P, first_tile_E, num_experts,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr, GATHER_LEFT: tl.constexpr,
    PLAN_ROWS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    num_columns: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    num_blocks: tl.constexpr = (M + ROWS - 1) // ROWS * num_columns
    expert = tl.program_id(0) // num_blocks
    row = tl.program_id(0) % num_blocks // num_columns * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % num_columns * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.load(first_tile_E + expert)
    last = tl.load(first_tile_E + expert + 1)
    share = (last - first + SPLITS - 1) // SPLITS
    begin = first + tl.program_id(1) * share
    end = tl.minimum(begin + share, last)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(begin * PLAN_ROWS, end * PLAN_ROWS, DEPTH):
        place = start + tl.arange(0, DEPTH)
        pair = tl.load(pair_P + place)
        token = (pair // K).to(tl.int64)
        sorted_place = place.to(tl.int64)
        left_row = token if GATHER_LEFT else sorted_place
        right_row = sorted_place if GATHER_LEFT else token
        real = (pair >= 0)[:, None]
        left_tile = tl.load(left + left_row[:, None] * M + row[None, :], mask=real & fits(row, M)[None, :], other=0.0)
        right_tile = tl.load(
            right + right_row[:, None] * N + column[None, :], mask=real & fits(column, N)[None, :], other=0.0
        )
        acc = tl.dot(tl.trans(left_tile), right_tile, acc, input_precision=PRECISION)
    index = (tl.program_id(1) * num_experts + expert).to(tl.int64) * M * N
    address = out + index + row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(address, acc.to(out.dtype.element_ty), mask=fits(row, M)[:, None] & fits(column, N)[None, :])
