"""The planted conflict: it is the same for the same seed, its best scores are the best, its tasks pull apart."""

from __future__ import annotations

import json
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from supermoe.config import load_run
from supermoe.data.prepare import prepare
from supermoe.data.synthetic import ASKED, CUTS, NUM_TRAINING_CUTS, SEGMENTS, Synthetic, simulate
from supermoe.objectives import measures
from supermoe.typed_yaml import UserError

NUM_USERS = 3000


@pytest.fixture(scope="module")
def world() -> dict[str, pa.Table]:
    return simulate(NUM_USERS, seed=1)


def column(world: dict[str, pa.Table], task: str) -> tuple[np.ndarray, np.ndarray]:
    """Labels and their expectation where the task is asked."""
    asked = np.array(world["outcomes"][task].is_valid())
    label = world["outcomes"][task].drop_null().to_pylist()
    score = np.array(world[f"optimal_{task}"]["score"].to_pylist())[asked]
    return np.array(label), score


def test_the_seed_is_the_log():
    first, again, other = simulate(60, seed=4), simulate(60, seed=4), simulate(60, seed=5)
    assert all(first[name].equals(again[name]) for name in first)
    assert not first["events"].equals(other["events"])


@pytest.mark.parametrize("task", ["click", "leave", "upgrade", "back"])
def test_best_scores_are_calibrated_and_above_chance(world, task):
    label, score = column(world, task)
    assert 0.7 < measures.auc(label, score) < 0.9
    assert measures.calibration_error(label, score) < 0.02  # of 6,000 labels or more; chance alone gives 0.01
    np.testing.assert_allclose(label.mean(), score.mean(), atol=0.02)


def test_best_values_and_classes_are_unbiased(world):
    spend, expected = column(world, "spend")
    np.testing.assert_allclose(measures.r2(spend, expected), 0.43, atol=0.05)
    np.testing.assert_allclose((spend - expected).std(), 2000, rtol=0.02)
    segment, share = column(world, "segment")
    for number, name in enumerate(SEGMENTS):
        np.testing.assert_allclose((segment == name).mean(), share[:, number].mean(), atol=0.02)


def test_tasks_pull_apart_and_differ_in_labels_and_scale(world):
    optimal = {task: np.array(world[f"optimal_{task}"]["score"].to_pylist()) for task in ASKED if task != "segment"}
    assert np.corrcoef(optimal["click"], optimal["leave"])[0, 1] < -0.2
    assert np.corrcoef(optimal["spend"], optimal["upgrade"])[0, 1] < -0.8
    assert abs(np.corrcoef(optimal["spend"], optimal["click"])[0, 1]) < 0.1
    training = np.tile(np.arange(len(CUTS)) < NUM_TRAINING_CUTS, NUM_USERS)
    asked = {task: np.array(world["outcomes"][task].is_valid())[training].mean() for task in ASKED}
    assert asked == pytest.approx(ASKED, abs=0.01)
    assert optimal["spend"].std() > 1000


def test_the_log_is_written_once_beside_its_best_scores(tmp_path: Path):
    config = Synthetic.Config(path=str(tmp_path / "log"), users=60, seed=2)
    tables = Synthetic(config).attach(con := duckdb.connect())
    assert con.sql(f"SELECT count(*) FROM {tables.events}").fetchall()[0][0] > 500
    assert json.loads((tmp_path / "log/simulation.json").read_text()) == Synthetic(config).fingerprint()
    before = (tmp_path / "log/events.parquet").stat().st_mtime_ns
    scores = Synthetic(config).optimal_scores()
    assert list(scores) == list(ASKED)
    assert scores["segment"].column_names == ["user_id", "cut", "score"]
    assert (tmp_path / "log/events.parquet").stat().st_mtime_ns == before
    Synthetic(config.model_copy(update={"seed": 3})).attach(con)
    assert (tmp_path / "log/events.parquet").stat().st_mtime_ns > before


def test_a_folder_of_other_files_is_not_overwritten(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match=r"holds no simulated log, it would be overwritten; name a new folder"):
        Synthetic(Synthetic.Config(path=str(tmp_path))).attach(duckdb.connect())
    assert (tmp_path / "mine.txt").exists()


def test_the_shipped_config_asks_every_task_at_the_simulated_cuts(tmp_path: Path):
    config = Path(__file__).parents[1] / "configs/synthetic.yaml"
    places = [f"run={tmp_path}", f"data.source.path={tmp_path / 'log'}", "data.source.users=200"]
    store = prepare(load_run(config, places))
    assert list(store.schema.labels) == list(ASKED)
    assert len(store.rows_of("test")) == len(store.rows_of("valid")) == 200
    cuts = {int(cut) for cut in np.asarray(store.examples.cut)}
    assert cuts == set(CUTS)
    assert np.isnan(np.asarray(store.labels["upgrade"])[store.rows_of("train")]).mean() > 0.8
    assert not np.isnan(np.asarray(store.labels["upgrade"])[store.rows_of("test")]).any()
