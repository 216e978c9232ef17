"""Fixtures that several test files share."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder over the log of `tiny.make_log`; its events and users lie beside it. Not to be changed."""
    from tiny import make_model_folder

    return make_model_folder(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of `supermoe.train` over the log of `tiny.make_log`. Not to be changed: copy it."""
    import tiny

    from supermoe.config import RunConfig
    from supermoe.train import train
    from supermoe.typed_yaml import validate

    folder = tmp_path_factory.mktemp("trained")
    tiny.write_tables(folder)
    config = tiny.make_config(folder).model_dump(mode="json")
    config["tasks"]["item"] = {"type": "next_item", "label": {"next": "type", "window": "28d"}}
    config["loss"] = {"pretraining": {"next_event": {"type": "next_event", "fields": ["shop"]}}}
    config["training"] |= {"epochs": 2, "tokens_per_batch": 500, "threads": 1}
    train(validate(RunConfig, config, "test"))
    return folder / "run"


@pytest.fixture(scope="session")
def finished_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `world.make` filled. Not to be changed: use `world`."""
    import world

    folder = tmp_path_factory.mktemp("world")
    with contextlib.chdir(folder):
        world.make()
    return folder


@pytest.fixture
def world(finished_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `finished_world` that is the current folder."""
    folder = Path(shutil.copytree(finished_world, tmp_path / "world"))
    monkeypatch.chdir(folder)
    return folder
