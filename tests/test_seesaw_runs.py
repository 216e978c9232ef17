"""Trainings of a study: what names them, how they are spread over processes, and what one failure does."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny

from supermoe.studies import seesaw_runs
from supermoe.studies.seesaw_runs import Training, carry_out, digest, plan, progress, threads_per_training
from supermoe.typed_yaml import UserError


@pytest.fixture
def trainings(tmp_path: Path) -> list[Training]:
    config = tiny.make_config(tmp_path)
    return plan({"equal": config, "alone.churn": config}, 2, tmp_path / "out", "mark", threads=3, epochs=4)


def test_a_training_is_named_by_what_decides_its_outcome(trainings: list[Training]) -> None:
    assert [(one.name, one.seed) for one in trainings] == [
        ("equal", 0),
        ("equal", 1),
        ("alone.churn", 0),
        ("alone.churn", 1),
    ]
    config = trainings[0].config
    assert trainings[0].folder.name == f"equal-seed0-{digest(config, 'mark')}"
    assert (config.training.threads, config.training.epochs, config.training.refit) == (3, 4, False)
    moved = config.model_copy(update={"run": Path("elsewhere"), "data": config.data.model_copy(update={"threads": 7})})
    assert digest(moved, "mark") == digest(config, "mark")
    assert digest(config, "other store") != digest(config, "mark")
    training = config.training.model_copy(update={"lr": 1.0})
    assert digest(config.model_copy(update={"training": training}), "mark") != digest(config, "mark")


@pytest.mark.parametrize("jobs", [1, 2])
def test_one_failure_stops_no_other_and_the_next_start_repeats_it_alone(
    trainings: list[Training], jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    broken = trainings[1].folder.name

    def train(folder: Path) -> None:
        trained.append(folder.name)
        assert (folder / "config.yaml").exists()
        if folder.name == broken:
            raise UserError("step 3: the loss of 'churn' is nan")
        (folder / "report.json").write_text(json.dumps({}))

    monkeypatch.setattr(seesaw_runs, "train", train)
    monkeypatch.setattr(seesaw_runs, "ProcessPoolExecutor", lambda jobs, mp_context: ThreadPoolExecutor(jobs))
    with progress(trainings) as bar, pytest.raises(UserError, match=rf"1 of 4 trainings failed; {broken}: step 3"):
        carry_out(trainings, jobs, bar)
    assert sorted(trained) == sorted(one.folder.name for one in trainings)
    trained.clear()
    with progress(trainings) as bar:
        assert bar.n == 3
        with pytest.raises(UserError, match="1 of 1 trainings failed"):
            carry_out(trainings, jobs, bar)
    assert trained == [broken]


def test_another_error_ends_the_study_at_once(trainings: list[Training], monkeypatch: pytest.MonkeyPatch) -> None:
    def train(folder: Path) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(seesaw_runs, "train", train)
    monkeypatch.setattr(seesaw_runs, "ProcessPoolExecutor", lambda jobs, mp_context: ThreadPoolExecutor(jobs))
    with progress(trainings) as bar, pytest.raises(RuntimeError, match="a fault of ours"):
        carry_out(trainings, 2, bar)


def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert [threads_per_training(jobs) for jobs in (1, 3, 20)] == [8, 2, 1]
