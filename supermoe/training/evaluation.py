"""What a model says about one split, and what that is worth: predictions, metrics, the prior's, router health."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from supermoe.data.batch import take_labels
from supermoe.data.batches import Batches
from supermoe.distributed.mesh import World
from supermoe.objectives.task import Labels, Scores, Task, concat_labels, gain
from supermoe.training.router_health import Counts, RouterHealth


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
    world: World | None = None,
    metrics_only: bool = False,
) -> Evaluation:
    """Predict every example of `batches` once, in evaluation mode, and measure.

    `metrics_only`: rankings of examples that have nothing to find may be left out, which are often most.
    `event_names` name the ids of the field `event`; `autocast` runs the model in bfloat16. The model's mode is
    restored; no random number is drawn. The ranks of a `world` predict what `batches` deals them and know all in the
    end.
    """
    world = world or World()
    health = RouterHealth(event_names or [])
    shares = world.gather(_predict(model, tasks, batches, health, autocast, metrics_only, not world.is_first))
    example_n, scores, labels = _put_together([part for share in shares for part in share])
    health.counts = _add_counts(world.gather(health.counts))
    found: dict[str, dict[str, Any]] = {"metrics": {}, "prior": {}, "gains": {}, "undefined": {}}
    for name, task in tasks.items():
        found["metrics"][name] = task.metrics(scores[name], labels[name])
        found["prior"][name] = task.metrics(task.prior_scores(len(example_n)), labels[name])
        main = task.main_metric
        found["gains"][name] = gain(found["metrics"][name][main], found["prior"][name][main])
        if np.isnan(found["gains"][name]):
            found["undefined"][name] = task.undefined(labels[name]) or f"{main} has no value on these predictions"
    return Evaluation(split, example_n, scores, labels, router=health.summary(), **found)


@dataclass(frozen=True)
class _Predicted:
    """What the model says about one batch, and its labels, by task."""

    example_B: NDArray[np.int64]
    scores: dict[str, Scores]
    labels: dict[str, Labels]


@torch.no_grad()
def _predict(
    model: Any,
    tasks: dict[str, Task],
    batches: Batches,
    health: RouterHealth,
    autocast: bool,
    metrics_only: bool,
    quiet: bool,
) -> list[_Predicted]:
    device = next(model.parameters()).device
    parts = []
    was_training = model.training
    model.eval()
    dealt = batches.epoch(0)
    for batch in tqdm(dealt, total=len(batches), desc="evaluate", unit=" batches", delay=2, leave=False, disable=quiet):
        on_device = batch.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            output = model(on_device)
        health.add(output, on_device)
        scores = {}
        for name, task in tasks.items():
            answer = task.scores_for_metrics if metrics_only else task.scores
            found = answer(model.heads[name], output, on_device)
            scores[name] = {key: values.cpu().numpy() for key, values in found.items()}
        parts.append(_Predicted(batch.example_B.numpy(), scores, {name: batch.labels[name] for name in tasks}))
    model.train(was_training)
    return parts


def _put_together(parts: list[_Predicted]) -> tuple[NDArray[np.int64], dict[str, Scores], dict[str, Labels]]:
    """All batches in the order of the store's examples."""
    example_n = np.concatenate([part.example_B for part in parts])
    order = np.argsort(example_n)
    index = torch.from_numpy(order)
    scores: dict[str, Scores] = {}
    labels: dict[str, Labels] = {}
    for name, found in parts[0].scores.items():
        scores[name] = {key: np.concatenate([part.scores[name][key] for part in parts])[order] for key in found}
        labels[name] = take_labels(concat_labels([part.labels[name] for part in parts]), index)
    return example_n[order], scores, labels


def _add_counts(shares: list[Counts]) -> Counts:
    """Tokens per expert over all ranks."""
    total: Counts = {}
    for share in shares:
        for key, counts_E in share.items():
            total[key] = total[key] + counts_E if key in total else counts_E
    return total
