"""Modules by a name that the user chose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


class ByName(nn.ModuleDict):
    """A `ModuleDict` where any name will do, also one that `nn.Module` uses itself, such as `type`, `train` or `keys`.

    In parameter names the key is followed by an underscore: `tables.type_.weight`.
    """

    def __getitem__(self, name: str) -> Any:
        return super().__getitem__(f"{name}_")

    def __setitem__(self, name: str, module: nn.Module) -> None:
        super().__setitem__(f"{name}_", module)

    def __contains__(self, name: object) -> bool:
        return super().__contains__(f"{name}_")

    def __iter__(self) -> Iterator[str]:
        return (key[:-1] for key in self._modules)

    def keys(self) -> Any:
        return dict.fromkeys(self).keys()

    def items(self) -> Any:
        return dict(zip(self, self._modules.values(), strict=True)).items()
