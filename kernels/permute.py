"""Which row goes where: pairs (token, choice) sorted by expert, every expert's padded to whole tiles; and the way back.

Three launches, no host synchronisation and no float atomics: buffers have the size that the worst case needs, and tiles
that stay unused are marked. Dropped pairs (expert -1) form a last group of their own, so that whoever writes a row per
token writes zeros there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = tl.constexpr(1024)  # pairs that one program counts and places
_TILE_BLOCK = tl.constexpr(32)  # tiles that one program maps
_STEP_ELEMENTS = 4096  # of the one-hot matrix that a program holds


@dataclass(frozen=True)
class Plan:
    """P places of R = N x K pairs, in tiles of `rows` places; a tile belongs to one expert."""

    rows: int
    num_experts: int
    top_k: int
    pair_P: Tensor  # int32: pair n * K + j at each place, -1: padding
    place_NK: Tensor  # int32: place of each pair, -1: dropped
    expert_T: Tensor  # int32, of each tile; E: dropped pairs, above: unused
    first_tile_E: Tensor  # int32, of the groups 0..E: expert e has the tiles first_tile_E[e]:first_tile_E[e + 1]

    @property
    def num_tiles(self) -> int:
        """Tiles that there is room for."""
        return len(self.expert_T)

    def row_blocks(self, rows: int) -> int:
        """Programs that cover the places when each takes `rows` of a tile."""
        return self.num_tiles * (self.rows // rows)

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.place_NK)


def plan(expert_NK: Tensor, num_experts: int, rows: int) -> Plan:
    """Sort pairs by expert, in token order inside an expert (a stable counting sort)."""
    num_pairs, groups = expert_NK.numel(), triton.next_power_of_2(num_experts + 1)
    num_blocks = triton.cdiv(num_pairs, _BLOCK.value)
    num_tiles = triton.cdiv(num_pairs, rows) + num_experts + 1
    tile_blocks = triton.cdiv(num_tiles, _TILE_BLOCK.value)
    step = max(_STEP_ELEMENTS // groups, 16)
    int32 = {"dtype": torch.int32, "device": expert_NK.device}
    count_BG = torch.empty(num_blocks, groups, **int32)
    total_G = torch.empty(groups, **int32)
    pair_P = torch.empty(num_tiles * rows, **int32)
    place_NK = torch.empty(expert_NK.shape, **int32)
    expert_T = torch.empty(num_tiles, **int32)
    first_tile_E = torch.empty(num_experts + 1, **int32)

    expert_NK = expert_NK.contiguous()
    sizes = {"GROUPS": groups, "STEP": step}
    if num_blocks:
        _count_kernel[(num_blocks,)](expert_NK, count_BG, num_pairs, num_experts, **sizes)
    _scan_kernel[(groups,)](count_BG, total_G, num_blocks, groups, BLOCKS=triton.next_power_of_2(max(num_blocks, 1)))
    _place_kernel[(num_blocks + tile_blocks,)](
        expert_NK, count_BG, total_G, pair_P, place_NK, expert_T, first_tile_E,
        num_pairs, num_experts, num_blocks, num_tiles, ROWS=rows, **sizes,
    )  # fmt: skip
    return Plan(rows, num_experts, expert_NK.shape[1], pair_P, place_NK, expert_T, first_tile_E)


def combine(rows_PD: Tensor, plan: Plan) -> Tensor:
    """Sum of each token's rows -> y_ND."""
    dim = rows_PD.shape[1]
    y_ND = rows_PD.new_empty(plan.num_tokens, dim)
    columns = min(triton.next_power_of_2(dim), 256)
    tokens = 4096 // columns
    grid = (triton.cdiv(plan.num_tokens, tokens), triton.cdiv(dim, columns))
    if plan.num_tokens:
        _combine_kernel[grid](
            rows_PD, plan.place_NK, y_ND, plan.num_tokens, D=dim, K=plan.top_k, TOKENS=tokens, COLUMNS=columns
        )
    return y_ND


