from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_run import (
    FakeBatches,
    make_model,
    make_objective,
    make_run_batch,
    make_trainer,
    seesaw_balancer,
    weights,
)

from supermoe.config import TrainingConfig
from supermoe.data.batch import Batch
from supermoe.objectives.objective import NonFiniteLoss
from supermoe.training.metrics import read_metrics
from supermoe.training.trainer import BEST, Trainer
from supermoe.typed_yaml import UserError


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


OPTIONS = {"accumulate": 2, "ema": 0.9}


def finish(folder: Path, **options):
    trainer = make_trainer(folder, **options)
    trainer.resume()
    trainer.fit()
    return trainer


def outcome(trainer) -> tuple[dict, dict, dict]:
    """Last, averaged and best weights."""
    return weights(trainer.model), weights(trainer.average), weights(trainer.load_best())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of nine steps that nothing disturbed, and its outcome; every epoch ends with a short step."""
    trainer = finish(tmp_path_factory.mktemp("whole"), **OPTIONS)
    return trainer.folder, outcome(trainer)


def test_equal_seeds_give_equal_weights(whole, tmp_path: Path) -> None:
    again = outcome(finish(tmp_path, **OPTIONS))
    assert all(same(a, b) for a, b in zip(whole[1], again, strict=True))
    other = outcome(finish(tmp_path / "other", **OPTIONS, seed=1))
    assert not any(same(a, b) for a, b in zip(whole[1], other, strict=True))


@pytest.mark.parametrize("killed_at", [2, 12])
def test_a_killed_run_ends_with_the_same_weights(whole, tmp_path: Path, killed_at: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        finish(tmp_path, train=FakeBatches(5, fail_at=killed_at), **OPTIONS)
    torch.rand(3)  # a new process has another random state
    np.random.rand(3)
    resumed = finish(tmp_path, **OPTIONS)
    assert all(same(a, b) for a, b in zip(whole[1], outcome(resumed), strict=True))
    assert read_metrics(tmp_path) == read_metrics(whole[0])


@pytest.mark.parametrize("kind", ["gradnorm", "famo", "pcgrad", "seesaw"])
def test_a_balancer_continues_where_it_was(tmp_path: Path, kind: str) -> None:
    """One of each kind: gradients' norms, a second look at the batches, an aggregator, evaluations."""
    if kind == "pcgrad":
        pytest.importorskip("torchjd", reason="the extra `torchjd` is not installed")
    options: dict[str, Any] = {"balancer": {"balancer": kind}, "max_steps": 5, "checkpoint_every": 2}
    options |= {"evaluate_every": 2, "ema": None}
    if kind == "seesaw":
        options["balancer"] = seesaw_balancer(tmp_path)
    whole = finish(tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        finish(tmp_path / "killed", train=FakeBatches(5, fail_at=3), **options)
    resumed = finish(tmp_path / "killed", **options)
    assert same(weights(whole.model), weights(resumed.model))
    assert same(weights(whole.objective.balancer), weights(resumed.objective.balancer))
    assert read_metrics(tmp_path / "killed") == read_metrics(tmp_path / "whole")
    rows = [row for row in read_metrics(tmp_path / "whole") if row["kind"] == "train"]
    assert len({str((row["weight"], row.get("share"))) for row in rows}) > 1  # what was resumed had moved


def test_a_replay_tells_the_balancer_what_the_evaluations_of_another_run_found(tmp_path: Path) -> None:
    options: dict[str, Any] = {"balancer": seesaw_balancer(tmp_path), "max_steps": 4}
    first = finish(tmp_path / "first", evaluate_every=2, **options)
    (half, gains), (end, _) = first.progress["evaluations"]
    assert (half, end) == (0.5, 1.0)
    again = finish(tmp_path / "again", replay=first.progress["evaluations"], **options)
    assert gains.keys() == again.objective.tasks.keys()
    assert torch.equal(again.objective.balancer.weight_T, first.objective.balancer.weight_T)
    assert [row["weight"] for row in read_metrics(tmp_path / "again")] == [
        row["weight"] for row in read_metrics(tmp_path / "first") if row["kind"] == "train"
    ]


def test_a_balancer_that_needs_evaluations_says_when_there_are_none(tmp_path: Path) -> None:
    objective = make_objective(**seesaw_balancer(tmp_path))
    model, config = make_model(objective.tasks, objective.pretraining), TrainingConfig(epochs=1)
    with pytest.warns(UserWarning, match="there is no validation split: its weights stay as they start"):
        Trainer(model, objective, FakeBatches(5), None, config, folder=tmp_path, identity={})


class Deadly(FakeBatches):
    """Batches that send their own process a signal in the middle of training."""

    def __init__(self, number: int):
        super().__init__(5)
        self.number = number

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for batch in super().epoch(epoch, start):
            if self.served == 11:
                os.kill(os.getpid(), self.number)
            yield batch


def test_a_process_that_was_killed_continues(whole, tmp_path: Path) -> None:
    script = "import sys, test_trainer as t; t.finish(t.Path(sys.argv[1]), train=t.Deadly(9), **t.OPTIONS)"
    paths = f"{Path(__file__).parent}{os.pathsep}{Path(__file__).parents[1]}"
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", script, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    resumed = finish(tmp_path, **OPTIONS)
    assert all(same(a, b) for a, b in zip(whole[1], outcome(resumed), strict=True))


def test_a_terminated_run_saves_and_continues(whole, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="terminated after step 7, which is saved"):
        finish(tmp_path, train=Deadly(signal.SIGTERM), **OPTIONS, checkpoint_every=100)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    resumed = finish(tmp_path, **OPTIONS)
    assert all(same(a, b) for a, b in zip(whole[1], outcome(resumed), strict=True))


def test_a_finished_run_trains_no_further(whole) -> None:
    again = finish(whole[0], train=FakeBatches(5, fail_at=0), **OPTIONS)
    assert all(same(a, b) for a, b in zip(whole[1], outcome(again), strict=True))


def test_another_config_is_refused(whole) -> None:
    other = make_trainer(whole[0], identity={"seed": 5})
    with pytest.raises(UserError, match="seed was 0 and is now 5"):
        other.resume()


def test_training_learns_what_can_be_learnt(tmp_path: Path) -> None:
    trainer = finish(tmp_path, epochs=8, lr=2e-2, checkpoint_every=1000)
    rows = read_metrics(tmp_path)
    train = [row for row in rows if row["kind"] == "train"]
    assert len(train) == trainer.step == 40
    first, last = (np.mean([row["loss"]["churn"] for row in part]) for part in (train[:5], train[-5:]))
    assert last < 0.9 * first  # the first feature tells the label
    valid = [row for row in rows if row["kind"] == "valid"]
    assert [row["step"] for row in valid] == list(range(5, 41, 5))
    best = max(valid, key=lambda row: row["selection"])
    assert trainer.progress["best_gain"] == best["selection"]
    assert best["gain"]["churn"] > 0


def test_patience_and_max_steps_end_a_run(tmp_path: Path) -> None:
    assert finish(tmp_path / "a", max_steps=3).step == 3
    patient = finish(tmp_path / "b", epochs=50, patience=2, lr=1e-9, evaluate_every=1)
    assert patient.step == 3  # nothing improves on the first evaluation


def test_max_minutes_ends_a_run_with_an_evaluation(tmp_path: Path) -> None:
    trainer = finish(tmp_path, epochs=1000, max_minutes=1e-6)
    assert trainer.step == 1
    assert trainer.progress["best_step"] == 1


def test_without_a_validation_split_the_last_weights_are_kept(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.valid = None
    trainer.fit()
    last = weights(trainer.model)
    assert same(last, weights(trainer.load_best()))


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tmp_path: Path) -> None:
    train = FakeBatches(5)
    for batch in train.batches[1:]:
        batch.labels["spend"].fill_(torch.inf)
    trainer = make_trainer(tmp_path, train=train, checkpoint_every=1)
    with pytest.raises(NonFiniteLoss, match="the loss of 'spend' is inf"):
        trainer.fit()
    assert trainer.step < 5
    assert all(value.isfinite().all() for value in weights(trainer.model).values() if value.is_floating_point())


def test_routers_are_updated_once_per_step(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1, accumulate=2)
    trainer.fit()
    (router,) = trainer.model.routers()
    moves = router.bias_E.abs()
    assert ((moves == 0) | (moves == router.config.bias_rate)).all()
    assert moves.any()


def test_bf16_and_rowwise_tables_train(tmp_path: Path) -> None:
    trainer = finish(tmp_path, precision="bf16", table_optimizer="rowwise_adagrad", max_steps=4)
    rows = [row for row in read_metrics(tmp_path) if row["kind"] == "train"]
    assert all(np.isfinite(row["gradient_norm"]) for row in rows)
    assert make_run_batch(0).num_examples == 6
    assert trainer.step == 4


def test_best_weights_that_are_gone_are_not_replaced_by_others(whole, tmp_path: Path) -> None:
    trainer = make_trainer(Path(shutil.copytree(whole[0], tmp_path / "run")), **OPTIONS)
    trainer.resume()
    (trainer.folder / "checkpoints" / BEST).unlink()
    with pytest.raises(UserError, match=r"best\.safetensors: it is missing; delete .*checkpoints and run"):
        trainer.load_best()
