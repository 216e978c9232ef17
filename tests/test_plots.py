from __future__ import annotations

from pathlib import Path

import pytest
from fake_run import FakeBatches, make_model, make_tasks

from supermoe.training.evaluation import evaluate
from supermoe.training.plots import draw

ROWS = [
    {"kind": "train", "step": 1, "loss": {"churn": 1.0, "age": None}},
    {"kind": "train", "step": 2, "loss": {"churn": 0.9, "age": 1.1}},
    {"kind": "valid", "step": 2, "gain": {"churn": 0.1, "age": None}},
]


@pytest.fixture(scope="module")
def world():
    tasks = make_tasks()
    return tasks, evaluate(make_model(tasks, {}), tasks, FakeBatches(2), "test")


def test_every_plot_is_a_png(world, tmp_path: Path) -> None:
    paths = draw(tmp_path / "plots", *world, ROWS)
    assert [path.name for path in paths] == ["loss.png", "gain.png", "router_load.png", "calibration.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_what_has_no_data_is_not_drawn(world, tmp_path: Path) -> None:
    tasks, found = world
    assert [path.stem for path in draw(tmp_path, {"age": tasks["age"]}, found, [])] == ["router_load"]
