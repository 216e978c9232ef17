from __future__ import annotations

import json
from pathlib import Path

import pytest

from supermoe.config import load_run
from supermoe.data.store import Store
from supermoe.studies import measurement
from supermoe.studies.measurement import write_measurement
from supermoe.training.build import build_run
from supermoe.training.refit import final_run, measured_run


@pytest.mark.parametrize("asked", [True, False])
def test_the_baseline_is_trained_on_what_the_measured_run_was(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    config = load_run(trained_run / "config.yaml", [f"report.boosting={asked}", "report.plots=false"])
    run = build_run(config, Store.open(config.store))
    run.trainer.resume()
    final = final_run(run)
    assert measured_run(run, "valid", final) is run
    measured = measured_run(run, "test", final)
    assert measured is final
    assert final is not run
    seen = []

    def boosting(store: Store, tasks: dict, split: str) -> dict[str, dict[str, float]]:
        seen.append((store, split))
        return {"churn": {"auc": 0.25}}

    monkeypatch.setattr(measurement, "boosting", boosting)
    evaluation = measured.evaluate("test")
    run = build_run(config.model_copy(update={"run": tmp_path}), run.store)  # the files of the fixture stay as they are
    table = write_measurement(run, measured, evaluation)
    assert seen == ([(measured.store, "test")] if asked else [])
    told = json.loads((tmp_path / "report.json").read_text())["tasks"]["churn"]
    assert told["metrics"]["auc"] == evaluation.metrics["churn"]["auc"]
    assert "churn" in table
    assert told["boosting"] == ({"auc": 0.25} if asked else None)
    assert (tmp_path / "predictions" / "test" / "churn.parquet").exists()
