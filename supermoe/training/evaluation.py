"""What a model says about one split, and what that is worth: predictions, metrics, the prior's, router health."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from supermoe.data.batches import Batches
from supermoe.objectives.task import Labels, Scores, Task, concat_labels, gain, take_labels
from supermoe.training.router_health import RouterHealth


@dataclass(frozen=True)
class Evaluation:
    """Predictions on one split, in the order of the store's examples, and what they are worth, by task."""

    split: str
    example_n: NDArray[np.int64]  # rows among the store's examples
    scores: dict[str, Scores]
    labels: dict[str, Labels]
    metrics: dict[str, dict[str, float]]
    prior: dict[str, dict[str, float]]  # the same metrics of the constant answer
    gains: dict[str, float]  # of the main metric over the prior's; NaN where it is not defined
    undefined: dict[str, str]  # why, for the tasks whose main metric is not defined
    router: dict[str, Any]  # health of the MoE layers, see `router_health`

    @property
    def selection(self) -> float:
        """Mean relative gain over the prior across all tasks that have a metric; NaN if none has."""
        values = [value for value in self.gains.values() if not np.isnan(value)]
        return float(np.mean(values)) if values else float("nan")


def evaluate(
    model: torch.nn.Module,
    tasks: dict[str, Task],
    batches: Batches,
    split: str,
    event_names: list[str] | None = None,
    autocast: bool = False,
) -> Evaluation:
    """Predict every example of `batches` once, in evaluation mode, and measure.

    `event_names` name the ids of the field `event`; `autocast` runs the model in bfloat16. The model's mode is
    restored; no random number is drawn.
    """
    health = RouterHealth(event_names or [])
    example_n, scores, labels = _predict(model, tasks, batches, health, autocast)
    found: dict[str, dict[str, Any]] = {"metrics": {}, "prior": {}, "gains": {}, "undefined": {}}
    for name, task in tasks.items():
        found["metrics"][name] = task.metrics(scores[name], labels[name])
        found["prior"][name] = task.metrics(task.prior_scores(len(example_n)), labels[name])
        main = task.main_metric
        found["gains"][name] = gain(found["metrics"][name][main], found["prior"][name][main])
        if np.isnan(found["gains"][name]):
            found["undefined"][name] = task.undefined(labels[name]) or f"{main} has no value on these predictions"
    return Evaluation(split, example_n, scores, labels, router=health.summary(), **found)


@torch.no_grad()
def _predict(
    model: Any, tasks: dict[str, Task], batches: Batches, health: RouterHealth, autocast: bool
) -> tuple[NDArray[np.int64], dict[str, Scores], dict[str, Labels]]:
    device = next(model.parameters()).device
    rows: list[NDArray] = []
    scores: dict[str, dict[str, list[NDArray]]] = {name: {} for name in tasks}
    labels: dict[str, list[Labels]] = {name: [] for name in tasks}
    was_training = model.training
    model.eval()
    for batch in tqdm(batches.epoch(0), total=len(batches), desc="evaluate", unit=" batches", delay=2, leave=False):
        on_device = batch.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            output = model(on_device)
        rows.append(batch.example_B.numpy())
        health.add(output, on_device)
        for name, task in tasks.items():
            for key, values in task.scores(model.heads[name], output, on_device).items():
                scores[name].setdefault(key, []).append(values.cpu().numpy())
            labels[name].append(batch.labels[name])
    model.train(was_training)
    example_n = np.concatenate(rows)
    order = np.argsort(example_n)
    index = torch.from_numpy(order)
    return (
        example_n[order],
        {name: {key: np.concatenate(parts)[order] for key, parts in found.items()} for name, found in scores.items()},
        {name: take_labels(concat_labels(parts), index) for name, parts in labels.items()},
    )
