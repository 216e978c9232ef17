from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from tiny import CUT, make_log, make_users

from supermoe import predict
from supermoe.serving.artifact import Artifact
from supermoe.serving.predict import load_tasks
from supermoe.typed_yaml import UserError

TYPES = {"milk", "bread", "beer", "nappies"}


def run(model: Path, out: Path, *more: str) -> dict:
    predict.main([str(model), "--as-of", CUT, "--out", str(out), *more])
    return json.loads((out / "manifest.json").read_text())


@pytest.fixture(scope="module")
def out(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predictions")
    run(model_folder, folder)
    return folder


def past() -> pd.DataFrame:
    log = make_log()
    return log[log["time"] < CUT]


def test_every_eligible_user_is_scored_on_every_task(out: Path) -> None:
    users = sorted(past()["user"].unique())
    for task in ("spend", "types", "next_type", "segment"):
        frame = pd.read_parquet(out / f"{task}.parquet")
        assert list(frame["user_id"]) == users
        assert set(frame["cut"]) == {pd.Timestamp(CUT, tz="UTC")}


def test_a_task_asks_only_whom_it_asked_in_training(out: Path) -> None:
    recent = past()[past()["time"] >= pd.Timestamp(CUT) - pd.Timedelta(days=56)]
    counts = recent.groupby("user").size()
    expected = sorted(counts[counts >= 5].index)
    assert 0 < len(expected) < past()["user"].nunique()
    assert list(pd.read_parquet(out / "churn.parquet")["user_id"]) == expected


def test_scores_have_the_shape_of_their_task(out: Path) -> None:
    churn, spend = (pd.read_parquet(out / f"{task}.parquet")["score"] for task in ("churn", "spend"))
    assert churn.between(0, 1).all()
    assert churn.nunique() > 1
    assert 50 < spend.mean() < 150  # decoded with the saved mean of 100 and deviation of 10
    segment = np.stack(list(pd.read_parquet(out / "segment.parquet")["score"]))
    np.testing.assert_allclose(segment.sum(axis=1), 1, rtol=1e-5)
    types = np.stack(list(pd.read_parquet(out / "types.parquet")["score"]))
    assert types.shape[1] == len(TYPES)
    assert (np.abs(types.sum(axis=1) - 1) > 1e-3).any()  # independent answers


def test_retrieval_gives_own_values_best_first(out: Path) -> None:
    frame = pd.read_parquet(out / "next_type.parquet")
    assert all(set(ids) == TYPES and len(ids) == 4 for ids in frame["top_k"])
    assert all((np.diff(scores) <= 0).all() for scores in frame["scores"])


def test_the_manifest_describes_every_table(out: Path, model_folder: Path) -> None:
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["model_id"] == Artifact.load(model_folder).model_id
    assert manifest["as_of"] == CUT
    assert manifest["tables"]["segment"]["classes"] == ["gold", "silver"]
    assert set(manifest["tables"]["types"]["classes"]) == TYPES
    assert manifest["tables"]["churn"]["schema"] == {
        "user_id": "string",
        "cut": "timestamp[us, tz=UTC]",
        "score": "float",
    }
    rows = {part["task"]: part["rows"] for part in manifest["parts"]}
    assert rows == {task: len(pd.read_parquet(out / f"{task}.parquet")) for task in rows}
    assert set(rows) == {"churn", "spend", "types", "next_type", "segment"}


def test_files_given_on_the_line_and_chosen_tasks(model_folder: Path, out: Path, tmp_path: Path) -> None:
    log = make_log()
    log[log["user"] == "u03"].assign(user="new").to_csv(tmp_path / "new.csv", index=False)
    log[log["user"] == "u03"].assign(user="new").to_parquet(tmp_path / "new.parquet")
    make_users().head(0).to_parquet(tmp_path / "people.parquet")
    files = ["--events", str(tmp_path / "new.parquet"), "--users", str(tmp_path / "people.parquet")]
    manifest = run(model_folder, tmp_path / "out", *files, "--tasks", "spend,segment")
    assert manifest["tasks"] == ["spend", "segment"]
    assert {path.name for path in (tmp_path / "out").glob("*.parquet")} == {"spend.parquet", "segment.parquet"}
    found = pd.read_parquet(tmp_path / "out" / "spend.parquet")
    assert list(found["user_id"]) == ["new"]
    known = pd.read_parquet(out / "spend.parquet").set_index("user_id")["score"]["u03"]
    assert found["score"][0] == pytest.approx(known, rel=1e-4)  # fp32 in another batch


def test_shards_together_are_the_whole(model_folder: Path, out: Path, tmp_path: Path) -> None:
    for shard in ("1/2", "0/2"):
        manifest = run(model_folder, tmp_path, "--shard", shard, "--tasks", "spend,churn")
    assert manifest["complete"]
    for task in ("spend", "churn"):
        parts = [pd.read_parquet(path) for path in sorted(tmp_path.glob(f"{task}-*.parquet"))]
        assert all(len(part) for part in parts)
        found = pd.concat(parts).sort_values("user_id", ignore_index=True)
        whole = pd.read_parquet(out / f"{task}.parquet")
        assert list(found["user_id"]) == list(whole["user_id"])
        np.testing.assert_allclose(found["score"], whole["score"], rtol=1e-4)  # fp32 in other batches


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tasks", "chrun"], "no task 'chrun', did you mean 'churn'"),
        (["--shard", "2/2"], "expected i/n"),
        (["--users", "people.parquet"], "--users needs --events"),
        (["--events", "no_such_file.parquet"], r"no_such_file\.parquet"),
        (["--as-of", "soon"], "--as-of: expected a date"),
        (["--as-of", "1999-01-01"], "no user is eligible"),
    ],
)
def test_wrong_arguments_are_explained_and_leave_nothing(
    model_folder: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(model_folder, tmp_path / "out", *more)
    assert not list((tmp_path / "out").rglob("*.*"))


def test_another_selection_of_tasks_needs_another_folder(model_folder: Path, tmp_path: Path) -> None:
    run(model_folder, tmp_path, "--tasks", "spend")
    with pytest.raises(UserError, match=r"tasks .*empty folder"):
        run(model_folder, tmp_path, "--tasks", "segment")


def test_a_task_whose_class_is_not_there_is_named(model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["tasks"]["churn"]["type"] = "my_package.tasks:Mine"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    artifact = Artifact.load(folder)
    with pytest.raises(UserError, match=r"tasks\.churn.*my_package\.tasks:Mine"):
        load_tasks(artifact)
