from __future__ import annotations

from pathlib import Path

import pytest
import torch

from supermoe.model import weights
from supermoe.model.weights import read_weights, save_weights
from supermoe.typed_yaml import UserError


def test_round_trip_of_tensors_that_are_not_contiguous(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    model.weight.data = torch.arange(6.0).view(3, 2).t()
    save_weights(model, tmp_path / "w")
    found = read_weights(tmp_path / "w", "")
    assert found.keys() == {"weight", "bias"}
    assert torch.equal(found["weight"], model.weight)


def test_missing_and_damaged_files_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="w: it is missing; copy it"):
        read_weights(tmp_path / "w", "copy it")
    save_weights(torch.nn.Linear(3, 2), tmp_path / "w")
    (tmp_path / "w").write_bytes((tmp_path / "w").read_bytes()[:-4])
    with pytest.raises(UserError, match=r"w is truncated or damaged .*; copy it"):
        read_weights(tmp_path / "w", "copy it")


def test_a_full_disk_is_an_error_of_the_operating_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args, **kwargs):
        raise weights.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        save_weights(torch.nn.Linear(1, 1), tmp_path / "w")
