from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from supermoe import ops
from supermoe.config import RunConfig, load_run
from supermoe.data.store import Store
from supermoe.training import build
from supermoe.training.build import build_run, build_tasks, event_names, field_counts, id_values
from supermoe.typed_yaml import UserError, validate


@pytest.fixture(scope="module")
def config(trained_run: Path) -> RunConfig:
    return load_run(trained_run / "config.yaml")


@pytest.fixture(scope="module")
def store(config: RunConfig) -> Store:
    return Store.open(config.store)


def test_equal_configs_give_equal_runs_and_heads_start_at_the_prior(config: RunConfig, store: Store) -> None:
    first, second = build_run(config, store), build_run(config, store)
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    churn = first.model.heads["churn"]
    assert torch.sigmoid(churn.bias).item() == pytest.approx(first.tasks["churn"].prior.item(), rel=1e-5)
    assert set(first.heads) == {*config.tasks, "next_event__shop"}
    assert first.measured_split == "test"


def test_priors_come_from_training_examples_only(config: RunConfig, store: Store) -> None:
    labels = np.asarray(store.labels["spend"])[store.rows_of("train")]
    assert build_tasks(config, store)["spend"].state()["mean"] == pytest.approx(np.nanmean(labels, dtype=np.float64))


def test_counts_and_values_of_ids(store: Store) -> None:
    counts = field_counts(store)["type"]
    values = id_values(store, "type").to_pylist()
    assert values[:2] == [None, None]
    assert sorted(values[2:]) == ["beer", "bread", "milk", "nappies"]
    assert counts[:2].tolist() == [0, 0]
    assert (counts[2:-1] >= counts[3:]).all()
    assert event_names(store) == []  # all events are of one type


def test_another_seed_is_another_model(config: RunConfig, store: Store) -> None:
    other = config.model_copy(update={"seed": 1})
    a, b = (build_run(c, store).model.indicators.questions["user"].vector_D for c in (config, other))
    assert not torch.equal(a, b)


def test_a_task_whose_training_labels_are_all_equal_is_named(
    config: RunConfig, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(store.labels, "churn", np.ones(len(store.examples.split), np.float32))
    reason = r"tasks\.churn: in training all \d+ labels are 1, so there is nothing to learn: .*tasks\.churn=null"
    with pytest.warns(UserWarning, match=reason):
        task = build_tasks(config, store)["churn"]
    assert 0 < task.prior_loss < 0.1


def test_a_balancer_of_unknown_tasks_is_refused(config: RunConfig, store: Store) -> None:
    raw = config.model_dump(mode="json")
    raw["loss"]["balancer"] = {"type": "fixed", "weights": {"chrun": 2.0}}
    with pytest.raises(UserError, match="did you mean 'churn'"):
        build_run(validate(RunConfig, raw, "test"), store)


def test_the_config_names_the_back_end(config: RunConfig, store: Store) -> None:
    def named(backend: str | None) -> RunConfig:
        return config.model_copy(update={"training": config.training.model_copy(update={"backend": backend})})

    try:
        build_run(named("reference"), store)
        assert "forced" in ops.backends()["reference"]
        with pytest.raises(UserError, match=r"training\.backend: there is no ops backend 'tuttle'; known: .*tutel"):
            build_run(named("tuttle"), store)
    finally:
        build_run(named(None), store)
    assert "forced" not in ops.backends()["reference"]


@pytest.mark.parametrize(
    ("tasks", "few", "epochs", "patience"),
    [
        (["churn"], 1, 6, 5),
        (["churn"], 9, 9, 5),
        (["churn", "item"], 1, 30, 5),
        (["churn", "item"], 40, 40, 6),
        (["churn", "item"], 400, 100, 16),
    ],
)
def test_a_run_is_as_long_as_its_tasks_need(
    config: RunConfig,
    store: Store,
    tasks: list[str],
    few: int,
    epochs: int,
    patience: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "FEW_EXAMPLES", few * len(store.rows_of("train")))
    monkeypatch.setattr(build, "FEW_EVENTS", few * store.summary["events"])
    kept = {name: config.tasks[name] for name in tasks}
    training = config.training.model_copy(update={"epochs": None})
    trainer = build_run(config.model_copy(update={"tasks": kept, "training": training}), store).trainer
    assert trainer.num_steps == epochs * trainer.steps_per_epoch
    assert trainer.config.patience == patience


@pytest.mark.parametrize(("tasks", "epochs"), [(["churn"], 3), (["item"], 5), (["churn", "item"], 3)])
def test_large_logs_get_fewer_epochs(
    config: RunConfig, store: Store, tasks: list[str], epochs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {name: config.tasks[name] for name in tasks}
    training = config.training.model_copy(update={"epochs": None})
    config = config.model_copy(update={"tasks": kept, "training": training})
    monkeypatch.setattr(build, "ENOUGH_EXAMPLES", int(2.5 * len(store.rows_of("train"))))
    monkeypatch.setattr(build, "ENOUGH_EVENTS", int(4.5 * store.summary["events"]))
    heads = {name: task.head_spec() for name, task in build_tasks(config, store).items()}
    assert build.num_epochs(config, heads, store) == epochs


@pytest.mark.parametrize(("refit", "minutes"), [(True, 4.0), (False, 8.0)])
def test_a_refit_shares_the_minutes(config: RunConfig, store: Store, refit: bool, minutes: float) -> None:
    training = config.training.model_copy(update={"max_minutes": 8.0, "refit": refit})
    assert build_run(config.model_copy(update={"training": training}), store).trainer.config.max_minutes == minutes
