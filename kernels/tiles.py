"""Block sizes of the kernels, as data: what runs is decided here and nowhere else, and nothing is tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """How a program cuts its product: rows and columns of the result, depth of one step, warps, steps in flight."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


NUM_SMS = 132  # of an H100 or H200: what a launch should fill

LARGE_LOAD = 512  # rows per expert from which on larger tiles pay: on average half a tile per expert is padding


def plan_rows(itemsize: int, load: float) -> int:
    """Rows that a plan rounds every expert up to, for elements of `itemsize` bytes and `load` rows per expert."""
    return 128 if itemsize == 2 and load >= LARGE_LOAD else 64


def precision(operand: torch.Tensor) -> str:
    """How products are made in fp32: as PyTorch has been told to make its own; 16-bit products are not concerned."""
    tf32 = operand.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if tf32 else "ieee"


# (kernel, bytes per element, rows of the plan) -> candidates: the first is used, `benchmarks/tune_tiles.py` compares
# them. For swiglu half of the hidden columns are the gate's.
TILES: dict[tuple[str, int, int], tuple[Tile, ...]] = {
    ("up", 2, 128): (Tile(128, 128, 64, 8, 3), Tile(128, 128, 32, 8, 4), Tile(64, 256, 64, 8, 3)),
    ("up", 2, 64): (Tile(64, 128, 64, 4, 3), Tile(64, 256, 64, 8, 3)),
    ("up", 4, 64): (Tile(64, 64, 32, 4, 2),),
    ("down", 2, 128): (Tile(128, 128, 64, 8, 3), Tile(128, 256, 64, 8, 3)),
    ("down", 2, 64): (Tile(64, 128, 64, 4, 3), Tile(64, 256, 64, 8, 3)),
    ("down", 4, 64): (Tile(64, 32, 32, 4, 2),),
    ("hidden_grad", 2, 128): (Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3)),
    ("hidden_grad", 2, 64): (Tile(64, 128, 64, 4, 3),),
    ("hidden_grad", 4, 64): (Tile(64, 64, 32, 4, 2),),
    # rows and columns of the weight, depth along the expert's rows
    ("weight_grad", 2, 128): (Tile(128, 128, 64, 8, 3), Tile(128, 256, 64, 8, 3)),
    ("weight_grad", 2, 64): (Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3)),
    ("weight_grad", 4, 64): (Tile(64, 64, 32, 4, 2),),
    # a whole feed-forward up to `FUSED_WIDTH`: columns are the hidden ones of one step, its depth is the width
    ("fused_fwd", 2, 128): (Tile(64, 64, 0, 8, 2), Tile(128, 32, 0, 8, 2)),
    ("fused_fwd", 2, 64): (Tile(64, 64, 0, 8, 2),),
    ("fused_bwd", 2, 128): (Tile(64, 32, 0, 4, 2),),
    ("fused_bwd", 2, 64): (Tile(64, 32, 0, 4, 2),),
}
FUSED_WIDTH = 256


def is_fused(dim: int, itemsize: int, rows: int) -> bool:
    """Whether a feed-forward of this width runs in one kernel."""
    return dim <= FUSED_WIDTH and ("fused_fwd", itemsize, rows) in TILES
