"""The README's main job as a stranger runs it: how long it takes, how much memory, and the table that it ends with.

    python benchmarks/quickstart.py [a.b=c ...]

Writes benchmarks/results/quickstart.json. The log is prepared anew; installing is not timed.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness

CONFIG = "configs/quickstart.yaml"


def main() -> None:
    """Run the command in a new folder and write the row."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "supermoe.train", "--config", CONFIG, f"run={run}", *sys.argv[1:]]
        started = time.perf_counter()
        subprocess.run(command, check=True)
        minutes = (time.perf_counter() - started) / 60
        report = json.loads((run / "report.json").read_text())
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    row = {
        "minutes": minutes,
        "cpu_minutes": (used.ru_utime + used.ru_stime) / 60,
        "peak_rss_mb": used.ru_maxrss / 1024,
        "tasks": report["tasks"],
    }
    print(harness.write("quickstart", [row], config=CONFIG))


if __name__ == "__main__":
    main()
