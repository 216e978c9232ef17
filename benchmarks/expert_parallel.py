"""What it costs to spread experts over processes: one MoE layer, forward and backward, on gloo.

    python benchmarks/expert_parallel.py [--tokens 4096] [--rounds 7]        needs the extra `fairscale`

One launch of four processes of one thread each. In groups of 1, 2 and 4 of them the same layer runs with its experts
spread (`expert parallel`), with all experts in every process (`all local`), and as fairscale's `MOELayer` with
Top2Gate, which pads to a capacity and drops what exceeds it. Strong scaling shares the tokens out, weak scaling gives
every process as many. Rounds of the contenders alternate; figures are medians over rounds.

`tokens_per_second` is by the wall time of the slowest process. `all_to_all` is the share of a round spent in exchanges,
waiting for the slowest included; `dispatch` (counting and sending), `experts` and `combine` (sending back) are shares
of the forward pass, in which exchanges are waited for at once. `imbalance` is the rows of the fullest process over the
mean, and `imbalance_cost` the time beside exchanges of the slowest process over the mean.
Writes benchmarks/results/expert_parallel.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from unittest.mock import patch

import harness
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from supermoe.config import MoEConfig
from supermoe.distributed import expert_parallel
from supermoe.model.moe import Experts, MoE

DIM, EXPERTS, HIDDEN, RANKS = 64, 8, 256, 4


class Clock:
    """Seconds of one round by what they went to, and rows that arrived."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.rows = 0

    def times(self, owner: Any, function: str, name: str) -> AbstractContextManager[Any]:
        """Inside, this function of a module or class is timed; what it starts in the background is waited for."""
        original = getattr(owner, function)

        def timed(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            result = original(*args, **options)
            if options.get("async_op", False):
                result.wait()
            self.seconds[name] += time.perf_counter() - started
            return result

        return patch.object(owner, function, timed)

    def counts(self) -> AbstractContextManager[Any]:
        """Inside, rows that arrive at experts here are counted."""
        original = expert_parallel._arrived_routing

        def counted(*args: Any) -> Any:
            routing = original(*args)
            self.rows += int(routing.counts_E.sum())
            return routing

        return patch.object(expert_parallel, "_arrived_routing", counted)


def fairscale_layer(size: int, group: dist.ProcessGroup) -> nn.Module:
    """fairscale's layer over [tokens, DIM], with as many experts in every process."""
    from fairscale.nn import MOELayer, Top2Gate

    def expert() -> nn.Module:
        return nn.Sequential(nn.Linear(DIM, HIDDEN, bias=False), nn.GELU(), nn.Linear(HIDDEN, DIM, bias=False))

    experts = nn.ModuleList(expert() for _ in range(EXPERTS // size))
    return MOELayer(Top2Gate(DIM, EXPERTS), experts, group=group)


def layers(size: int, group: dist.ProcessGroup, mesh: DeviceMesh) -> dict[str, Callable[[Tensor], Tensor]]:
    """The contenders by name."""
    config = MoEConfig(experts=EXPERTS, top_k=2, hidden=HIDDEN)
    torch.manual_seed(0)
    local, spread = MoE(config, DIM, "gelu"), MoE(config, DIM, "gelu")
    expert_parallel.shard_experts(spread, mesh)
    theirs = fairscale_layer(size, group)
    return {
        "expert parallel": lambda x: spread(x)[0],
        "all local": lambda x: local(x)[0],
        "fairscale MOELayer": lambda x: theirs(x.view(EXPERTS, -1, DIM)).view_as(x),
    }


def measure(layer: Callable[[Tensor], Tensor], tokens: int, group: dist.ProcessGroup) -> Clock:
    """One round: forward and backward over this process's tokens."""
    clock, x_ND = Clock(), torch.randn(tokens, DIM, requires_grad=True)
    with ExitStack() as stack:
        stack.enter_context(clock.times(dist, "all_to_all_single", "exchange"))
        stack.enter_context(clock.times(expert_parallel, "plan_trip", "dispatch"))
        stack.enter_context(clock.times(expert_parallel.Trip, "send", "dispatch"))
        stack.enter_context(clock.times(Experts, "forward", "experts"))
        stack.enter_context(clock.times(expert_parallel.Trip, "send_back", "combine"))
        stack.enter_context(clock.counts())
        dist.barrier(group)
        started = time.perf_counter()
        loss = layer(x_ND).square().sum()
        clock.seconds["forward"] = time.perf_counter() - started
        loss.backward()
        clock.seconds["total"] = time.perf_counter() - started
    return clock


def work(rank: int, port: int, tokens: int, rounds: int, rows: Any) -> None:
    """What every process does."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    for size in (1, 2, RANKS):
        group = dist.new_group(list(range(size)))
        mesh = DeviceMesh("cpu", list(range(size)))
        if rank < size:
            contenders = layers(size, group, mesh)
            for scaling in ("strong", "weak") if size > 1 else ("strong",):
                share = tokens // size if scaling == "strong" else tokens
                samples: dict[str, list[Any]] = {name: [] for name in contenders}
                for number in range(rounds + 1):  # the first warms up
                    for name, layer in contenders.items():
                        clock = measure(layer, share, group)
                        found = [None] * size
                        dist.all_gather_object(found, {**clock.seconds, "rows": clock.rows}, group=group)
                        samples[name] += [found] if number else []
                if rank == 0:
                    rows += [row(name, scaling, size, share, found) for name, found in samples.items()]
        dist.barrier()
    dist.destroy_process_group()


Round = list[dict[str, float]]  # of every process: seconds by what they went to, and rows that arrived


def row(name: str, scaling: str, size: int, share: int, samples: list[Round]) -> dict[str, Any]:
    """Medians over rounds."""

    def median(value: Callable[[Round], float]) -> float:
        return statistics.median(value(found) for found in samples)

    def part(kind: str, whole: str) -> float:
        return round(median(lambda ranks: sum(r.get(kind, 0.0) for r in ranks) / sum(r[whole] for r in ranks)), 3)

    found = {
        "contender": name,
        "scaling": scaling,
        "processes": size,
        "tokens_per_second": round(size * share / median(lambda ranks: max(r["total"] for r in ranks))),
        "all_to_all": part("exchange", "total"),
    }
    if name == "expert parallel":
        counts = [sum(found[rank]["rows"] for found in samples) for rank in range(size)]
        busy = [
            statistics.median(found[rank]["total"] - found[rank]["exchange"] for found in samples)
            for rank in range(size)
        ]
        found |= {kind: part(kind, "forward") for kind in ("dispatch", "experts", "combine")}
        found |= {"imbalance": round(max(counts) * size / sum(counts), 3)}
        found |= {"imbalance_cost": round(max(busy) * size / sum(busy), 3)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--port", type=int, default=29611)
    arguments = parser.parse_args()
    with mp.Manager() as manager:
        rows = manager.list()
        mp.spawn(work, (arguments.port, arguments.tokens, arguments.rounds, rows), nprocs=RANKS)
        found = list(rows)
    for line in found:
        print(line)
    settings: dict[str, Any] = {
        "dim": DIM,
        "experts": EXPERTS,
        "hidden": HIDDEN,
        "top_k": 2,
        "tokens": arguments.tokens,
    }
    settings["load_average"] = round(os.getloadavg()[0], 1)  # wall time means little where others compute too
    print(f"-> {harness.write('expert_parallel', found, **settings, rounds=arguments.rounds, threads=1)}")


if __name__ == "__main__":
    main()
