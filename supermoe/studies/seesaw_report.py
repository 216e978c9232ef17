"""The report of a seesaw study for people: seesaw.md, its plots, and the table that ends the command."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

from supermoe.data.disk import publish_text
from supermoe.studies.seesaw_runs import ALONE

Rows = list[list[str]]


def write_seesaw_report(out: Path, result: dict[str, Any]) -> None:
    """Write seesaw.md and, with the extra `report`, plots under `<out>/plots`."""
    images = _draw(out, result)
    parts = [
        f"# Who pays for whom: {result['config']}",
        _introduction(result),
        "## Methods",
        markdown(method_rows(result)),
        "A loser is a task whose 95 % interval of the gain over alone lies below zero. `behind` is the mean gain less "
        "that of the method with the highest, with the interval of this difference.",
        "## Metric by task",
        markdown(metric_rows(result)),
        "## Gain over alone by task",
        markdown(gain_rows(result)),
    ]
    if any("optimal" in row for row in result["tasks"].values()):
        parts += ["## Share of the best possible gain over the prior", markdown(optimal_rows(result))]
    parts += ["## Cosines of the tasks' gradients at the user vector", _cosines(result)]
    parts += ["## Share of each expert", _experts(result)]
    if images:
        parts += ["## Plots", "\n\n".join(f"![{image.stem}]({image.relative_to(out).as_posix()})" for image in images)]
    publish_text(out / "seesaw.md", "\n\n".join(parts) + "\n")


def _introduction(result: dict[str, Any]) -> str:
    """What was done, in words."""
    seeds = ", ".join(map(str, result["seeds"]))
    lines = [
        f"- Measured on the split `{result['split']}`; weights were selected on `{result['selected_on']}`, those of a "
        f"task alone by that task, those of all tasks together by the mean of their gains over the prior.",
        f"- Means over the seeds {seeds}. Intervals: users resampled, the same in all trainings; what another seed "
        f"would change is not in them.",
        f"- `{result['own']}` is what the config itself asks for.",
    ]
    lines += [f"- `{name}`: {' '.join(overrides)}" for name, overrides in result["variants"].items()]
    undefined = [task for task, row in result["tasks"].items() if not _finite(row["alone"]["mean"])]
    lines += [f"- `{task}` has no metric on this split and is not counted." for task in undefined]
    return "\n".join(lines)


# --- tables -----------------------------------------------------------------------------------------------------------


def method_rows(result: dict[str, Any]) -> Rows:
    """One row per method, best mean gain first."""
    first, *_ = order = _best_first(result)
    rows = [["method", "losers", "mean gain", "95 %", "behind", "mean rank", "ms a step"]]
    for name in order:
        row, behind = result["methods"][name], "-"
        if name != first:
            difference = result["differences"][name][first]
            behind = f"{difference['mean']:+.4f} {_interval(difference['interval'])}"
        losers = f"{len(row['losers'])}" + (f" ({', '.join(row['losers'])})" if row["losers"] else "")
        numbers = [f"{row['mean_gain']:+.4f}", _interval(row["interval"]), behind, f"{row['mean_rank']:.2f}"]
        rows.append([name, losers, *numbers, f"{1000 * row['seconds_per_step']:.0f}"])
    return rows


def metric_rows(result: dict[str, Any]) -> Rows:
    """A column per task: its metric by the prior, by boosting where it was asked for, alone and under each method."""
    boosted = ["boosting"] if any("boosting" in row for row in result["tasks"].values()) else []
    order = _best_first(result)
    columns = [["", "users", "metric", "prior", *boosted, ALONE, *order]]
    for task, row in result["tasks"].items():
        values = [row["prior"], *(row.get(key) for key in boosted), row[ALONE]["mean"]]
        values += [row["methods"][name]["mean"] for name in order]
        columns.append([task, f"{row['users']:,}", row["metric"], *map(_number, values)])
    return _turned(columns)


def gain_rows(result: dict[str, Any]) -> Rows:
    """A column per task, a row per method: gain over alone with its interval; losers are marked."""
    order = _best_first(result)
    columns = [["method", *order]]
    for task, row in result["tasks"].items():
        cells = []
        for found in (row["methods"][name] for name in order):
            text = f"{_number(found['gain'], '+.4f')} {_interval(found['interval'])}"
            cells.append(f"**{text}**" if found["loses"] else text)
        columns.append([task, *cells])
    return _turned(columns)


def optimal_rows(result: dict[str, Any]) -> Rows:
    """A column per task with known best scores: what share of their gain over the prior was reached."""
    order = _best_first(result)
    columns = [["", "best possible", ALONE, *order]]
    for task, row in result["tasks"].items():
        if "optimal" in row:
            span = row["optimal"] - row["prior"]
            values = [row[ALONE]["mean"], *(row["methods"][name]["mean"] for name in order)]
            shares = [f"{(value - row['prior']) / span:.1%}" for value in values]
            columns.append([task, _number(row["optimal"]), *shares])
    return _turned(columns)


def _best_first(result: dict[str, Any]) -> list[str]:
    """The methods by their mean gain."""
    return sorted(result["methods"], key=lambda name: -result["methods"][name]["mean_gain"])


def _turned(columns: Rows) -> Rows:
    """Columns as rows."""
    return [list(row) for row in zip(*columns, strict=True)]


def markdown(rows: Rows) -> str:
    """A Markdown table under its first row."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def text_table(rows: Rows) -> str:
    """A table for a terminal, in columns of equal width."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _cosines(result: dict[str, Any]) -> str:
    """The config's own method: every pair of tasks."""
    found = result["methods"][result["own"]]["gradients"]
    rows = [["", *found["tasks"]]]
    for task, cosines in zip(found["tasks"], found["cosine"], strict=True):
        rows.append([task, *("-" if value is None else f"{value:+.2f}" for value in cosines)])
    return f"Under `{result['own']}`, at its best weights; below zero two tasks pull apart.\n\n{markdown(rows)}"


def _experts(result: dict[str, Any]) -> str:
    """The config's own method: which experts each task's question is sent to."""
    tables = []
    for layer, by_task in result["methods"][result["own"]]["experts"].items():
        if by_task:
            num_experts = len(next(iter(by_task.values())))
            rows = [[layer, *(f"expert {number}" for number in range(num_experts))]]
            rows += [[task, *(f"{share:.0%}" for share in shares)] for task, shares in by_task.items()]
            tables.append(markdown(rows))
    return "\n\n".join(tables) or "There is no mixture of experts that tasks share."


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _number(value: float | None, form: str = ".4f") -> str:
    return format(value, form) if value is not None and math.isfinite(value) else "-"


def _interval(bounds: Any) -> str:
    return f"[{_number(bounds[0], '+.4f')}, {_number(bounds[1], '+.4f')}]"


def _draw(out: Path, result: dict[str, Any]) -> list[Path]:
    try:
        from supermoe.studies.seesaw_plots import draw
    except ImportError:
        warnings.warn("no plots: they need the extra, pip install 'supermoe[report]'", stacklevel=3)
        return []
    return draw(out / "plots", result)
