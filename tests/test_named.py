"""Modules under names that users choose."""

from __future__ import annotations

import pytest
from torch import nn

from supermoe.model.named import ByName


@pytest.mark.parametrize("name", ["type", "keys", "train", "weight", "forward"])
def test_any_name_will_do(name: str) -> None:
    modules = ByName({name: nn.Linear(1, 2)})
    assert isinstance(modules[name], nn.Linear)
    assert name in modules
    assert f"{name}_" not in modules
    assert list(modules) == list(modules.keys()) == [name]
    assert [key for key, _ in modules.items()] == [name]
    assert [key for key, _ in modules.named_parameters()] == [f"{name}_.weight", f"{name}_.bias"]
