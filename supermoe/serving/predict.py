"""Every task's scores for a whole population, as one Parquet table per task with a manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from supermoe.config import RunConfig
from supermoe.data.disk import read_table
from supermoe.data.schema import FIRST_ID
from supermoe.data.store import Store
from supermoe.objectives.tasks import Task
from supermoe.serving.artifact import AGAIN, Artifact
from supermoe.serving.inference import instants, outputs, user_ids
from supermoe.serving.population import Request, serving_store
from supermoe.serving.publication import Publication, schema_of
from supermoe.typed_yaml import UserError, build, format_instant, nearest

Columns = dict[str, np.ndarray]


def predict(artifact: Artifact, request: Request, out: Path, names: list[str] | None = None) -> Path:
    """Write <task>.parquet (user_id, cut, score) for the named tasks (default: all) and return the manifest's path.

    Rows are the users whom the task asks, ordered by id within a shard. `score` is a number, or a list in the order of
    the manifest's `classes`; tasks that rank hold `top_k`, the field's own values, and `scores` instead.
    """
    tasks = load_tasks(artifact, names)
    identity = {
        "kind": "predictions",
        "model_id": artifact.model_id,
        "as_of": format_instant(request.as_of),
        "tasks": list(tasks),
    }
    publication = Publication(out, identity, request.shard, request.shards)
    described = {}
    conditions = {name: task.config.eligible for name, task in tasks.items() if task.config.eligible is not None}
    with serving_store(artifact, request, out, conditions=conditions) as store:
        for name, columns in score(artifact, tasks, store).items():
            table = task_table(artifact, tasks[name], store, columns)
            if name in conditions:
                table = table.filter(pa.array(store.array(f"examples/labels/{name}.asked")))
            described[name] = {"type": tasks[name].config.type, "schema": schema_of(table)}
            if "score" in columns and columns["score"].ndim == 2:
                described[name]["classes"] = class_names(artifact, tasks[name])
            publication.write(publication.name(name), table, task=name)
    return publication.finish(tables=described)


def load_tasks(artifact: Artifact, names: list[str] | None = None) -> dict[str, Task]:
    """The model's tasks, ready to decode; an unknown name is a `UserError` with the nearest one."""
    config: RunConfig = artifact.run_config()
    for name in names or []:
        if name not in config.tasks:
            raise UserError(f"--tasks: this model has no task '{name}', {nearest(name, config.tasks)}")
    tasks = {}
    for name in names or config.tasks:
        label = artifact.schema.labels[name]
        tasks[name] = build(
            "supermoe.objectives.tasks", config.tasks[name], name=name, label=label, schema=artifact.schema
        )
        tasks[name].load_state(artifact.states[name])
    return tasks


def score(artifact: Artifact, tasks: dict[str, Task], store: Store) -> dict[str, Columns]:
    """Task -> what its `scores` hold, as arrays in the order of the store's examples; one pass over the histories."""
    num_examples = len(store.examples.cut)
    found: dict[str, Columns] = {name: {} for name in tasks}
    for batch, output in outputs(artifact, store):
        rows = batch.example_B.numpy()
        for name, task in tasks.items():
            for key, values in task.scores(artifact.model.heads[name], output, batch).items():
                array = values.numpy()
                whole = found[name].setdefault(key, np.zeros((num_examples, *array.shape[1:]), array.dtype))
                whole[rows] = array
    return found


def task_table(artifact: Artifact, task: Task, store: Store, columns: Columns) -> pa.Table:
    """Scores as a table, one row per example."""
    arrays: dict[str, Any] = {"user_id": user_ids(store), "cut": instants(store.examples.cut)}
    if "top_k" in columns:
        present = columns["top_k"] >= FIRST_ID
        offsets = pa.array(np.concatenate([[0], np.cumsum(present.sum(axis=1))]), pa.int32())
        ids = pa.array(columns["top_k"][present] - FIRST_ID)
        assert task.label.field is not None
        arrays["top_k"] = pa.ListArray.from_arrays(offsets, field_values(artifact, task.label.field).take(ids))
        arrays["scores"] = pa.ListArray.from_arrays(offsets, pa.array(columns["scores"][present], pa.float32()))
    elif columns["score"].ndim == 2:
        flat = pa.array(columns["score"].reshape(-1), pa.float32())
        arrays["score"] = pa.FixedSizeListArray.from_arrays(flat, columns["score"].shape[1])
    else:
        arrays["score"] = pa.array(columns["score"], pa.float32())
    return pa.table(arrays)


def field_values(artifact: Artifact, field: str) -> pa.Array:
    """The values of a field's vocabulary; row i has id i + 2. A hashed field has none: the buckets' numbers."""
    hash_size = artifact.schema.fields[field].hash_size
    if hash_size is not None:
        return pa.array(np.arange(hash_size))
    return read_table(artifact.vocab / f"{field}.parquet", AGAIN, ["value"])["value"].combine_chunks()


def class_names(artifact: Artifact, task: Task) -> list[Any]:
    """Names of a label's classes in the order of its scores."""
    if task.label.field is None:
        assert task.label.classes is not None
        return task.label.classes
    return ["padding", "unknown", *field_values(artifact, task.label.field).to_pylist()]
