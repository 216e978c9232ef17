"""What a run found, for people and for programs: report.json, report.md, plots, and the table that ends the command."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

from supermoe.data.disk import publish_text
from supermoe.objectives.task import Task, asked
from supermoe.training.evaluation import Evaluation
from supermoe.training.metrics import finite, read_metrics

HEADER = ("task", "examples", "metric", "value", "prior", "boosting", "gain")


def write_report(
    run: Path,
    tasks: dict[str, Task],
    evaluation: Evaluation,
    boosting: dict[str, dict[str, float]],
    facts: dict[str, Any],
    plots: bool = True,
) -> str:
    """Write report.json, report.md and, with the extra `report`, plots under `<run>/plots`; return the table as text.

    Args:
        boosting: metrics of the gradient-boosted baseline by task; may be empty.
        facts: what else the report tells, as plain data: name -> value.
    """
    rows = table_rows(tasks, evaluation, boosting)
    report = {
        "split": evaluation.split,
        "selection": evaluation.selection,
        "tasks": {
            name: {
                "examples": _num_examples(evaluation, name),
                "main_metric": task.main_metric,
                "metrics": evaluation.metrics[name],
                "prior": evaluation.prior[name],
                "boosting": boosting.get(name),
                "gain": evaluation.gains[name],
                "undefined": evaluation.undefined.get(name),
            }
            for name, task in tasks.items()
        },
        "router": evaluation.router,
        **facts,
    }
    publish_text(run / "report.json", json.dumps(finite(report), indent=2) + "\n")
    images = [image.relative_to(run) for image in _draw(run, tasks, evaluation)] if plots else []
    publish_text(run / "report.md", _markdown(rows, evaluation, facts, images))
    return text_table(rows)


def table_rows(
    tasks: dict[str, Task], evaluation: Evaluation, boosting: dict[str, dict[str, float]]
) -> list[tuple[str, ...]]:
    """One row of text per task, in the order of `HEADER`."""
    rows = []
    for name, task in tasks.items():
        main = task.main_metric
        numbers = (
            evaluation.metrics[name][main],
            evaluation.prior[name][main],
            boosting.get(name, {}).get(main),
            evaluation.gains[name],
        )
        rows.append((name, str(_num_examples(evaluation, name)), main, *map(_number, numbers)))
    return rows


def _num_examples(evaluation: Evaluation, task: str) -> int:
    """Those that have a label."""
    return int(asked(evaluation.labels[task]).sum())


def text_table(rows: list[tuple[str, ...]]) -> str:
    """Rows under `HEADER` in columns of equal width; words to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in (HEADER, *rows)) for i in range(len(HEADER))]
    words = {HEADER.index("task"), HEADER.index("metric")}
    lines = [
        "  ".join(cell.ljust(widths[i]) if i in words else cell.rjust(widths[i]) for i, cell in enumerate(row)).rstrip()
        for row in (HEADER, *rows)
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.4f}"


def _markdown(rows: list[tuple[str, ...]], evaluation: Evaluation, facts: dict[str, Any], images: list[Path]) -> str:
    parts = [
        f"# Report on the {evaluation.split} split",
        "\n".join(f"| {' | '.join(row)} |" for row in (HEADER, ("---",) * len(HEADER), *rows)),
        "`prior` is the metric of the best constant answer; `gain` is the share of the way from there to a perfect 1.",
    ]
    if evaluation.undefined:
        parts.append(
            "\n".join(f"- {name} has no {evaluation.split} metric: {why}" for name, why in evaluation.undefined.items())
        )
    if evaluation.router:
        parts += ["## Experts", _router_table(evaluation.router)]
    if facts:
        parts += ["## Facts", "\n".join(f"- {name}: {value}" for name, value in facts.items())]
    if images:
        parts += ["## Plots", "\n\n".join(f"![{image.stem}]({image.as_posix()})" for image in images)]
    return "\n\n".join(parts) + "\n"


def _router_table(router: dict[str, Any]) -> str:
    lines = ["| layer | load entropy | busiest / mean | dead experts |", "|---|---|---|---|"]
    lines += [f"| {name} | {r['entropy']:.3f} | {r['max_over_mean']:.2f} | {r['dead']} |" for name, r in router.items()]
    return "\n".join(lines)


def _draw(run: Path, tasks: dict[str, Task], evaluation: Evaluation) -> list[Path]:
    try:
        from supermoe.training.plots import draw
    except ImportError:
        warnings.warn("no plots: they need the extra, pip install 'supermoe[report]'", stacklevel=3)
        return []
    return draw(run / "plots", tasks, evaluation, read_metrics(run))
