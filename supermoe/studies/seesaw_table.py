"""From the prediction files of a seesaw study to its table: metrics, gains over alone, intervals, losers, ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from supermoe.objectives.measures import ranking_by_row
from supermoe.studies.bootstrap import (
    interval,
    resamples,
    weighted_auc,
    weighted_macro_auc,
    weighted_mean,
    weighted_r2,
)
from supermoe.studies.seesaw_runs import ALONE
from supermoe.typed_yaml import UserError

NUM_RESAMPLES = 1000
Array = NDArray[Any]
Measure = Callable[[Array], Array]  # weight_Rn -> the metric under every resample [R]


@dataclass(frozen=True)
class Answers:
    """All predictions of one task: its metric, and prediction files by name (`alone`, methods) and seed."""

    metric: str
    tables: Mapping[str, list[pa.Table]]


def read_predictions(folder: Path, split: str, task: str) -> pa.Table:
    """The prediction file of one run; a `UserError` where it is missing."""
    path = folder / "predictions" / split / f"{task}.parquet"
    if not path.exists():
        raise UserError(f"{path} is missing; delete the folder {folder} and run the same command again")
    return pq.read_table(path)


def compare(answers: Mapping[str, Answers], num_resamples: int = NUM_RESAMPLES) -> dict[str, Any]:
    """The numbers of the report, as plain data: `tasks`, `methods` and `differences`.

    Every resample of the users counts for all tasks, methods and seeds alike; a metric under it is averaged over seeds
    before differences are taken. A task whose metric is not defined on these labels is listed and not counted.
    Raises:
        UserError: where the files of a task do not hold the same examples.
    """
    for task, answer in answers.items():
        check_pairs(task, answer)
    values = {
        task: {name: [metric_of(table, answer.metric) for table in tables] for name, tables in answer.tables.items()}
        for task, answer in answers.items()
    }
    defined = [task for task in answers if np.isfinite(list(values[task].values())).all()]
    if not defined:
        raise UserError("no task has a metric on this split: its labels are of one value; choose another --split")
    resampled = _resample({task: answers[task] for task in defined}, num_resamples)
    names = [name for name in answers[defined[0]].tables if name != ALONE]
    gains = {task: {name: resampled[task][name] - resampled[task][ALONE] for name in names} for task in defined}
    tasks = {task: _task_row(answers[task], values[task], gains.get(task)) for task in answers}
    mean_gain = {name: float(np.mean([tasks[task]["methods"][name]["gain"] for task in defined])) for name in names}
    mean_gain_R = {name: np.mean([gains[task][name] for task in defined], axis=0) for name in names}
    methods = {
        name: {
            "losers": [task for task in defined if tasks[task]["methods"][name]["loses"]],
            "mean_gain": mean_gain[name],
            "interval": interval(mean_gain_R[name]),
            "mean_rank": float(np.mean([_rank(values[task], name) for task in defined])),
        }
        for name in names
    }
    return {"tasks": tasks, "methods": methods, "differences": _differences(mean_gain, mean_gain_R)}


def _differences(mean_gain: Mapping[str, float], mean_gain_R: Mapping[str, Array]) -> dict[str, dict[str, Any]]:
    """Mean gain of every method less every other's, with its interval."""
    found: dict[str, dict[str, Any]] = {one: {} for one in mean_gain}
    for one, other in permutations(mean_gain, 2):
        width = interval(mean_gain_R[one] - mean_gain_R[other])
        found[one][other] = {"mean": mean_gain[one] - mean_gain[other], "interval": width}
    return found


def check_pairs(task: str, answer: Answers) -> None:
    """Refuse files that hold other examples than the first: they come from another store."""
    first = answer.tables[ALONE][0].select(["user_id", "cut", "target"])
    for name, tables in answer.tables.items():
        for number, table in enumerate(tables):
            if not table.select(["user_id", "cut", "target"]).equals(first):
                raise UserError(
                    f"the predictions of '{task}' by {name} (training {number + 1}) are of other examples than those "
                    f"of the task alone, so they cannot be compared; delete the study's folder and run it again"
                )


def metric_of(table: pa.Table, metric: str) -> float:
    """A task's main metric from a prediction file."""
    return float(_measure(table, metric)(np.ones((1, table.num_rows)))[0])


def _task_row(answer: Answers, values: dict[str, list[float]], gains: Mapping[str, Array] | None) -> dict[str, Any]:
    """What the report says of one task; `gains`: under every resample, None where the metric is not defined."""
    first, alone = answer.tables[ALONE][0], float(np.mean(values[ALONE]))
    row: dict[str, Any] = {"metric": answer.metric, "examples": first.num_rows}
    row |= {"users": len(pc.unique(first["user_id"])), "alone": {"values": values[ALONE], "mean": alone}, "methods": {}}
    for name in [name for name in values if name != ALONE]:
        low, high = (math.nan, math.nan) if gains is None else interval(gains[name])
        mean = float(np.mean(values[name]))
        found = {"values": values[name], "mean": mean, "gain": mean - alone, "interval": [low, high]}
        row["methods"][name] = found | {"loses": high < 0}
    return row


