"""A table that outgrows a process: its rows over 1, 2 and 4 processes on one machine, trained with row-wise Adagrad.

    python benchmarks/table_parallel.py --gigabytes 2

A table of 20 GB on a node's 8 devices is 2.5 GB on each; here the size is scaled to what one machine holds. Every rank
looks up its own batches of Zipf-distributed ids; no process ever holds the whole table. Counted is the memory that a
rank gains by the table (resident, after steps with gradients and the optimiser's state), against table / ranks.
Writes benchmarks/results/table_parallel.json.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh

from supermoe.distributed.table_parallel import ShardedTable
from supermoe.model.embedding import embedding_table
from supermoe.training.optim import RowwiseAdagrad

DIM, IDS, STEPS, RANKS = 64, 16_384, 5, (1, 2, 4)


def resident() -> int:
    """Bytes of this process that lie in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def batch(num_rows: int, generator: torch.Generator) -> torch.Tensor:
    """Ids as a hash table sees them: the k-th most frequent value has a share of 1 / k and lies anywhere."""
    place = torch.rand(IDS, generator=generator, dtype=torch.float64)
    rank = torch.exp(place * torch.tensor(num_rows, dtype=torch.float64).log()).long()
    return 2 + rank * 2_654_435_761 % (num_rows - 2)


def work(rank: int, ranks: int, num_rows: int, folder: str) -> None:
    """One process: build, train a few steps, and write what it measured."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    mesh = DeviceMesh("cpu", list(range(ranks)))
    generator = torch.Generator().manual_seed(rank)
    small = ShardedTable(embedding_table(1000, DIM, 0), mesh)  # a warm-up, so that libraries are loaded
    train(small, RowwiseAdagrad(small.parameters(), lr=0.1), 1000, generator, 1)
    before = resident()
    table = ShardedTable(embedding_table(num_rows, DIM, 0), mesh)
    optimizer = RowwiseAdagrad(table.parameters(), lr=0.1)
    seconds = train(table, optimizer, num_rows, generator, STEPS)
    found = {"gained": resident() - before, "seconds": seconds}
    Path(folder, f"{rank}.json").write_text(json.dumps(found), encoding="ascii")
    dist.barrier()
    dist.destroy_process_group()


def train(
    table: ShardedTable, optimizer: RowwiseAdagrad, num_rows: int, generator: torch.Generator, steps: int
) -> float:
    """CPU seconds of a step."""
    start = time.process_time()
    for _ in range(steps):
        table(batch(num_rows, generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return (time.process_time() - start) / steps


def measure(ranks: int, num_rows: int) -> dict[str, Any]:
    """Row of one number of processes."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, (ranks, num_rows, folder), nprocs=ranks, start_method="fork")
        found = [json.loads(Path(folder, f"{rank}.json").read_text(encoding="ascii")) for rank in range(ranks)]
    share = num_rows * (DIM + 1) * 4 / ranks  # weights, and one number per row of the optimiser
    gained = [each["gained"] for each in found]
    return {
        "ranks": ranks,
        "rows": num_rows,
        "dim": DIM,
        "table_mb": num_rows * DIM * 4 / 1e6,
        "share_mb": share / 1e6,
        "gained_mb": [bytes_ / 1e6 for bytes_ in gained],
        "worst_ratio": max(gained) / share,
        "cpu_s_per_step": max(each["seconds"] for each in found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the table")
    num_rows = int(parser.parse_args().gigabytes * 1e9 / (4 * DIM))
    rows = []
    for ranks in RANKS:
        row = measure(ranks, num_rows)
        rows.append(row)
        print(
            f"{ranks} ranks  share {row['share_mb']:8,.0f} MB  gained {max(row['gained_mb']):8,.0f} MB  "
            f"{row['worst_ratio']:.3f} of the share  {row['cpu_s_per_step']:.3f} CPU s a step"
        )
    print(f"-> {harness.write('table_parallel', rows, dim=DIM, ids=IDS, steps=STEPS)}")


if __name__ == "__main__":
    main()
