"""The tables of the README, made from the rows in benchmarks/results; `--check` tells whether they are up to date."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def complete_journey(result: dict[str, Any]) -> list[list[str]]:
    """Test metric by task, beside the prior."""
    lines = [["task", "metric", "supermoe", "95 %", "prior"]]
    for name, task in result["rows"][0]["tasks"].items():
        width = f"+-{task['half_width']:.3f}" if "half_width" in task else ""
        lines.append([name, task["metric"], f"{task['mean']:.3f}", width, f"{task['prior']:.3f}"])
    return lines


def train_step(result: dict[str, Any]) -> list[list[str]]:
    """Rate and memory of every contender and measure, and how many times faster ours is."""
    lines = [["contender", "measure", "per CPU second", "supermoe is", "peak MB"]]
    for row in result["rows"]:
        rate, ratio, memory = (row[key] for key in ("per_cpu_second", "ratio", "peak_rss_mb"))
        lines.append([row["contender"], row["measure"], f"{rate:,.0f}", f"{ratio:.2f}x", f"{memory:,.0f}"])
    return lines


TABLES: dict[str, Callable[[dict[str, Any]], list[list[str]]]] = {
    "complete_journey": complete_journey,
    "train_step": train_step,
}


def render(name: str) -> str:
    """The table of benchmarks/results/<name>.json in Markdown."""
    result = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    lines = TABLES[name](result)
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]])


def filled(text: str) -> str:
    """The README with every table between `<!-- table:NAME -->` and `<!-- end -->` made anew."""
    pattern = re.compile(r"(<!-- table:(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda match: f"{match[1]}{render(match[2])}\n{match[3]}", text)


def main() -> None:
    """Rewrite the README's tables, or with --check exit 1 where they differ from the rows."""
    text = README.read_text(encoding="utf-8")
    if "--check" in sys.argv[1:]:
        raise SystemExit(
            0 if filled(text) == text else "README tables differ from benchmarks/results: run benchmarks/report.py"
        )
    README.write_text(filled(text), encoding="utf-8")


if __name__ == "__main__":
    main()
