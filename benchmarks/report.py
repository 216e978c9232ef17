"""The tables of README and docs, from the rows in benchmarks/results; `--check` tells whether they are up to date."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_layer import summary

from supermoe.studies.seesaw_report import gain_rows, method_rows, metric_rows, optimal_rows

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs" / "seesaw.md", ROOT / "benchmarks" / "README.md"]


def complete_journey(result: dict[str, Any]) -> list[list[str]]:
    """Test metric by task, beside the prior."""
    lines = [["task", "metric", "supermoe", "95 %", "prior"]]
    for name, task in result["rows"][0]["tasks"].items():
        width = f"+-{task['half_width']:.3f}" if "half_width" in task else ""
        lines.append([name, task["metric"], f"{task['mean']:.3f}", width, f"{task['prior']:.3f}"])
    return lines


def quickstart(result: dict[str, Any]) -> list[list[str]]:
    """Test metric by task, beside prior and boosting."""
    lines = [["task", "examples", "metric", "supermoe", "prior", "boosting"]]
    for name, task in result["rows"][0]["tasks"].items():
        main = task["main_metric"]
        values = [f"{task[which][main]:.3f}" for which in ("metrics", "prior", "boosting")]
        lines.append([name, str(task["examples"]), main, *values])
    return lines


def train_step(result: dict[str, Any]) -> list[list[str]]:
    """Rate and memory of every contender and measure, and how many times faster ours is."""
    lines = [["contender", "measure", "per CPU second", "supermoe is", "peak MB"]]
    for row in result["rows"]:
        rate, ratio, memory = (row[key] for key in ("per_cpu_second", "ratio", "peak_rss_mb"))
        lines.append([row["contender"], row["measure"], f"{rate:,.0f}", f"{ratio:.2f}x", f"{memory:,.0f}"])
    return lines


def moe_layer(result: dict[str, Any]) -> list[list[str]]:
    """Time and memory over those of a dense feed-forward of equal active FLOPs, by groups of shapes."""
    lines = [["dtype", "what", "rows per expert", "shapes", "time over dense", "best", "worst", "memory over dense"]]
    for line in summary(result["rows"]):
        numbers = [f"{line[key]:.2f}" for key in ("mean_ratio", "best", "worst", "memory")]
        lines.append([line["dtype"], line["contender"], line["shapes"], str(line["count"]), *numbers])
    return lines


def attention(result: dict[str, Any]) -> list[list[str]]:
    """Events per CPU second, packed and padded, and how many times faster packed is."""
    lines = [["lengths of", "measure", "padded is empty to", "packed, events/s", "padded, events/s", "packed is"]]
    for packed, padded in zip(result["rows"][::2], result["rows"][1::2], strict=True):
        rates = [f"{row['tokens_per_cpu_second']:,.0f}" for row in (packed, padded)]
        empty = f"{1 - packed['real_share']:.0%}"
        lines.append([packed["data"], packed["measure"], empty, *rates, f"{padded['ratio']:.2f}x"])
    return lines


def embeddings(result: dict[str, Any]) -> list[list[str]]:
    """Test metric of linear models on each contender's inputs, by task held out."""
    contenders = list(result["rows"][0]["values"])
    lines = [["task held out", *contenders]]
    return lines + [[row["task"], *(f"{row[which]:.3f}" for which in contenders)] for row in result["rows"]]


TABLES: dict[str, Callable[[dict[str, Any]], list[list[str]]]] = {
    "quickstart": quickstart,
    "complete_journey": complete_journey,
    "train_step": train_step,
    "moe_layer": moe_layer,
    "attention": attention,
    "embeddings": embeddings,
}
# of a seesaw study, named seesaw_<study>__<part>
SEESAW = {"methods": method_rows, "metrics": metric_rows, "gains": gain_rows, "optimal": optimal_rows}


def render(name: str) -> str:
    """The table in Markdown: of benchmarks/results/<name>.json, or a part of a seesaw study's that was carried out."""
    file, _, part = name.partition("__")
    path = ROOT / "benchmarks" / "results" / f"{file}.json"
    if part and not path.exists():
        return f"*No row yet in `benchmarks/results/{path.name}`.*"
    result = json.loads(path.read_text(encoding="utf-8"))
    lines = SEESAW[part](result["rows"][0]) if part else TABLES[name](result)
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]])


def filled(text: str) -> str:
    """A page with every table between `<!-- table:NAME -->` and `<!-- end -->` made anew."""
    pattern = re.compile(r"(<!-- table:(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda match: f"{match[1]}{render(match[2])}\n{match[3]}", text)


def main() -> None:
    """Rewrite the tables, or with --check exit 1 where they differ from the rows."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        new = filled(text)
        if "--check" not in sys.argv[1:]:
            page.write_text(new, encoding="utf-8")
        elif new != text:
            raise SystemExit(f"the tables of {page.name} differ from benchmarks/results: run benchmarks/report.py")


if __name__ == "__main__":
    main()
