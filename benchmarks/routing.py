"""Where the time of the mixture-of-experts layer goes: router, dispatch, experts, combine, whole layer, beside dense.

    python benchmarks/routing.py [--quick]

fp32 on one thread; forward and backward for the router, the experts and the layers, forward for the two moves. `topk`
is the router with PyTorch's own top-k. Writes benchmarks/results/routing.json.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import harness
import torch
import torch.nn.functional as F
from moe_layer import BATCHES, Cell
from side_by_side import interleave, settings

from supermoe import ops
from supermoe.ops import layout, reference


class Parts(Cell):
    """The parts of the layer as functions of the number of the round."""

    def run_router(self, number: int, module: Any = ops) -> None:
        """Logits, choice and weights."""
        x_ND = self.x[number % BATCHES]
        weight_NK = module.route(F.linear(x_ND, self.router_ED), self.k).weight_NK
        torch.autograd.grad(weight_NK.square().sum(), (x_ND, self.router_ED))

    def run_dispatch(self, number: int) -> None:
        """Sort, and rows of x in expert order."""
        where = self._layout(number)
        self.x[number % BATCHES].detach().index_select(0, where.token_P)

    def run_combine(self, number: int) -> None:
        """The weighted sum over a token's choices, without the sort."""
        weight_NK = self.routings[number % BATCHES].weight_NK
        rows_RD = self.grad_ND.repeat(self.k, 1)
        place_NK = torch.arange(len(rows_RD)).view(weight_NK.shape)
        F.embedding_bag(place_NK, rows_RD, mode="sum", per_sample_weights=weight_NK)

    def _layout(self, number: int) -> layout.Layout:
        return layout.packed(self.routings[number % BATCHES].expert_NK, len(self.stacks[0]), len(self.grad_ND))


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape, nothing is saved")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="routing", help="of the file in benchmarks/results")
    arguments = parser.parse_args()
    dims, rounds = ([64], 3) if arguments.quick else ([64, 128], 5)
    torch.set_num_threads(1)
    rows = []
    for dim, experts, k in itertools.product(dims, [8, 64], [1, 2]):
        parts = Parts(4096, dim, experts, k, torch.float32, arguments.device)
        functions = {
            "dense": parts.run_dense,
            "router": parts.run_router,
            "router, topk": lambda number, parts=parts: parts.run_router(number, reference),
            "experts": parts.run_experts,
            "layer": parts.run_layer,
        }
        if arguments.device == "cpu":  # elsewhere the two moves are parts of the products
            functions |= {"dispatch": parts.run_dispatch, "combine": parts.run_combine}
        for row in interleave(functions, rounds, arguments.device):
            rows.append({"tokens": 4096, "dim": dim, "experts": experts, "k": k} | row)
            print(
                dim, experts, k, f"{row['contender']:14s} {row['ms']:8.2f} ms  {row['ratio']:.3f} of dense", flush=True
            )
    if not arguments.quick:
        print(f"-> {harness.write(arguments.name, rows, **settings(arguments.device, rounds))}")


if __name__ == "__main__":
    main()
