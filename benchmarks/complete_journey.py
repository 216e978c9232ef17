"""Quality on The Complete Journey: one run per seed, each holding out another fifth of the households' attributes.

    python benchmarks/complete_journey.py [--seeds 5] [--jobs 1] [a.b=c ...]

Writes benchmarks/results/complete_journey.json: per task the test metric of every seed, their mean, and the half-width
of the 95 % interval of the mean (Student's t; over seeds, for attributes over seeds and folds at once).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import harness

CONFIG = "configs/complete_journey.yaml"
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t quantile by number of seeds


def train(seed: int, folder: Path, overrides: list[str]) -> dict:
    """One whole run in a process of its own -> its report.json."""
    run = folder / f"seed{seed}"
    settings = [f"run={run}", f"seed={seed}", f"data.splits.users.fold={seed % 5}", *overrides]
    subprocess.run([sys.executable, "-m", "supermoe.train", "--config", CONFIG, *settings], check=True)
    return json.loads((run / "report.json").read_text())


def summarise(reports: list[dict]) -> dict[str, dict]:
    """Per task: the metric's name, values by seed, mean and 95 % half-width, and the means of prior and boosting."""
    tasks = {}
    for name, first in reports[0]["tasks"].items():
        main = first["main_metric"]
        values = [report["tasks"][name]["metrics"][main] for report in reports]
        tasks[name] = {"metric": main, "values": values, "mean": statistics.fmean(values)}
        if len(values) > 1:
            tasks[name]["half_width"] = T_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5
        for other in ("prior", "boosting"):
            found = [rival[main] for report in reports if (rival := report["tasks"][name][other])]
            tasks[name][other] = statistics.fmean(found) if found else None
    return tasks


def main() -> None:
    """Run all seeds one after the other and write the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, choices=sorted(T_95))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; give each training.threads=1")
    parser.add_argument("--folder", type=Path, default=Path("runs/complete_journey"))
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    with ThreadPoolExecutor(args.jobs) as pool:
        reports = list(pool.map(partial(train, folder=args.folder, overrides=args.overrides), range(args.seeds)))
    command = " ".join(["python", "benchmarks/complete_journey.py", f"--seeds {args.seeds}", *args.overrides])
    row = {
        "command": command,
        "config": CONFIG,
        "seeds": args.seeds,
        "training_minutes": [report["training_minutes"] for report in reports],  # of the first of two trainings
        "tasks": summarise(reports),
    }
    print(harness.write("complete_journey", [row]))


if __name__ == "__main__":
    main()
