"""The report's pictures: loss per task, load of the experts, calibration. Needs matplotlib."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from supermoe.objectives import measures
from supermoe.objectives.task import Task, asked
from supermoe.training.evaluation import Evaluation

matplotlib.rcParams["font.size"] = 8
SMOOTHING = 0.9  # of the curves of the loss


def draw(folder: Path, tasks: dict[str, Task], evaluation: Evaluation, rows: list[dict[str, Any]]) -> list[Path]:
    """Write the pictures that there is data for, as PNG, and return their paths. `rows` are those of metrics.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "loss": _losses([row for row in rows if row["kind"] == "train"]),
        "gain": _gains([row for row in rows if row["kind"] == "valid"]),
        "router_load": _router_load(evaluation.router),
        "calibration": _calibration(tasks, evaluation),
    }
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=120, bbox_inches="tight")
    return paths


def _losses(rows: list[dict[str, Any]]) -> Figure | None:
    """Training loss of every term over the steps, smoothed, on the scale of its prior."""
    if not rows:
        return None
    figure = Figure(figsize=(6, 3.5))
    axes = figure.subplots()
    for name in rows[0]["loss"]:
        steps, values, average = [], [], math.nan
        for row in rows:
            loss = row["loss"][name]
            if loss is not None:
                average = loss if math.isnan(average) else SMOOTHING * average + (1 - SMOOTHING) * loss
                steps.append(row["step"])
                values.append(average)
        axes.plot(steps, values, label=name, linewidth=1)
    axes.axhline(1.0, color="grey", linewidth=0.5)
    axes.set(xlabel="step", ylabel="training loss / loss of the prior")
    axes.legend(ncols=2, loc="upper right")
    return figure


def _gains(rows: list[dict[str, Any]]) -> Figure | None:
    """Gain over the prior of every task at each evaluation."""
    if not rows:
        return None
    figure = Figure(figsize=(6, 3.5))
    axes = figure.subplots()
    steps = [row["step"] for row in rows]
    for name in rows[0]["gain"]:
        values = [math.nan if row["gain"][name] is None else row["gain"][name] for row in rows]
        axes.plot(steps, values, label=name, linewidth=1, marker=".")
    axes.set(xlabel="step", ylabel="validation gain over the prior")
    axes.legend(ncols=2, loc="lower right")
    return figure


def _router_load(router: dict[str, Any]) -> Figure | None:
    """Share of each expert in the tokens of each question and event type, one panel per MoE layer."""
    if not router:
        return None
    num_rows = max(len(layer["by"]) for layer in router.values())
    figure = Figure(figsize=(4 * len(router), 1 + 0.25 * num_rows), layout="constrained")
    for axes, (name, layer) in zip(np.atleast_1d(figure.subplots(1, len(router))), router.items(), strict=True):
        image = axes.imshow(np.array(list(layer["by"].values())), aspect="auto", vmin=0, cmap="viridis")
        axes.set_yticks(range(len(layer["by"])), list(layer["by"]))
        axes.set(title=name, xlabel="expert")
        figure.colorbar(image, ax=axes)
    return figure


def _calibration(tasks: dict[str, Task], evaluation: Evaluation) -> Figure | None:
    """Observed against predicted share of yes for every binary task."""
    binary = [
        name
        for name, task in tasks.items()
        if "ece" in evaluation.metrics[name] and bool(asked(evaluation.labels[name]).any())
    ]
    if not binary:
        return None
    figure = Figure(figsize=(4, 4))
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.5)
    for name in binary:
        mask = asked(evaluation.labels[name]).numpy()
        target = np.asarray(evaluation.labels[name])[mask]
        predicted, observed, _ = measures.calibration(target, evaluation.scores[name]["score"][mask])
        axes.plot(predicted, observed, marker=".", linewidth=1, label=name)
    axes.set(xlabel="predicted", ylabel="observed", xlim=(0, 1), ylim=(0, 1))
    axes.legend(loc="upper left")
    return figure
