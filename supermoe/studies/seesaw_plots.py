"""Pictures of a seesaw study: gains with intervals, weights over time, gradient cosines, experts. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

matplotlib.rcParams["font.size"] = 8


def draw(folder: Path, result: dict[str, Any]) -> list[Path]:
    """Write the pictures as PNG and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "gains": _gains(result),
        "weights": _weights(result["methods"]),
        "cosines": _cosines(result["methods"]),
        "experts": _experts(result["methods"]),
    }
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=120)
    return paths


def _gains(result: dict[str, Any]) -> Figure:
    """Gain over alone of every task, a marker with its interval per method."""
    tasks, methods = list(result["tasks"]), list(result["methods"])
    figure = Figure(figsize=(7, 1 + 0.15 * len(tasks) * (len(methods) + 1)), layout="constrained")
    axes = figure.subplots()
    for number, method in enumerate(methods):
        place = np.arange(len(tasks)) + 0.8 * (number + 0.5) / len(methods) - 0.4
        rows = [result["tasks"][task]["methods"][method] for task in tasks]
        gain = np.array([row["gain"] for row in rows], np.float64)
        low, high = np.array([row["interval"] for row in rows], np.float64).T
        width = np.maximum([gain - low, high - gain], 0)
        axes.errorbar(gain, place, xerr=width, fmt="o", markersize=3, linewidth=1, label=method)
    axes.axvline(0, color="grey", linewidth=0.5)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.invert_yaxis()
    axes.set(xlabel=f"gain over alone on {result['split']}, 95 % interval over users")
    figure.legend(loc="outside right upper")
    return figure


def _weights(methods: dict[str, Any]) -> Figure:
    """Weights of the losses over the steps, a panel per method that moves them."""
    moving = {name: row["weights"] for name, row in methods.items() if _moves(row["weights"]["weight"])}
    shown = moving or {name: row["weights"] for name, row in list(methods.items())[:1]}
    figure, panels = _panels(len(shown))
    for axes, (name, curve) in zip(panels, shown.items(), strict=True):
        for task in curve["weight"][0]:
            axes.plot(curve["step"], [weight[task] for weight in curve["weight"]], linewidth=1, label=task)
        axes.set(title=name, xlabel="step", ylabel="weight")
    panels[0].legend(loc="upper right")
    return figure


def _moves(weights: list[dict[str, float]]) -> bool:
    return any(row != weights[0] for row in weights)


def _cosines(methods: dict[str, Any]) -> Figure | None:
    """Cosines of the tasks' gradients at the user vector, a panel per method."""
    found = {name: row["gradients"] for name, row in methods.items() if row["gradients"]["tasks"]}
    if not found:
        return None
    figure, panels = _panels(len(found))
    for axes, (name, row) in zip(panels, found.items(), strict=True):
        image = axes.imshow(np.array(row["cosine"], np.float64), vmin=-1, vmax=1, cmap="RdBu")
        _label(axes, name, row["tasks"])
    figure.colorbar(image, ax=panels)
    return figure


def _experts(methods: dict[str, Any]) -> Figure | None:
    """Share of each expert in the question of each task, a panel per method, of its last MoE layer."""
    last = {name: list(row["experts"].values())[-1] for name, row in methods.items() if row["experts"]}
    found = {name: by_task for name, by_task in last.items() if by_task}
    if not found:
        return None
    figure, panels = _panels(len(found))
    for axes, (name, by_task) in zip(panels, found.items(), strict=True):
        image = axes.imshow(np.array(list(by_task.values())), vmin=0, vmax=1, aspect="auto", cmap="viridis")
        axes.set_yticks(range(len(by_task)), list(by_task))
        axes.set(title=name, xlabel="expert")
    figure.colorbar(image, ax=panels)
    return figure


def _label(axes: Any, title: str, tasks: list[str]) -> None:
    axes.set_title(title)
    axes.set_xticks(range(len(tasks)), tasks, rotation=90)
    axes.set_yticks(range(len(tasks)), tasks)


def _panels(number: int) -> tuple[Figure, list[Any]]:
    """Panels in rows of three; the axes of the first `number`."""
    columns = min(number, 3)
    rows = -(-number // columns)
    figure = Figure(figsize=(1 + 3 * columns, 3 * rows), layout="constrained")
    panels = list(np.atleast_1d(figure.subplots(rows, columns)).ravel())
    for axes in panels[number:]:
        axes.remove()
    return figure, panels[:number]
