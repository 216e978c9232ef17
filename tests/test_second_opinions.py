"""Second opinions of a run: who gets one, which share, and that a refit takes it over."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from supermoe.config import RunConfig
from supermoe.data.sources import Frames
from supermoe.data.store import Store
from supermoe.model.habits import Habits
from supermoe.model.heads import HeadSpec
from supermoe.train import train
from supermoe.training.boosting import TREES
from supermoe.training.build import Run, build_run
from supermoe.training.refit import final_run
from supermoe.training.second_opinions import HABIT_SHARES, add_second_opinions
from supermoe.typed_yaml import validate


def faithful_log() -> pd.DataFrame:
    """The tiny log, but each user mostly buys one thing."""
    log = tiny.make_log()
    favourite = log["user"].str[1:].astype(int).mod(4).map(dict(enumerate(sorted(set(log["type"])))))
    often = np.random.default_rng(0).random(len(log)) < 0.8
    return log.assign(type=log["type"].where(~often, favourite))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunConfig]:
    """A run of two steps on a tiny log, whose labels are enough for second opinions of few examples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("supermoe.training.boosting.MIN_EXAMPLES", 10)
        patch.setattr("supermoe.training.habits.MIN_LABELS", 10)
        patch.setitem(TREES, "min_samples_leaf", 5)
        raw = tiny.make_config(tmp_path_factory.mktemp("run")).model_dump(mode="json")
        raw["training"]["max_steps"] = 2
        raw["tasks"]["next_type"] = {"type": "next_item", "label": {"window": "28d", "next": "type"}}
        config = validate(RunConfig, raw, "test")
        train(config, Frames(events=faithful_log(), users=tiny.make_users()))
        yield config


@pytest.fixture
def run(trained: RunConfig) -> Iterator[Run]:
    """The run as it was trained, whatever is done to its best weights."""
    run = build_run(trained, Store.open(trained.store))
    kept = run.trainer.best.read_bytes()
    run.trainer.load_best()
    yield run
    run.trainer.best.write_bytes(kept)


def silence(run: Run) -> None:
    """Take every share away, also from what is kept."""
    for opinion in run.second_opinions().values():
        opinion.share.zero_()
    run.trainer.save_best()


def test_a_run_answers_with_them_where_validation_wants_them(run: Run) -> None:
    together, shares = run.evaluate("valid"), run.opinion_shares()
    kinds = {isinstance(run.second_opinions()[name], Habits) for name, share in shares.items() if share}
    assert kinds == {True, False}  # habits and trees both
    silence(run)
    alone = run.evaluate("valid")
    for name, task in run.tasks.items():
        main = task.main_metric
        if shares.get(name):
            assert together.metrics[name][main] >= alone.metrics[name][main]
        else:
            assert together.metrics[name] == pytest.approx(alone.metrics[name], nan_ok=True)


def test_habits_have_the_best_of_their_shares(run: Run) -> None:
    share = run.opinion_shares()["next_type"]
    gains = {}
    for other in (0.0, *HABIT_SHARES):
        run.second_opinions()["next_type"].share.fill_(other)
        gains[other] = run.measure("valid", ["next_type"]).gains["next_type"]
    assert len(set(gains.values())) > 1
    assert gains[share] == max(gains.values())


def test_weights_that_hold_some_stay_as_they_are(run: Run) -> None:
    shares = run.opinion_shares()
    before = {name: value.clone() for name, value in run.trainer.evaluated_model().state_dict().items()}
    add_second_opinions(run)
    add_second_opinions(run, dict.fromkeys(shares, 0.5))
    assert run.opinion_shares() == shares
    after = run.trainer.evaluated_model().state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_refit_takes_the_shares_over_and_fits_anew(run: Run) -> None:
    final = final_run(run)
    final.trainer.load_best()
    shares = run.opinion_shares()
    assert {name: share for name, share in final.opinion_shares().items() if share} == {
        name: share for name, share in shares.items() if share
    }
    first, second = (one.second_opinions()["next_type"].weight_K for one in (run, final))
    assert not torch.equal(first, second)


def test_without_validation_there_are_none(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    silence(run)
    monkeypatch.setattr(run.trainer, "valid", None)
    add_second_opinions(run)
    assert not any(run.opinion_shares().values())


@pytest.mark.parametrize("learns_from_events", [True, False])
def test_without_labels_the_last_events_are_asked_for(
    run: Run, monkeypatch: pytest.MonkeyPatch, learns_from_events: bool
) -> None:
    """As under leave-one-out; histories that teach a ranking nothing are not read."""
    silence(run)
    monkeypatch.setattr(run.tasks["next_type"], "undefined", lambda labels: "no example is labelled")
    monkeypatch.setattr("supermoe.training.second_opinions.fit_trees", lambda *told: None)
    if not learns_from_events:
        monkeypatch.setitem(run.heads, "next_type", HeadSpec(kind="field", field="type"))
        monkeypatch.setattr("supermoe.training.second_opinions.batches", lambda *told: pytest.fail("read"))
    add_second_opinions(run)
    assert (run.opinion_shares()["next_type"] > 0) == learns_from_events


def test_they_can_be_left_out(trained: RunConfig) -> None:
    model = trained.model.model_copy(update={"habits": False, "tree_rounds": 0})
    config = trained.model_copy(update={"model": model})
    assert build_run(config, Store.open(trained.store)).second_opinions() == {}