@triton.jit
def _groups_of(expert, pair, num_pairs, num_experts, GROUPS: tl.constexpr):
    """One-hot groups of some pairs [pairs, GROUPS]; no group beyond the last pair."""
    real = pair < num_pairs
    chosen = tl.load(expert + pair, mask=real, other=0).to(tl.int32)
    group = tl.where(real, tl.where(chosen < 0, num_experts, chosen), GROUPS)
    return (group[:, None] == tl.arange(0, GROUPS)[None, :]).to(tl.int32), group


@triton.jit
def _count_kernel(expert, count_BG, num_pairs, num_experts, GROUPS: tl.constexpr, STEP: tl.constexpr):
    block = tl.program_id(0)
    count = tl.zeros((GROUPS,), tl.int32)
    for start in range(0, _BLOCK, STEP):
        pair = block * _BLOCK + start + tl.arange(0, STEP)
        one_hot, _ = _groups_of(expert, pair, num_pairs, num_experts, GROUPS)
        count += tl.sum(one_hot, axis=0)
    tl.store(count_BG + block * GROUPS + tl.arange(0, GROUPS), count)


@triton.jit
def _scan_kernel(count_BG, total_G, num_blocks, groups, BLOCKS: tl.constexpr):
    """Turn the counts of a group per block into how many come in earlier blocks; one program per group."""
    group = tl.program_id(0)
    block = tl.arange(0, BLOCKS)
    count = tl.load(count_BG + block * groups + group, mask=block < num_blocks, other=0)
    tl.store(count_BG + block * groups + group, tl.cumsum(count, axis=0) - count, mask=block < num_blocks)
    tl.store(total_G + group, tl.sum(count, axis=0))


@triton.jit
def _place_kernel(
    expert, before_BG, total_G, pair_P, place_R, expert_T, first_tile_E,
    num_pairs, num_experts, num_blocks, num_tiles,
    GROUPS: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The first programs place a block of pairs each, the others map a block of tiles and mark their padding."""
    groups = tl.arange(0, GROUPS)
    total = tl.load(total_G + groups)
    tiles = (total + ROWS - 1) // ROWS
    end = tl.cumsum(tiles, axis=0)
    first = end - tiles
    block = tl.program_id(0)
    if block < num_blocks:
        next_place = first * ROWS + tl.load(before_BG + block * GROUPS + groups)
        for start in range(0, _BLOCK, STEP):
            pair = block * _BLOCK + start + tl.arange(0, STEP)
            one_hot, group = _groups_of(expert, pair, num_pairs, num_experts, GROUPS)
            earlier = tl.cumsum(one_hot, axis=0) - one_hot
            place = tl.sum(one_hot * (earlier + next_place[None, :]), axis=1)
            tl.store(pair_P + place, pair, mask=pair < num_pairs)
            tl.store(place_R + pair, tl.where(group == num_experts, -1, place), mask=pair < num_pairs)
            next_place += tl.sum(one_hot, axis=0)
    else:
        tile = (block - num_blocks) * _TILE_BLOCK + tl.arange(0, _TILE_BLOCK)
        group = tl.sum((end[None, :] <= tile[:, None]).to(tl.int32), axis=1)
        tl.store(expert_T + tile, group, mask=tile < num_tiles)
        full = tl.sum(tl.where(group[:, None] == groups[None, :], (first * ROWS + total)[None, :], 0), axis=1)
        place = tile[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        padding = (place >= full[:, None]) & (group < GROUPS)[:, None]
        tl.store(pair_P + place, tl.full((_TILE_BLOCK, ROWS), -1, tl.int32), mask=padding & (tile < num_tiles)[:, None])
        if block == num_blocks:
            tl.store(first_tile_E + groups, first, mask=groups <= num_experts)


@triton.jit
def _combine_kernel(
    rows_PD, place_NK, y_ND, num_tokens,
    D: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (token < num_tokens)[:, None] & (column < D)[None, :]
    total = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for choice in tl.static_range(K):
        place = tl.load(place_NK + token * K + choice, mask=token < num_tokens, other=-1)
        address = rows_PD + place.to(tl.int64)[:, None] * D + column[None, :]
        total += tl.load(address, mask=inside & (place >= 0)[:, None], other=0.0).to(tl.float32)
    tl.store(y_ND + token.to(tl.int64)[:, None] * D + column[None, :], total.to(y_ND.dtype.element_ty), mask=inside)
