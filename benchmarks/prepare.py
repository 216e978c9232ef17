"""Memory and time of `prepare` on a long log, beside a bare DuckDB external sort of the same file and memory limit.

    python benchmarks/prepare.py [--events 60e6] [--rounds 1] [--memory 3GB] [--threads 2] [--scratch FOLDER]

Every step is a process of its own, so that peak memory is the step's. Wants: peak RSS of `prepare` at most the limit +
0.5 GB, its time at most twice the sort's; and batches read from the finished store without loading it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np

CHUNK = 2_000_000  # events drawn at a time
EVENTS_PER_USER, ITEMS, DAYS = 60, 100_000, 730
START = 1_577_836_800  # 2020-01-01
HEADROOM, SLOWDOWN = 512, 2.0  # MB over the limit; times the bare sort


def generate(events: int, folder: Path) -> int:
    """Write log.parquet: users of very different activity, times over two years, items by a power law, a price."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    schema = pa.schema({"user": pa.int64(), "time": pa.timestamp("us"), "item": pa.int64(), "price": pa.float64()})
    with pq.ParquetWriter(folder / "log.parquet", schema) as file:
        for first in range(0, events, CHUNK):
            size = min(CHUNK, events - first)
            seconds = START + rng.integers(0, DAYS * 86400, size)
            columns = [
                (rng.random(size) ** 1.5 * (events / EVENTS_PER_USER)).astype(np.int64) * 7919,
                pa.array(seconds * 1_000_000, pa.timestamp("us")),
                (rng.random(size) ** 3 * ITEMS).astype(np.int64),
                rng.lognormal(2.0, 1.0, size),
            ]
            file.write_table(pa.table(dict(zip(schema.names, columns, strict=True)), schema))
    return events


def sort(events: int, folder: Path, memory: str, threads: int) -> int:
    """The bare sort: ORDER BY user, time into another Parquet file."""
    import duckdb

    con = duckdb.connect()
    con.execute(f"SET memory_limit = '{memory}'; SET threads = {threads}; SET temp_directory = '{folder / 'spill'}'")
    con.execute(f"COPY (FROM '{folder / 'log.parquet'}' ORDER BY \"user\", time) TO '{folder / 'sorted.parquet'}'")
    (folder / "sorted.parquet").unlink()
    return events


def config(folder: Path, memory: str, threads: int) -> Any:
    """One category, one number, one binary task at three cuts."""
    from supermoe.config import RunConfig

    label = {"window": "28d", "sql": "count(*) > 2", "empty": False}
    return RunConfig.model_validate(
        {
            "run": folder / "run",
            "data": {
                "source": {"type": "files", "events": str(folder / "log.parquet")},
                "fields": {"item": "category", "price": "number"},
                "splits": {"type": "time", "train": ["2021-09-01"], "valid": "2021-10-01", "test": "2021-11-01"},
                "memory_limit": memory,
                "threads": threads,
            },
            "features": {},
            "tasks": {"active": {"type": "binary", "label": label}},
        }
    )


def prepare(events: int, folder: Path, memory: str, threads: int) -> int:
    """Our preparation of the same file, all checks and the audit included."""
    from supermoe.data.prepare import prepare as run

    with contextlib.redirect_stdout(io.StringIO()):
        store = run(config(folder, memory, threads))
    assert len(store.time) == events
    return events


def batches(folder: Path, memory: str, threads: int) -> int:
    """A hundred training batches out of the store; returns the number of events in them."""
    from supermoe.data.batches import Batches
    from supermoe.data.store import Store

    store = Store.open(config(folder, memory, threads).store)
    loader = Batches(store, "train", max_events=200, tokens_per_batch=16384, shuffle=True)
    found = 0
    for _, batch in zip(range(100), loader.epoch(0), strict=False):
        found += batch.num_events
    return found


def child(args: argparse.Namespace) -> None:
    """Be the process of one step."""
    folder, settings = args.scratch, (args.memory, args.threads)
    steps: dict[str, Callable[[], float]] = {
        "generate": lambda: generate(args.events, folder),
        "sort": lambda: sort(args.events, folder, *settings),
        "prepare": lambda: prepare(args.events, folder, *settings),
        "batches": lambda: batches(folder, *settings),
    }
    current = harness.Round(args.child)
    current.done(steps[args.child]())


def step(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Run one step in a process of its own: its time includes the start of our part, not that of Python."""
    options = [f"--{key}={getattr(args, key)}" for key in ("events", "memory", "threads", "scratch")]
    command = [sys.executable, __file__, f"--child={name}", *options]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = json.loads(output.partition(harness.MARK)[2])
    print(f"{name}: {found['wall_s']:.1f} s, {found['peak_rss_mb']:.0f} MB", file=sys.stderr)
    return found


def megabytes(text: str) -> float:
    """DuckDB's size -> MB of 2**20 bytes."""
    for unit, factor in (("GB", 1e9), ("GIB", 2**30), ("MB", 1e6), ("MIB", 2**20)):
        if text.upper().endswith(unit):
            return float(text[: -len(unit)]) * factor / 2**20
    raise SystemExit(f"--memory {text}: expected a size such as 3GB")


def main() -> None:
    """Generate, then sort and prepare in turn, then read; write the row and say whether it holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=lambda text: int(float(text)), default=60_000_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--memory", default="3GB")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--scratch", type=Path, help="folder on a disk with 200 bytes per event to spare; default: temporary"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args)
    args.scratch = Path(tempfile.mkdtemp(prefix="supermoe-prepare-", dir=args.scratch))
    try:
        compare(args)
    finally:
        shutil.rmtree(args.scratch)


def compare(args: argparse.Namespace) -> None:
    """The measurement; exits with 1 where memory or time are over their bounds."""
    step("generate", args)
    rows: list[dict[str, Any]] = []
    for number in range(args.rounds):
        for name in ("sort", "prepare"):
            shutil.rmtree(args.scratch / "run", ignore_errors=True)
            rows.append({"step": name, "round": number, **step(name, args)})
    rows.append({"step": "batches", **step("batches", args)})
    ratio, cpu_ratio = (_median("prepare", rows, clock) / _median("sort", rows, clock) for clock in ("wall_s", "cpu_s"))
    peak = max(row["peak_rss_mb"] for row in rows if row["step"] == "prepare")
    limit = megabytes(args.memory) + HEADROOM
    store = sum(row["units"] for row in rows if row["step"] == "batches")
    settings = {"events": args.events, "memory": args.memory, "threads": args.threads}
    found = {"ratio": ratio, "cpu_ratio": cpu_ratio, "peak_limit_mb": limit, "load": os.getloadavg()[1]}
    path = harness.write("prepare", rows, **settings, **found)
    print(f"time: {ratio:.2f} x the bare sort (at most {SLOWDOWN}), {cpu_ratio:.2f} x its CPU time; {path}")
    print(f"peak RSS {peak:.0f} MB (at most {limit:.0f})")
    print(f"batches: {store:,.0f} events read with {rows[-1]['peak_rss_mb']:.0f} MB")
    if ratio > SLOWDOWN or peak > limit:
        raise SystemExit(1)


def _median(step: str, rows: list[dict[str, Any]], clock: str) -> float:
    return statistics.median(row[clock] for row in rows if row["step"] == step)


if __name__ == "__main__":
    main()
