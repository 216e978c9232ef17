"""STUB with final signatures: the store, a folder of memory-mapped columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from supermoe.data.schema import Schema


class Column:
    """A .npy file written in pieces: `append(array)`, then `close()`; usable in `with`."""

    def append(self, values: np.ndarray) -> None:
        raise NotImplementedError


class StoreWriter:
    """Writes a store into a hidden sibling of `path`; `finish` moves it into place. `with StoreWriter(path) as writer:`"""

    folder: Path  # where files go until `finish`

    def __init__(self, path: Path):
        raise NotImplementedError

    def write(self, name: str, values: np.ndarray) -> None:
        """Write <name>.npy, e.g. name = 'examples/user' (folders are made)."""
        raise NotImplementedError

    def column(self, name: str, dtype: Any) -> Column:
        """A one-dimensional <name>.npy to be written in pieces."""
        raise NotImplementedError

    def read(self, name: str) -> np.ndarray:
        """Memory map of a column already written, e.g. 'events/time'."""
        raise NotImplementedError

    def finish(self, schema: Schema, fingerprint: str, summary: dict[str, Any]) -> Store:
        raise NotImplementedError


class Store:
    """An opened store; arrays are memory maps."""

    path: Path
    schema: Schema
    summary: dict[str, Any]
    fingerprint: str

    @classmethod
    def open(cls, path: Path) -> Store:
        raise NotImplementedError

    def array(self, name: str) -> np.ndarray:
        """Memory map of <name>.npy, e.g. 'events/time', 'examples/cut', 'examples/labels/churn'."""
        raise NotImplementedError
