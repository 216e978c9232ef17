"""Weights to and from one file in one process; from several ranks in test_parallelize.py (the best weights)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from supermoe.distributed.mesh import World
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
