"""The seesaw study in a small world: what it writes, uses again and refuses."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import tiny
import yaml

from supermoe.config import load_run
from supermoe.data.store import Store
from supermoe.seesaw import main
from supermoe.studies import seesaw, seesaw_runs
from supermoe.training.build import Run
from supermoe.typed_yaml import UserError

COMMAND = ["--config", "config.yaml", "--seeds", "1", "--methods", "seesaw,shared_bottom"]
VARIANT = ["--variant", "slow: loss.balancer=equal training.lr=1e-4"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which a study of two tasks and four methods was carried out. Not to be changed."""
    folder = tmp_path_factory.mktemp("seesaw")
    tiny.write_tables(folder)
    config = tiny.make_config(Path()).model_dump(mode="json")
    config["tasks"] = {name: config["tasks"][name] for name in ("churn", "types")}
    config["training"] |= {"max_steps": 1, "threads": 1}
    config["model"] |= {"dim": 8, "layers": 1, "dense_layers": 0}
    config["seed"] = 3
    config["loss"] = {"balancer": {"type": "equal"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with contextlib.chdir(folder):
        main([*COMMAND, *VARIANT])
    return folder


@pytest.fixture
def inside(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In the folder of the finished study."""
    monkeypatch.chdir(finished)
    return finished


def result() -> dict:
    return json.loads(Path("run/seesaw/seesaw.json").read_text())


def test_a_task_alone_has_the_features_of_all_together(finished: Path, tmp_path: Path) -> None:
    raw = yaml.safe_load((finished / "config.yaml").read_text())
    raw["features"] = {"counts": {"sql": {"n": "count(*)"}}}  # windows follow the labels'
    raw["tasks"]["churn"]["label"]["window"] = "7d"
    (file := tmp_path / "two.yaml").write_text(yaml.safe_dump(raw))
    base = load_run(file)
    types = seesaw.alone(seesaw.Request(file), base, "types")
    assert list(types.tasks) == ["types"]
    assert types.features == base.features
    assert load_run(file, ["tasks.churn=null"]).features != base.features


def test_the_report_is_complete(inside: Path) -> None:
    found = result()
    assert list(found["methods"]) == ["equal", "seesaw", "shared_bottom", "slow"]
    assert (found["split"], found["selected_on"], found["own"], found["seeds"]) == ("test", "valid", "equal", [3])
    for row in found["tasks"].values():
        assert len(row["alone"]["values"]) == 1
        for method in row["methods"].values():
            assert method["gain"] == pytest.approx(method["mean"] - row["alone"]["mean"])
            assert method["interval"][0] <= method["interval"][1]
    equal, moving = found["methods"]["equal"], found["methods"]["seesaw"]
    assert list(equal["weights"]["weight"][0]) == list(moving["weights"]["weight"][0])
    assert equal["gradients"]["tasks"] == ["churn", "types"]
    assert sum(equal["experts"]["layer 0"]["churn"]) == pytest.approx(1)
    assert list(json.loads(Path("run/seesaw/reference.json").read_text())) == ["churn", "types"]
    text = Path("run/seesaw/seesaw.md").read_text()
    assert "Measured on the split `test`; weights were selected on `valid`" in text
    assert "`slow`: loss.balancer=equal training.lr=1e-4" in text
    for image in ("gains", "weights", "cosines", "experts"):
        assert Path(f"run/seesaw/plots/{image}.png").stat().st_size > 0


def test_every_training_is_a_run_that_differs_only_where_it_should(inside: Path) -> None:
    folders = sorted(Path("run/seesaw/runs").iterdir())
    assert len(folders) == 2 + 4
    configs = {folder.name.rpartition("-")[0]: load_run(folder / "config.yaml") for folder in folders}
    assert list(configs["alone.churn-seed3"].tasks) == ["churn"]
    assert list(configs["seesaw-seed3"].tasks) == ["churn", "types"]
    assert configs["shared_bottom-seed3"].model.readout.type == "shared_bottom"
    assert configs["shared_bottom-seed3"].loss.balancer.type == "equal"
    assert {config.store for config in configs.values()} == {Path("run/store")}
    assert {config.training.max_steps for config in configs.values()} == {1}
    assert configs["equal-seed3"].seed == 3
    assert configs["equal-seed3"].loss.teachers is None
    assert configs["seesaw-seed3"].loss.teachers == Path("run/seesaw/teachers")  # the twins that were trained first
    assert configs["seesaw-seed3"].loss.balancer.reference == Path("run/seesaw/reference.json")
    for folder in folders:
        assert {"env.json", "log.txt", "metrics.jsonl", "report.json"} <= {path.name for path in folder.iterdir()}


def test_what_is_trained_is_used_again_and_what_was_stopped_goes_on(
    inside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, train = [], seesaw_runs.train
    monkeypatch.setattr(seesaw_runs, "train", lambda folder: (trained.append(folder.name), train(folder)))
    monkeypatch.setattr(seesaw, "write_seesaw_report", lambda out, result: None)
    before = result()
    stopped = next(Path("run/seesaw/runs").glob("equal-seed3-*"))
    predictions = (stopped / "predictions/test/churn.parquet").read_bytes()
    (stopped / "report.json").unlink()  # the last thing that a training writes
    main([*COMMAND, *VARIANT])
    assert trained == [stopped.name]
    assert (stopped / "predictions/test/churn.parquet").read_bytes() == predictions
    assert result() == before
    configs = {"equal": load_run("config.yaml", ["training.lr=1e-3"])}
    (other,) = seesaw_runs.plan(
        configs, 1, Path("run/seesaw"), Store.open(Path("run/store")).fingerprint, threads=1, epochs=6
    )
    assert not other.is_done  # another config is another training


def test_second_opinions_answer_but_teach_nobody(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = next(Path("run/seesaw/runs").glob("alone.churn-*"))
    answers, measured = (folder / "predictions" / split / "churn.parquet" for split in ("train", "test"))
    taught, calls = answers.read_bytes(), []

    def stand_in(run: Run) -> None:
        calls.append((answers.read_bytes(), measured.exists()))

    monkeypatch.setattr(seesaw_runs, "add_second_opinions", stand_in)
    shutil.rmtree(folder / "predictions")
    seesaw_runs.train(folder)
    measured.unlink()
    answers.write_bytes(b"as they were")  # a training that was stopped after its trees had grown
    seesaw_runs.train(folder)
    assert calls == [(taught, False), (b"as they were", False)]
    answers.write_bytes(taught)


def test_boosting_on_the_same_features_can_stand_beside(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seesaw, "write_seesaw_report", lambda out, result: None)
    monkeypatch.setattr(seesaw, "publish_text", lambda path, text: None)
    request = seesaw.Request(Path("config.yaml"), ["report.boosting=true"], seeds=1, methods=["equal"])
    found = seesaw.study(request)["tasks"]
    assert all(0 <= row["boosting"] <= 1 for row in found.values())
    assert "boosting" not in result()["tasks"]["churn"]


def test_the_validation_split_can_be_reported_without_training(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seesaw_runs, "train", lambda folder: pytest.fail(f"{folder} is trained again"))
    monkeypatch.setattr(seesaw, "write_seesaw_report", lambda out, result: None)
    monkeypatch.setattr(seesaw, "publish_text", lambda path, text: None)
    assert (
        seesaw.study(seesaw.Request(Path("config.yaml"), seeds=1, methods=["seesaw"], split="valid"))["split"]
        == "valid"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "uncertanty"], "--methods: unknown method 'uncertanty', did you mean 'uncertainty'"),
        (["--methods", "fixed"], "weights"),
        (["tasks.types=null"], "a seesaw needs two tasks or more, there is only 'churn'"),
        (["--variant", "other: tasks.churn.label.window=7d"], "--variant other: all methods share one store"),
        (["--variant", "other: run=elsewhere"], "--variant other: all methods share one store"),
    ],
)
def test_what_cannot_be_studied_is_refused(inside: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(["--config", "config.yaml", *arguments])


def test_a_study_needs_a_validation_and_a_test_cut(inside: Path, tmp_path: Path) -> None:
    cuts = "data.splits={type: time, train: [2020-08-01], valid: 2020-10-01}"
    with pytest.raises(UserError, match=r"no examples of the split test; give data\.splits\.test a cut, or"):
        main(["--config", "config.yaml", cuts, f"run={tmp_path}"])
    cuts = "data.splits={type: time, train: [2020-08-01], test: 2020-10-01}"
    with pytest.raises(UserError, match="needs a validation cut"):
        main(["--config", "config.yaml", cuts, f"run={tmp_path}"])


def test_what_does_not_reach_the_shared_parts_has_no_weight_there() -> None:
    row = {"weight": {"churn": 0.25, "spend": 0.5, "next_event": 0.25}}
    assert seesaw.shared_weights(row) == row["weight"]
    assert seesaw.shared_weights(row | {"share": {"churn": 0.0, "spend": 1.5}}) == {
        "churn": 0.0,
        "spend": 0.75,
        "next_event": 0.25,
    }
