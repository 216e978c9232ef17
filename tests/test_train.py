from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import tiny

from supermoe.config import load_run
from supermoe.data.sources import Frames
from supermoe.serving.artifact import Artifact
from supermoe.train import main, train
from supermoe.typed_yaml import UserError


@pytest.fixture
def copy(trained_run: Path, tmp_path: Path) -> Path:
    """The finished run in a folder of its own."""
    return Path(shutil.copytree(trained_run, tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_complete(trained_run: Path) -> None:
    for name in (
        "config.yaml",
        "env.json",
        "metrics.jsonl",
        "report.json",
        "report.md",
        "plots/loss.png",
        "predictions/test/churn.parquet",
    ):
        assert (trained_run / name).stat().st_size > 0, name
    config = load_run(trained_run / "config.yaml")
    assert config.run == trained_run
    embeddings = pd.read_parquet(trained_run / "embeddings" / "part-00000.parquet")
    assert len(embeddings) == 20
    assert embeddings["embedding"].iloc[0].shape == (tiny.VECTOR,)
    assert (embeddings["last_event_time"] < embeddings["as_of"]).all()
    model = Artifact.load(trained_run / "model")
    assert model.states["spend"]["std"] > 0
    assert model.parity() < 1e-4


def test_the_same_command_again_trains_no_further(copy: Path, capsys: pytest.CaptureFixture) -> None:
    before = contents(copy)
    main(["--config", str(copy / "config.yaml"), f"run={copy}"])
    after = contents(copy)
    for name in (
        "metrics.jsonl",
        "checkpoints/best.safetensors",
        "predictions/test/churn.parquet",
        "model/model.safetensors",
    ):
        assert before[name] == after[name], name
    printed = capsys.readouterr().out
    assert "churn" in printed
    assert str(copy / "report.md") in printed


def test_a_changed_config_is_refused_and_the_run_is_untouched(copy: Path) -> None:
    before = contents(copy)
    with pytest.raises(UserError, match=r"seed was 0 and is now 1"):
        main(["--config", str(copy / "config.yaml"), f"run={copy}", "seed=1"])
    assert contents(copy) == before


def test_a_task_can_be_removed_and_frames_be_given(tmp_path: Path) -> None:
    config = tiny.make_config(tmp_path)
    tasks = {name: config.tasks[name] for name in ("churn", "segment")}
    training = config.training.model_copy(update={"max_steps": 1})
    config = config.model_copy(update={"tasks": tasks, "training": training})
    train(config, Frames(events=tiny.make_log(), users=tiny.make_users()))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert list(report["tasks"]) == ["churn", "segment"]
    assert report["steps"] == 1
    assert pq.read_table(tmp_path / "run" / "predictions" / "test" / "churn.parquet").num_rows > 0
