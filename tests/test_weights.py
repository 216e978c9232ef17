from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

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


def test_every_dtype_is_read_back_by_the_library_itself(tmp_path: Path) -> None:
    model = torch.nn.Module()
    for i, dtype in enumerate(weights._DTYPES):
        model.register_buffer(f"b{i}", torch.tensor([[0, 1], [1, 0], [1, 1]]).to(dtype))
    model.register_buffer("scalar", torch.tensor(7))
    model.register_buffer("empty", torch.zeros(0, 3))
    save_weights(model, tmp_path / "w")
    found = load_file(tmp_path / "w")
    assert found.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_a_full_disk_is_an_error_of_the_operating_system() -> None:
    with pytest.raises(OSError, match="No space left on device"):
        save_weights(torch.nn.Linear(100, 100), Path("/dev/full"))
