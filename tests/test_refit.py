"""The last training of a run, on validation examples as well."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from supermoe.config import RunConfig, load_run
from supermoe.data.sources import Frames
from supermoe.data.store import Store
from supermoe.train import train
from supermoe.training.build import build_run
from supermoe.training.refit import build_refit
from supermoe.typed_yaml import validate

WEIGHT = "indicators.features.project.weight"


def test_the_model_is_the_one_that_trained_on_validation_examples_too(trained_run: Path) -> None:
    model = load_file(trained_run / "model" / "model.safetensors")
    final = load_file(trained_run / "refit" / "checkpoints" / "best.safetensors")
    selected = load_file(trained_run / "checkpoints" / "best.safetensors")
    assert torch.equal(model[WEIGHT], final[WEIGHT])
    assert not torch.equal(final[WEIGHT], selected[WEIGHT])


def test_it_learns_from_validation_examples_for_the_best_share_of_the_schedule(
    trained_run: Path, tmp_path: Path
) -> None:
    config = load_run(trained_run / "config.yaml", [f"run={tmp_path}", f"data.store={trained_run / 'store'}"])
    run = build_run(config, Store.open(config.store))
    run.trainer.progress["best_share"] = 0.5
    again = build_refit(run)
    assert again.trainer.valid is None
    assert again.trainer.train.num_examples == run.trainer.train.num_examples + run.trainer.valid.num_examples
    assert again.tasks["segment"].num_users > run.tasks["segment"].num_users
    assert again.tasks["spend"].state() != run.tasks["spend"].state()  # its prior knows the new examples
    again.trainer.fit()
    assert again.trainer.step == np.ceil(again.trainer.num_steps / 2)


def test_without_a_test_cut_the_report_is_about_the_model_that_validation_has_not_taught(tmp_path: Path) -> None:
    config = tiny.make_config(tmp_path).model_dump(mode="json")
    config["data"]["splits"] = {"type": "time", "train": ["2020-08-01"], "valid": "2020-10-01"}
    config["tasks"] = {"churn": config["tasks"]["churn"]}
    config["training"]["max_steps"] = 2
    train(validate(RunConfig, config, "test"), Frames(events=tiny.make_log(), users=tiny.make_users()))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["split"] == "valid"
    run = build_run(load_run(tmp_path / "run" / "config.yaml"), Store.open(tmp_path / "run" / "store"))
    assert report["tasks"]["churn"]["metrics"] == pytest.approx(run.evaluate("valid").metrics["churn"])
    assert (tmp_path / "run" / "refit" / "checkpoints" / "best.safetensors").exists()
