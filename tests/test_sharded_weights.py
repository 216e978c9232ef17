"""Weights to and from one file; of sharded models see test_parallelize.py (the best weights)."""

from __future__ import annotations

import time
from pathlib import Path
from unittest.mock import patch

import pytest
import ranks
import torch

from supermoe.config import DistributedConfig
from supermoe.distributed.mesh import World, start
from supermoe.model.weights import write_weights
from supermoe.training.sharded_weights import load_weights, save_weights
from supermoe.typed_yaml import UserError


def test_weights_are_filled_in_place_from_the_file_that_was_published(tmp_path: Path) -> None:
    saved, loaded = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    save_weights(saved, tmp_path / "folder" / "w", World())
    place = loaded.weight.data_ptr()
    load_weights(loaded, tmp_path / "folder" / "w", "")
    assert torch.equal(loaded.weight, saved.weight)
    assert loaded.weight.data_ptr() == place
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["w"]


def test_weights_of_another_model_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    save_weights(torch.nn.Linear(3, 2), tmp_path / "w", World())
    with pytest.raises(UserError, match="does not hold the weights of this model; train again"):
        load_weights(torch.nn.Linear(3, 2, bias=False), tmp_path / "w", "train again")
    (tmp_path / "w").write_bytes(b"")
    with pytest.raises(UserError, match=r"is truncated or damaged .*; train again"):
        load_weights(torch.nn.Linear(3, 2), tmp_path / "w", "train again")


def test_no_rank_reads_weights_before_they_are_published(tmp_path: Path) -> None:
    ranks.launch(2, save_twice, tmp_path)


def save_twice(folder: Path) -> None:
    """Ranks read what was saved last, though the first takes its time to write it."""
    with start(DistributedConfig()) as world, patch(f"{save_weights.__module__}.write_weights", slowly):
        for value in (1.0, 2.0):
            model = torch.nn.Linear(3, 2)
            torch.nn.init.constant_(model.weight, value)
            save_weights(model, folder / "w", world)
            read = torch.nn.Linear(3, 2)
            load_weights(read, folder / "w", "")
            assert (read.weight == value).all()
            world.first(lambda: None)


def slowly(*args) -> None:
    time.sleep(0.5)
    write_weights(*args)
