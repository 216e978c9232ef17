"""Training and embedding speed on MovieLens-1M next item, one core, full softmax; contenders interleaved in one run.

    python benchmarks/train_step.py --movielens data/ml-1m [--rectools-python .venv-rectools/bin/python]

Width 64, 2 layers, 1 head, inner width 64, at most 200 events, 128 users a batch. The contenders: supermoe as
`benchmarks/movielens.yaml` configures it, SASRec in plain padded PyTorch, and RecTools' SASRec where an environment of
`rectools[torch]` is given. Counted are real tokens, events whose next event is predicted, never padding. Writes
benchmarks/results/train_step.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import harness

CONTENDERS = Path(__file__).parent / "next_item"
UNITS = {"train": "real tokens", "embed": "users", "load": "events"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--movielens", type=Path, required=True, help="folder with ratings.dat, users.dat and movies.dat"
    )
    parser.add_argument("--rectools-python", type=Path, help="Python of an environment with rectools[torch]")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    folder = str(arguments.movielens)
    rectools = str(arguments.rectools_python or "--rectools-python was not given")
    with tempfile.TemporaryDirectory() as run:
        commands = {
            "supermoe": [sys.executable, f"{CONTENDERS}/ours.py", f"data.source.path={folder}", f"run={run}"],
            "padded SASRec": [sys.executable, f"{CONTENDERS}/padded_sasrec.py", folder],
            "RecTools SASRec": [rectools, f"{CONTENDERS}/rectools_sasrec.py", folder],
        }
        rows = harness.compare(commands, list(UNITS), arguments.rounds)
    for row in rows:
        if "skipped" in row:
            print(f"{row['contender']:16s} skipped: {row['skipped']}")
            continue
        print(
            f"{row['contender']:16s} {row['per_cpu_second']:12,.0f} {UNITS[row['measure']]}/s  "
            f"supermoe is {row['ratio']:.2f}x  peak {row['peak_rss_mb']:,.0f} MB"
        )
    print(f"-> {harness.write('train_step', rows, threads=1, rounds=arguments.rounds)}")


if __name__ == "__main__":
    main()
