"""Predictions of an evaluation as Parquet, one file per task, for the examples that have a label."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from supermoe.data.batch import SetLabels, take_labels
from supermoe.data.disk import publishing
from supermoe.data.schema import FIRST_ID
from supermoe.data.store import Store
from supermoe.objectives.task import Labels, Scores, Task, asked
from supermoe.training.build import id_values
from supermoe.training.evaluation import Evaluation


def write_predictions(folder: Path, store: Store, tasks: dict[str, Task], evaluation: Evaluation) -> Path:
    """Write `<folder>/<split>/<task>.parquet` and return `<folder>/<split>`.

    Columns: user_id (the user's own type), cut, target and score; for several classes score is a list in the order of
    the file's metadata entry `classes`; for rankings there are `rank`, `top_k` (values of the field) and `scores`
    instead.
    """
    out = folder / evaluation.split
    for name, task in tasks.items():
        with publishing(out / f"{name}.parquet") as beside:
            pq.write_table(prediction_table(store, task, evaluation), beside)
    return out


def prediction_table(store: Store, task: Task, evaluation: Evaluation) -> pa.Table:
    """One row per labelled example, in the store's order."""
    labels, scores = evaluation.labels[task.name], evaluation.scores[task.name]
    index = torch.nonzero(asked(labels))[:, 0]
    rows = evaluation.example_n[index.numpy()]
    values = class_values(store, task)
    table = store.who_and_when(rows).append_column("target", _targets(take_labels(labels, index), values))
    for name, column in _scores({key: array[index.numpy()] for key, array in scores.items()}, values).items():
        table = table.append_column(name, column)
    if values is None or "score" not in scores:
        return table
    return table.replace_schema_metadata({"classes": json.dumps(values.to_pylist(), default=str)})


def class_values(store: Store, task: Task) -> pa.Array | None:
    """What the classes of a label stand for, in order; None for numbers."""
    if task.label.kind == "number":
        return None
    return pa.array(task.label.classes) if task.label.field is None else id_values(store, task.label.field)


def _targets(labels: Labels, values: pa.Array | None) -> pa.Array:
    if isinstance(labels, SetLabels):
        assert values is not None
        return _value_lists(labels.offsets.numpy(), labels.ids.numpy(), values)
    return pa.array(labels.numpy()) if values is None else values.take(pa.array(labels.numpy()))


def _scores(scores: Scores, values: pa.Array | None) -> dict[str, pa.Array]:
    if "top_k" not in scores:
        score = scores["score"]
        return {"score": pa.array(score) if score.ndim == 1 else _float_lists(score, np.ones(score.shape, bool))}
    assert values is not None
    present = scores["top_k"] >= FIRST_ID
    offsets = np.concatenate([[0], np.cumsum(present.sum(axis=1))])
    return {
        "rank": pa.array(scores["rank"]),
        "top_k": _value_lists(offsets, scores["top_k"][present], values),
        "scores": _float_lists(scores["scores"], present),
    }


def _value_lists(offsets: np.ndarray, ids: np.ndarray, values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values.take(pa.array(ids)))


def _float_lists(scores: np.ndarray, present: np.ndarray) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(present.sum(axis=1))])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(scores[present], pa.float32()))
