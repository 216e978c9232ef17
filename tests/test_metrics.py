from __future__ import annotations

import builtins
import math
from pathlib import Path

import pytest

from supermoe.training.metrics import MetricsLog, finite, read_metrics
from supermoe.typed_yaml import UserError


def write(folder: Path, steps: range, start: int = 0) -> None:
    log = MetricsLog(folder, start)
    for step in steps:
        log.add("train", step, loss={"churn": step / 10, "age": math.nan})
    log.close()


def test_rows_are_read_back_with_null_for_nan(tmp_path: Path) -> None:
    write(tmp_path, range(1, 3))
    assert read_metrics(tmp_path) == [
        {"kind": "train", "step": 1, "loss": {"churn": 0.1, "age": None}},
        {"kind": "train", "step": 2, "loss": {"churn": 0.2, "age": None}},
    ]
    assert read_metrics(tmp_path / "nothing") == []


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    write(tmp_path, range(1, 6))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # killed while writing
    write(tmp_path, range(4, 8), start=3)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]


def test_a_run_from_the_start_forgets_earlier_ones(tmp_path: Path) -> None:
    write(tmp_path, range(1, 6))
    write(tmp_path, range(1, 3))
    assert len(read_metrics(tmp_path)) == 2


def test_finite() -> None:
    assert finite({"a": [1.5, math.inf], 2: "x"}) == {"a": [1.5, None], "2": "x"}


def test_tensorboard_that_is_not_installed_is_named(tmp_path: Path, monkeypatch) -> None:
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "torch.utils.tensorboard":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'supermoe\[tensorboard\]'"):
        MetricsLog(tmp_path, tensorboard=True)
