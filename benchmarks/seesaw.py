"""Who pays for whom: a seesaw study, kept as a row.

    python benchmarks/seesaw.py NAME --config FILE [--seeds 3] [--methods a,b] [--jobs 1] [a.b=c ...]

Everything after NAME goes to supermoe.seesaw; what is trained already is used again. Writes
benchmarks/results/seesaw_NAME.json: the study's numbers without what happened inside the trainings.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import harness


def main() -> None:
    """Run the study and write the row."""
    if len(sys.argv) < 3 or sys.argv[1].startswith("-"):
        raise SystemExit(__doc__)
    name, *arguments = sys.argv[1:]
    out = Path("runs") / f"seesaw_{name}"
    subprocess.run([sys.executable, "-m", "supermoe.seesaw", *arguments, "--out", str(out)], check=True)
    result = json.loads((out / "seesaw.json").read_text(encoding="utf-8"))
    for method in result["methods"].values():
        del method["weights"], method["gradients"], method["experts"]
    result["overrides"] = [harness.public(word) for word in result["overrides"]]
    print(harness.write(f"seesaw_{name}", [result]))


if __name__ == "__main__":
    main()
