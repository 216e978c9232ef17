from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from supermoe.config import load_run
from supermoe.data.store import Store
from supermoe.training.build import build_tasks


def read(run: Path, task: str) -> dict[str, list]:
    return pq.read_table(run / "predictions" / "test" / f"{task}.parquet").to_pydict()


def test_only_labelled_examples_in_the_stores_order(trained_run: Path) -> None:
    store = Store.open(trained_run / "store")
    rows = store.rows_of("test")
    label = np.asarray(store.labels["churn"])[rows]
    asked = rows[~np.isnan(label)]
    found = read(trained_run, "churn")
    users = store.users["user"].to_pylist()
    assert found["user_id"] == [users[store.examples.user[row]] for row in asked]
    assert {int(cut.timestamp()) for cut in found["cut"]} == set(np.asarray(store.examples.cut)[asked].tolist())
    assert found["target"] == label[~np.isnan(label)].tolist()
    assert all(0 < score < 1 for score in found["score"])


def test_classes_are_values_and_scores_sum_to_one(trained_run: Path) -> None:
    table = pq.read_table(trained_run / "predictions" / "test" / "segment.parquet")
    assert json.loads(table.schema.metadata[b"classes"]) == ["gold", "silver"]
    found = table.to_pydict()
    assert set(found["target"]) <= {"gold", "silver"}
    assert all(sum(score) == pytest.approx(1, abs=1e-5) for score in found["score"])
    types = read(trained_run, "types")
    assert all(
        isinstance(target, list) and len(score) == 4
        for target, score in zip(types["target"], types["score"], strict=True)
    )


@pytest.mark.parametrize("task", ["next_type", "item"])
def test_rankings_hold_values_scores_and_the_best_rank(trained_run: Path, task: str) -> None:
    found = read(trained_run, task)
    assert set(found) == {"user_id", "cut", "target", "rank", "top_k", "scores"}
    for target, rank, top_k, scores in zip(
        found["target"], found["rank"], found["top_k"], found["scores"], strict=True
    ):
        targets = target if isinstance(target, list) else [target]
        assert sorted(top_k) == ["beer", "bread", "milk", "nappies"]
        assert scores == sorted(scores, reverse=True)
        assert rank == 1 + min((top_k.index(value) for value in targets), default=-1)


def test_metrics_can_be_recomputed_from_the_files(trained_run: Path) -> None:
    report = json.loads((trained_run / "report.json").read_text())
    found = read(trained_run, "spend")
    error = np.array(found["score"]) - np.array(found["target"])
    assert report["tasks"]["spend"]["metrics"]["rmse"] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-5)
    config = load_run(trained_run / "config.yaml")
    assert set(build_tasks(config, Store.open(config.store))) == set(report["tasks"])
