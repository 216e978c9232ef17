"""Which tile is fastest: every candidate of `kernels/tiles.py` on this GPU, and what the rest of the layer takes.

Prints the candidates of each shape, fastest first, and writes them all; the winners are put first in the table by hand.
Without a GPU it runs one small shape in fp32 under TRITON_INTERPRET=1, which shows that it works and measures nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NamedTuple

import harness
import torch
from torch import Tensor

from supermoe.kernels import grouped_mm, permute, tiles
from supermoe.kernels.tiles import Tile
from supermoe.ops import reference, triton_moe


class Shape(NamedTuple):
    """A layer: tokens, experts per token, experts, width, hidden width, activation."""

    tokens: int
    k: int
    experts: int
    dim: int
    hidden: int
    activation: str = "gelu"


QUICK = [Shape(131072, 1, 64, 256, 512), Shape(131072, 2, 64, 1024, 2048)]
GRID = [
    *QUICK,
    Shape(65536, 1, 128, 256, 256),  # few rows per expert
    Shape(131072, 2, 64, 512, 1024),
    Shape(131072, 2, 64, 512, 1024, "swiglu"),
    Shape(262144, 1, 64, 1024, 1024),
]
TINY = [Shape(40, 2, 3, 16, 32)]


class Operands(NamedTuple):
    """What the kernels of a layer take; random, of a size that keeps values of order 1."""

    x_ND: Tensor
    expert_NK: Tensor
    weight_NK: Tensor
    w_in_EDF: Tensor
    w_out_EFD: Tensor


def operands(shape: Shape, device: str, dtype: torch.dtype) -> Operands:
    """Draw them; the router's choices are even on average."""
    width = 2 * shape.hidden if shape.activation == "swiglu" else shape.hidden
    draw = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw, device=device, dtype=dtype)

    scores = torch.rand(shape.tokens, shape.experts, generator=draw, device=device)
    return Operands(
        normal(shape.tokens, shape.dim),
        scores.topk(shape.k, dim=1).indices,
        torch.full((shape.tokens, shape.k), 1 / shape.k, device=device),
        normal(shape.experts, shape.dim, width) * shape.dim**-0.5,
        normal(shape.experts, shape.hidden, shape.dim) * shape.hidden**-0.5,
    )


def launches(shape: Shape, given: Operands, plan: permute.Plan) -> dict[str, Callable[[Tile], object]]:
    """One launch of every kernel with several candidates, to be given a tile."""
    first = tiles.TILES["up", given.x_ND.dtype.itemsize, plan.rows][0]
    z_PF, _ = grouped_mm.up(given.x_ND, given.w_in_EDF, plan, shape.activation, first, "z")
    settings = given.w_out_EFD, z_PF, given.weight_NK, plan, shape.activation
    return {
        "up": lambda tile: grouped_mm.up(given.x_ND, given.w_in_EDF, plan, shape.activation, tile, "za"),
        "down": lambda tile: grouped_mm.down(z_PF, given.w_in_EDF.transpose(1, 2), plan, tile, None),
        "hidden_grad": lambda tile: grouped_mm.hidden_grad(given.x_ND, *settings, tile),
        "weight_grad": lambda tile: grouped_mm.weight_grad(given.x_ND, z_PF, plan, tile, gather_left=True),
    }


def routing(shape: Shape, given: Operands, rows: int) -> dict[str, Callable[[], object]]:
    """What comes before the experts: the router, beside PyTorch's operators, and the sorting of rows."""
    logits_NE = torch.randn(shape.tokens, shape.experts, device=given.x_ND.device)
    return {
        "router": lambda: triton_moe.route(logits_NE, shape.k),
        "router, PyTorch": lambda: reference.route(logits_NE, shape.k),
        "plan": lambda: permute.plan(given.expert_NK, shape.experts, rows),
    }


def step(shape: Shape, given: Operands) -> Callable[[], object]:
    """Forward and backward of the whole layer."""
    leaves = [given.x_ND, given.weight_NK, given.w_in_EDF, given.w_out_EFD]
    x, g, w_in, w_out = (leaf.detach().requires_grad_() for leaf in leaves)
    grad = torch.randn_like(given.x_ND)

    def run() -> object:
        y_ND = triton_moe.expert_ffn(x, given.expert_NK, g, w_in, w_out, shape.activation)
        return torch.autograd.grad(y_ND, (x, g, w_in, w_out), grad)

    return run


def milliseconds(function: Callable[[], object], device: str) -> float:
    """Median over repeated calls; on a CPU the time of one."""
    if device == "cuda":
        from triton.testing import do_bench

        return do_bench(function, warmup=10, rep=60, return_mode="median")
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def measure(shape: Shape, device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """A row per kernel and candidate, per part of the routing, and for the layer in one kernel and in several."""
    given = operands(shape, device, dtype)
    itemsize = dtype.itemsize
    plan = permute.plan(
        given.expert_NK, shape.experts, tiles.plan_rows(itemsize, shape.tokens * shape.k / shape.experts)
    )
    rows = []
    for kernel, launch in launches(shape, given, plan).items():
        for tile in tiles.TILES[kernel, itemsize, plan.rows]:
            took = milliseconds(lambda launch=launch, tile=tile: launch(tile), device)
            rows.append({"kernel": kernel, "plan_rows": plan.rows, "tile": asdict(tile), "ms": took})
    for name, function in routing(shape, given, plan.rows).items():
        rows.append({"kernel": name, "plan_rows": plan.rows, "tile": None, "ms": milliseconds(function, device)})
    for name, width in (("layer, several kernels", 0), ("layer, one kernel", tiles.FUSED_WIDTH)):
        if width and not tiles.is_fused(shape.dim, itemsize, plan.rows):
            continue
        usual, tiles.FUSED_WIDTH = tiles.FUSED_WIDTH, width
        rows.append(
            {"kernel": name, "plan_rows": plan.rows, "tile": None, "ms": milliseconds(step(shape, given), device)}
        )
        tiles.FUSED_WIDTH = usual
    return [shape._asdict() | row for row in rows]


def report(rows: list[dict[str, Any]]) -> None:
    """Each shape's candidates, fastest first."""
    for row in sorted(rows, key=lambda row: (row["kernel"].split(",")[0], row["ms"])):
        print(f"  {row['ms']:9.3f} ms  {row['kernel']:22s} plan of {row['plan_rows']} rows  {row['tile'] or ''}")


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two shapes instead of six")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = TINY if device == "cpu" else QUICK if args.quick else GRID
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rows = []
    for shape in shapes:
        print(shape)
        found = measure(shape, device, dtype)
        report(found)
        rows += found
    if device == "cuda":
        print(harness.write("tile_tuning", rows, dtype=str(dtype)))


if __name__ == "__main__":
    main(sys.argv[1:])
