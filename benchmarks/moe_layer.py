"""The mixture-of-experts layer against a dense feed-forward of equal active FLOPs, forward and backward.

    python benchmarks/moe_layer.py [--quick] [--tokens 4096] [--dims 64 128] [--dtypes float32] [--contenders tutel]
        [--add]

Tokens x width (inner 4x, GELU) x experts x choices. `experts` is our layer from given ids and weights to the last
gradient, `layer` has the router too, `low memory` keeps no hidden rows; contenders are whole layers. The routing is
another one in every round, as it is in training. One thread, contenders interleaved. Writes
benchmarks/results/moe_layer.json; with `--add` its rows of other sizes, of other contenders and of more rounds stay, so
that a grid can be measured in parts, on one machine under one setting of malloc.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from typing import Any

import harness
import moe_contenders
import torch
import torch.nn.functional as F
from side_by_side import geometric_mean, interleave, settings
from torch import Tensor

from supermoe import ops

BATCHES = 4  # of tokens, and so of routings
MANY_ROWS = 300  # per expert: from here on the layer should cost what a dense one does
LOW_MEMORY = "low memory"
IDENTITY = ("dtype", "tokens", "dim", "experts", "k", "contender")  # of a row


class Cell:
    """One shape: the contenders as functions of the number of the round."""

    def __init__(self, tokens: int, dim: int, experts: int, k: int, dtype: torch.dtype, device: str):
        generator = torch.Generator().manual_seed(0)
        self.k, self.size = k, (dim, 4 * dim, experts, k, dtype, device)
        skew_E = 0.15 * torch.randn(experts, generator=generator)  # the fullest expert has up to twice the mean load
        self.router_ED, *stacks = moe_contenders.draw("gelu", dim, 4 * dim, experts)
        batches = [torch.randn(tokens, dim, generator=generator) for _ in range(BATCHES)]
        self.routings = [ops.route(x_ND @ self.router_ED.t() + skew_E, k) for x_ND in batches]
        self.x = [self._leaf(x_ND) for x_ND in batches]
        self.stacks = [self._leaf(stack) for stack in stacks]
        self.router_ED = self._leaf(self.router_ED)
        # as wide as all experts that work on a token together
        self.dense = [self._leaf(torch.randn(dim, 4 * dim * k) * dim**-0.5), self._leaf(torch.randn(4 * dim * k, dim))]
        self.grad_ND = torch.randn(tokens, dim, generator=generator).to(device, dtype)

    def functions(self, contenders: list[str]) -> dict[str, Callable[[int], Any]]:
        """All that can be had here; the reason is printed where one cannot."""
        found = {"dense": self.run_dense, "experts": self.run_experts, "layer": self.run_layer}
        for name in contenders:
            if name == LOW_MEMORY:
                found[name] = lambda number: self.run_experts(number, low_memory=True)
                continue
            layer = moe_contenders.make(name, *self.size)
            if isinstance(layer, str):
                print(f"  skipped: {layer}")
            else:
                found[name] = lambda number, layer=layer: self._backward(
                    layer(self.x[number % BATCHES]), number, *layer.parameters()
                )
        return found

    def run_dense(self, number: int) -> None:
        """A dense feed-forward."""
        w_in_DF, w_out_FD = self.dense
        self._backward(F.gelu(self.x[number % BATCHES] @ w_in_DF) @ w_out_FD, number, *self.dense)

    def run_experts(self, number: int, low_memory: bool = False) -> None:
        """Ours from given ids and weights on."""
        routing = self.routings[number % BATCHES]
        weight_NK = routing.weight_NK.to(self.grad_ND.device).requires_grad_()
        expert_NK = routing.expert_NK.to(self.grad_ND.device)
        y_ND = ops.expert_ffn(self.x[number % BATCHES], expert_NK, weight_NK, *self.stacks, "gelu", low_memory)
        self._backward(y_ND, number, weight_NK, *self.stacks)

    def run_layer(self, number: int) -> None:
        """Ours with the router."""
        x_ND = self.x[number % BATCHES]
        routing = ops.route(F.linear(x_ND.float(), self.router_ED.float()), self.k)
        y_ND = ops.expert_ffn(x_ND, routing.expert_NK, routing.weight_NK, *self.stacks, "gelu")
        self._backward(y_ND, number, self.router_ED, *self.stacks)

    def _backward(self, y_ND: Tensor, number: int, *leaves: Tensor) -> None:
        torch.autograd.grad(y_ND, (self.x[number % BATCHES], *leaves), self.grad_ND, allow_unused=True)

    def _leaf(self, values: Tensor) -> Tensor:
        return values.to(self.size[-1], self.size[-2]).requires_grad_()


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every contender over dense: geometric mean and range of the time, mean of the memory, over groups of shapes."""
    cell = IDENTITY[:-1]
    dense_mb = {tuple(row[key] for key in cell): row["peak_mb"] for row in rows if row["contender"] == "dense"}
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["contender"] != "dense":
            key = row["dtype"], row["contender"]
            groups.setdefault((*key, "all"), []).append(row)
            if row["rows_per_expert"] >= MANY_ROWS:
                groups.setdefault((*key, f"{MANY_ROWS} rows and more"), []).append(row)
    lines = []
    for (dtype, name, which), group in groups.items():
        ratios = [row["ratio"] for row in group]
        memory = geometric_mean(row["peak_mb"] / dense_mb[tuple(row[key] for key in cell)] for row in group)
        line = {
            "dtype": dtype,
            "contender": name,
            "shapes": which,
            "count": len(group),
            "mean_ratio": geometric_mean(ratios),
        }
        lines.append(line | {"best": min(ratios), "worst": max(ratios), "memory": memory})
    return lines


def merged(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with those of the file; of two for the same, that of more rounds, and of as many the new one."""
    path = harness.RESULTS / f"{name}.json"
    before = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in before + rows:
        key = tuple(row[key] for key in IDENTITY)
        if key not in best or row["rounds"] >= best[key]["rounds"]:
            best[key] = row
    return list(best.values())


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four small shapes, nothing is saved")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--choices", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--contenders", nargs="*", default=[], choices=[LOW_MEMORY, *moe_contenders.CONTENDERS])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--add", action="store_true", help="keep what is in the file, but for rows of no more rounds")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="moe_layer", help="of the file in benchmarks/results")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.tokens, arguments.dims, arguments.experts, arguments.rounds = [4096], [64], [8, 64], 3
    torch.set_num_threads(1)
    rows = []
    sizes = (arguments.dtypes, arguments.tokens, arguments.dims, arguments.choices, arguments.experts)
    for dtype, tokens, dim, k, experts in itertools.product(*sizes):
        cell = Cell(tokens, dim, experts, k, getattr(torch, dtype), arguments.device)
        shape = {"dtype": dtype, "tokens": tokens, "dim": dim, "experts": experts, "k": k}
        found = interleave(cell.functions(arguments.contenders), arguments.rounds, arguments.device)
        facts = {"rows_per_expert": tokens * k // experts, "rounds": arguments.rounds}
        rows += [shape | facts | row for row in found]
        print(*shape.values(), *(f"{row['contender']} {row['ratio']:.2f}" for row in found[1:]), sep="  ", flush=True)
    for line in summary(rows):
        print({key: round(value, 2) if isinstance(value, float) else value for key, value in line.items()})
    if not arguments.quick:
        rows = merged(arguments.name, rows) if arguments.add else rows
        print(f"-> {harness.write(arguments.name, rows, **settings(arguments.device, arguments.rounds))}")


if __name__ == "__main__":
    main()
