"""STUB with final signatures: vocabularies of category fields and quantile knots of numbers, fitted on training time only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa


@dataclass(frozen=True)
class Vocabulary:
    """Values of one category field: row i has id i + 2; or hashing into `hash_size` rows where `values` is None.

    `table`: a DuckDB table vocab_<field>(value, id INTEGER) exists on the connection after `register` (not for hashed fields).
    """

    field: str
    values: pa.Array | None
    counts: np.ndarray | None
    hash_size: int | None = None

    @property
    def size(self) -> int:
        """Ids run from 0 to size - 1."""
        raise NotImplementedError

    def encode(self, values: pa.Array) -> np.ndarray:
        """values -> int32 ids: 0 for null, 1 for unknown."""
        raise NotImplementedError

    def register(self, con) -> None:
        """Create the table vocab_<field>(value, id) on `con`."""
        raise NotImplementedError

    def lookup_sql(self, value: str) -> tuple[str, str]:
        """SQL fragments (join, id) for the value expression: `SELECT {id} FROM t {join}`; null -> 0, unknown -> 1."""
        raise NotImplementedError


@dataclass(frozen=True)
class Vocabularies:
    """`categories`: field -> Vocabulary (kinds category and categories); `knots`: number field -> float64 ascending."""

    categories: dict[str, Vocabulary]
    knots: dict[str, np.ndarray]


def fit(staged: Any, training_sql: str) -> Vocabularies:
    """Fit on the rows of `log` for which the predicate `training_sql` holds."""
    raise NotImplementedError


def load(folder: Path, fields: dict[str, Any]) -> Vocabularies:
    """Read what `save` wrote."""
    raise NotImplementedError


def save(vocabularies: Vocabularies, folder: Path) -> None:
    """Write vocab/<field>.parquet for every field."""
    raise NotImplementedError


def quantile_knots(values: np.ndarray, size: int = 65) -> np.ndarray:
    """Values -> up to `size` strictly ascending float64 knots (NaN ignored); empty when there is no value."""
    raise NotImplementedError


def normalise(values: np.ndarray, knots: np.ndarray) -> np.ndarray:
    """Values -> float32 in [0, 1], piecewise linear between the knots, clipped outside; NaN stays NaN."""
    raise NotImplementedError


def save_feature_knots(knots: dict[str, np.ndarray], folder: Path) -> None:
    """Write <folder>/features.parquet (columns feature, knots), in feature order."""
    raise NotImplementedError


def load_feature_knots(folder: Path) -> dict[str, np.ndarray]:
    """Read what `save_feature_knots` wrote."""
    raise NotImplementedError