def _rank(values: dict[str, list[float]], name: str) -> float:
    """Place of a method by its mean metric among all methods and alone; equals share the mean of their places."""
    means = {other: float(np.mean(per_seed)) for other, per_seed in values.items()}
    better = sum(value > means[name] for value in means.values())
    equal = sum(value == means[name] for value in means.values())
    return better + (equal + 1) / 2


def aligned(optimal: pa.Table, table: pa.Table) -> pa.Table:
    """The predictions with the optimal scores in place of their own, example by example."""
    keys = ["user_id", "cut"]
    row = {key: number for number, key in enumerate(zip(*(optimal[key].to_pylist() for key in keys), strict=True))}
    index = [row[key] for key in zip(*(table[key].to_pylist() for key in keys), strict=True)]
    answers = table.select([*keys, "target"]).append_column("score", optimal["score"].take(index))
    return answers.replace_schema_metadata(optimal.schema.metadata)


# --- resampling -------------------------------------------------------------------------------------------------------


def _resample(answers: Mapping[str, Answers], number: int) -> dict[str, dict[str, Array]]:
    """Metric of every task and name, averaged over seeds, under every resample of all tasks' users -> [R]."""
    users = {task: answer.tables[ALONE][0]["user_id"].combine_chunks() for task, answer in answers.items()}
    everyone = pc.unique(pa.concat_arrays(list(users.values())))
    index = {task: pc.index_in(ids, everyone).to_numpy() for task, ids in users.items()}
    measures = {task: _measures(answer) for task, answer in answers.items()}
    found: dict[str, dict[str, list[Array]]] = {task: {name: [] for name in measures[task]} for task in answers}
    for weight_RU in resamples(len(everyone), number, max(map(len, users.values()))):
        for task, by_name in measures.items():
            weight_Rn = np.take(weight_RU, index[task], axis=1)
            for name, per_seed in by_name.items():
                found[task][name].append(np.mean([measure(weight_Rn) for measure in per_seed], axis=0))
    return {task: {name: np.concatenate(blocks) for name, blocks in by_name.items()} for task, by_name in found.items()}


def _measures(answer: Answers) -> dict[str, list[Measure]]:
    return {name: [_measure(table, answer.metric) for table in tables] for name, tables in answer.tables.items()}


# --- metrics of prediction files --------------------------------------------------------------------------------------


def _measure(table: pa.Table, metric: str) -> Measure:
    if metric not in MEASURES:
        raise UserError(f"the metric {metric} cannot be resampled; a seesaw study knows {', '.join(MEASURES)}")
    return MEASURES[metric](table)


def _auc(table: pa.Table) -> Measure:
    return partial(weighted_auc, target_n=table["target"].to_numpy(), score_n=table["score"].to_numpy())


def _r2(table: pa.Table) -> Measure:
    return partial(weighted_r2, target_n=table["target"].to_numpy(), value_n=table["score"].to_numpy())


def _macro_auc(table: pa.Table) -> Measure:
    classes = {str(value): c for c, value in enumerate(json.loads(table.schema.metadata[b"classes"]))}
    row, value = _flat(table["target"])
    target_nC = np.zeros((table.num_rows, len(classes)), bool)
    target_nC[row, [classes[str(item)] for item in value.to_pylist()]] = True
    score_nC = pc.list_flatten(table["score"]).to_numpy().reshape(table.num_rows, len(classes))
    return partial(weighted_macro_auc, target_nC=target_nC, score_nC=score_nC)


def _ndcg(table: pa.Table) -> Measure:
    target_row, target = _flat(table["target"])
    top_row, top = _flat(table["top_k"])
    ids = pa.chunked_array([target, top]).combine_chunks().dictionary_encode().indices.to_numpy()
    place = np.arange(len(top)) - np.searchsorted(top_row, top_row)
    top_nk = np.full((table.num_rows, int(place.max(initial=0)) + 1), -1)
    top_nk[top_row, place] = ids[len(target) :]
    offsets = np.append(0, np.bincount(target_row, minlength=table.num_rows).cumsum())
    by_row = ranking_by_row(top_nk, offsets, ids[: len(target)])
    return partial(weighted_mean, value_n=by_row["ndcg@10"])


def _flat(column: pa.ChunkedArray) -> tuple[NDArray, pa.Array]:
    """Row and value of everything in a column of values or of lists."""
    array = column.combine_chunks()
    if pa.types.is_list(array.type):
        return pc.list_parent_indices(array).to_numpy(), pc.list_flatten(array)
    return np.arange(len(array)), array


MEASURES: dict[str, Callable[[pa.Table], Measure]] = {
    "auc": _auc,
    "r2": _r2,
    "macro_auc": _macro_auc,
    "ndcg@10": _ndcg,
}
