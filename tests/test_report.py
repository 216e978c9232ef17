from __future__ import annotations

import builtins
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from fake_run import FakeBatches, make_model, make_tasks

from supermoe.training.evaluation import evaluate
from supermoe.training.report import HEADER, table_rows, text_table, write_report


@pytest.fixture(scope="module")
def world():
    tasks = make_tasks()
    found = evaluate(make_model(tasks, {}), tasks, FakeBatches(2), "test")
    gains = found.gains | {"age": math.nan}
    return tasks, replace(found, gains=gains, undefined={"age": "all 4 labels are 1"})


def test_rows_tell_value_prior_baseline_and_gain(world) -> None:
    tasks, found = world
    rows = {row[0]: row for row in table_rows(tasks, found, {"churn": {"auc": 0.61234, "logloss": 2.0}})}
    assert rows["churn"][1:3] == ("12", "auc")
    assert rows["churn"][3:] == (
        f"{found.metrics['churn']['auc']:.4f}",
        "0.5000",
        "0.6123",
        f"{found.gains['churn']:.4f}",
    )
    assert rows["age"][-2:] == ("-", "-")


def test_text_table_lines_up() -> None:
    rows = [
        ("a", "5", "auc", "0.5000", "0.5000", "-", "0.0000"),
        ("a_longer_name", "1000", "r2", "-1.2345", "0.0000", "-", "-"),
    ]
    lines = text_table(rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == list(HEADER)
    assert lines[3].startswith("a_longer_name")


def test_files(world, tmp_path: Path) -> None:
    tasks, found = world
    table = write_report(tmp_path, tasks, found, {"churn": {"auc": 0.6}}, {"steps": 7}, plots=False)
    assert table.splitlines()[2].split()[0] == "churn"
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["split"] == "test"
    assert report["steps"] == 7
    assert report["selection"] == pytest.approx(found.selection)
    assert report["tasks"]["churn"]["boosting"] == {"auc": 0.6}
    assert report["tasks"]["age"]["gain"] is None
    assert report["tasks"]["age"]["undefined"] == "all 4 labels are 1"
    text = (tmp_path / "report.md").read_text()
    assert "| churn | 12 | auc |" in text
    assert "age has no test metric: all 4 labels are 1" in text
    assert "| layer 1 |" in text


def test_without_matplotlib_it_says_so_and_writes_the_rest(world, tmp_path: Path, monkeypatch) -> None:
    tasks, found = world
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "supermoe.training.plots":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.warns(UserWarning, match=r"pip install 'supermoe\[report\]'"):
        write_report(tmp_path, tasks, found, {}, {})
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md"}
