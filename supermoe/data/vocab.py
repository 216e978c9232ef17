"""Vocabularies of category fields and quantile knots of numbers: fitted on training time, saved, loaded, applied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from supermoe.config import FieldConfig
from supermoe.data.disk import read_table
from supermoe.data.naming import measures_something, names_something
from supermoe.data.schema import FIRST_ID, PADDING, UNKNOWN
from supermoe.data.sql import quote

NUM_KNOTS = 65
MAX_TABLE = 2**22  # rows of a table from whole numbers to ids
FEW_AMOUNTS = 16  # whole numbers: of so few all that follow each other are taken for amounts
DENSE, SMOOTH = 0.5, 0.85  # of more, if so many follow each other, and frequencies do with such a correlation
COUNTED_BITS = 20  # whole numbers over a smaller range are counted in an array
COLUMNS_AT_ONCE = 32  # of the sample that knots are fitted on
FEATURES = "features.parquet"
REMEDY = "prepare the store again, or copy the whole model folder again"


@dataclass(frozen=True)
class Vocabulary:
    """Ids of one category field: row i of `values` has id i + 2; without values ids are hashes to `hash_size` rows."""

    name: str
    values: pa.Array | None = None
    counts: np.ndarray | None = None
    hash_size: int | None = None

    @property
    def size(self) -> int:
        """Ids run from 0 (absent) and 1 (unknown) to size - 1."""
        return FIRST_ID + (len(self.values) if self.values is not None else self.hash_size or 0)

    def encode_sql(self, column: str, type_name: str) -> str:
        """What to read from the log for `encode`: the column itself, or its hash, which DuckDB computes."""
        if self.hash_size is None:
            return column
        if type_name.endswith("[]"):
            return f"list_transform({column}, lambda x: {_hash_sql('x', self.hash_size)})"
        return _hash_sql(column, self.hash_size)

    def encode(self, values: pa.ChunkedArray) -> np.ndarray:
        """Values as read by `encode_sql` -> int32 ids: null 0, not in the vocabulary 1."""
        if self.values is None:
            return pc.fill_null(values, PADDING).to_numpy(zero_copy_only=False).astype(np.int32)
        if pa.types.is_null(values.type):
            return np.zeros(len(values), np.int32)
        if values.type == pa.int64() and self._id_table is not None:
            return self._look_up(values)
        rows = pc.index_in(_cast(values, self.values.type), value_set=self.values)
        ids = pc.add(pc.fill_null(rows, UNKNOWN - FIRST_ID), FIRST_ID).to_numpy(zero_copy_only=False)
        return np.where(values.is_null().to_numpy(zero_copy_only=False), PADDING, ids).astype(np.int32)

    @cached_property
    def _id_table(self) -> np.ndarray | None:
        """Whole numbers that lie close: ids of all from the smallest on, then unknown, absent. No hashing."""
        if self.values is None or self.values.type != pa.int64() or not len(self.values):
            return None
        values = self.values.to_numpy()
        if int(values.max()) - int(values.min()) > MAX_TABLE or values.max() > 2**62:
            return None
        offsets = values - self._smallest
        table = np.full(offsets.max() + 3, UNKNOWN, np.int32)
        table[offsets] = np.arange(FIRST_ID, self.size)
        table[-1] = PADDING
        return table

    @cached_property
    def holds_amounts(self) -> bool:
        """Whether the values are whole numbers that count or measure something, rather than name it.

        The field's name may say so. Otherwise: of amounts, 17 is nearly as frequent as 18; of ids that says nothing.
        The correlation of log frequencies of neighbours is .90 to .99 for amounts of several logs, at most .75 for
        their ids. Prices in cents are too sparse for that.
        """
        if self.values is None or self.counts is None or self.values.type != pa.int64() or len(self.values) < 3:
            return False
        if measures_something(self.name):
            return True
        if names_something(self.name):
            return False
        order = np.argsort(self.values.to_numpy())
        follows = np.diff(self.values.to_numpy()[order]) == 1
        log_counts = np.log(self.counts[order])
        if follows.mean() < DENSE or len(order) < FEW_AMOUNTS:
            return bool(follows.mean() >= DENSE)
        return bool(np.ptp(log_counts) > 0 and np.corrcoef(log_counts[:-1], log_counts[1:])[0, 1] >= SMOOTH)

    @cached_property
    def _smallest(self) -> np.int64:
        assert self.values is not None
        return self.values.to_numpy().min()

    def _look_up(self, values: pa.ChunkedArray) -> np.ndarray:
        assert self._id_table is not None
        numbers = pc.fill_null(values, 0).to_numpy()
        beyond = len(self._id_table) - 2
        # below the smallest wraps around to huge
        rows = np.minimum((numbers - self._smallest).view(np.uint64), np.uint64(beyond))
        if values.null_count:
            rows[values.is_null().to_numpy(zero_copy_only=False)] = beyond + 1
        return self._id_table[rows.view(np.int64)]

    def register(self, con: duckdb.DuckDBPyConnection) -> None:
        """Create the table vocab_<name>(value, id INTEGER) that `lookup_sql` joins with."""
        if self.values is None:
            return
        ids = pa.array(np.arange(FIRST_ID, self.size), pa.int32())
        con.register("vocabulary", pa.table({"value": self.values, "id": ids}))
        con.execute(f'CREATE OR REPLACE TABLE "vocab_{self.name}" AS SELECT * FROM vocabulary')
        con.unregister("vocabulary")

    def lookup_sql(self, value: str) -> tuple[str, str]:
        """(join, id): SQL fragments for the ids of the value expression, as in `SELECT {id} FROM t {join}`."""
        if self.hash_size is not None:
            return "", f"coalesce({_hash_sql(value, self.hash_size)}, 0)"
        table = f'"vocab_{self.name}"'
        join = f"LEFT JOIN {table} ON {table}.value = {value}"
        return join, f"CASE WHEN {value} IS NULL THEN 0 ELSE coalesce({table}.id, {UNKNOWN}) END"


@dataclass(frozen=True)
class Vocabularies:
    """All that is fitted on the events: ids per category field, ascending knots per number field."""

    categories: dict[str, Vocabulary] = field(default_factory=dict)
    knots: dict[str, np.ndarray] = field(default_factory=dict)

    def register(self, con: duckdb.DuckDBPyConnection) -> None:
        """Create the lookup tables of all vocabularies."""
        for vocabulary in self.categories.values():
            vocabulary.register(con)

    def save(self, folder: Path) -> None:
        """Write <folder>/<field>.parquet: columns value, count; or knot."""
        for name, vocabulary in self.categories.items():
            if vocabulary.values is not None:
                pq.write_table(
                    pa.table({"value": vocabulary.values, "count": vocabulary.counts}), folder / f"{name}.parquet"
                )
        for name, knots in self.knots.items():
            pq.write_table(pa.table({"knot": knots}), folder / f"{name}.parquet")


def _hash_sql(value: str, size: int) -> str:
    """Id by hashing; md5 of the text, so that it is the same in every version and on every machine."""
    return f"CAST({FIRST_ID} + md5_number_lower(CAST({value} AS VARCHAR)) % {size} AS INTEGER)"


def _cast(values: pa.ChunkedArray, target: pa.DataType) -> pa.ChunkedArray:
    """Values in the vocabulary's type; what does not convert becomes null, and so unknown."""
    try:
        return pc.cast(values, target)
    except pa.ArrowInvalid:
        return pa.chunked_array([[_convert(value, target) for value in values]], target)


def _convert(value: pa.Scalar, target: pa.DataType) -> pa.Scalar | None:
    try:
        return value.cast(target)
    except pa.ArrowInvalid:
        return None


# --- fitting ----------------------------------------------------------------------------------------------------------


def fit(con: duckdb.DuckDBPyConnection, fields: Mapping[str, FieldConfig], training_sql: str) -> Vocabularies:
    """Fit all fields on the rows of the view `log` for which `training_sql` holds, with DuckDB's bounded memory.

    Knots come from those of these rows that are in `log_sample`.
    """
    categories = {}
    con.execute(f"SET perfect_ht_threshold = {COUNTED_BITS}")
    for name, config in fields.items():
        if config.kind != "number" and config.hash_size is not None:
            categories[name] = Vocabulary(name, hash_size=config.hash_size)
        elif config.kind != "number":
            categories[name] = _fit_values(con, name, config, training_sql)
    con.execute("RESET perfect_ht_threshold")
    numbers = [name for name, config in fields.items() if config.kind == "number"]
    return Vocabularies(categories, _fit_knots(con, numbers, training_sql))


def _fit_values(con: duckdb.DuckDBPyConnection, name: str, config: FieldConfig, training_sql: str) -> Vocabulary:
    """The most frequent values, by falling count, ties by value."""
    value = f"unnest({quote(name)})" if config.kind == "categories" else quote(name)
    table = con.sql(
        f"SELECT value, count(*) AS count FROM (SELECT {value} AS value FROM log WHERE {training_sql}) "
        f"WHERE value IS NOT NULL GROUP BY value HAVING count(*) >= {config.min_count} "
        f"ORDER BY count DESC, value LIMIT {config.max_size}"
    ).to_arrow_table()
    values = table["value"].combine_chunks()
    return Vocabulary(name, values, table["count"].to_numpy())


def _fit_knots(con: duckdb.DuckDBPyConnection, names: list[str], training_sql: str) -> dict[str, np.ndarray]:
    knots: dict[str, np.ndarray] = {}
    for first in range(0, len(names), COLUMNS_AT_ONCE):
        some = names[first : first + COLUMNS_AT_ONCE]
        listed = ", ".join(f"CAST({quote(name)} AS DOUBLE) AS {quote(name)}" for name in some)
        columns = con.sql(f"SELECT {listed} FROM log_sample AS log WHERE {training_sql}").to_arrow_table()
        knots |= {name: quantile_knots(columns[name].to_numpy()) for name in some}
    return knots


def quantile_knots(values: np.ndarray, size: int = NUM_KNOTS) -> np.ndarray:
    """Values (NaN: missing) -> at most `size` strictly ascending float64 knots at quantiles; empty without values."""
    present = np.sort(values[~np.isnan(values)])
    if len(present) == 0:
        return np.zeros(0)
    rank = np.linspace(0, len(present) - 1, size)  # np.quantile would partition the values once for each
    return np.unique(np.interp(rank, np.arange(len(present)), present))


def normalise(values: np.ndarray, knots: np.ndarray) -> np.ndarray:
    """Values -> float32 in [0, 1]: piecewise linear between the knots, clipped outside; NaN stays."""
    if len(knots) == 0:
        return np.full(len(values), np.nan, np.float32)
    return np.interp(values, knots, np.linspace(0, 1, len(knots))).astype(np.float32)


# --- reading what was fitted ------------------------------------------------------------------------------------------


def load(folder: Path, fields: Mapping[str, FieldConfig]) -> Vocabularies:
    """Read what `Vocabularies.save` wrote for the given fields; a missing or damaged file is a `UserError`."""
    categories, knots = {}, {}
    for name, config in fields.items():
        if config.kind == "number":
            knots[name] = read_table(folder / f"{name}.parquet", REMEDY)["knot"].to_numpy()
        elif config.hash_size is not None:
            categories[name] = Vocabulary(name, hash_size=config.hash_size)
        else:
            table = read_table(folder / f"{name}.parquet", REMEDY)
            categories[name] = Vocabulary(name, table["value"].combine_chunks(), table["count"].to_numpy())
    return Vocabularies(categories, knots)


def save_feature_knots(folder: Path, knots: Mapping[str, np.ndarray]) -> None:
    """Write <folder>/features.parquet: columns feature, knots; in the order of the store's feature columns."""
    lists = pa.array(list(knots.values()), pa.list_(pa.float64()))
    pq.write_table(pa.table({"feature": pa.array(list(knots), pa.string()), "knots": lists}), folder / FEATURES)


def load_feature_knots(folder: Path) -> dict[str, np.ndarray]:
    """Read what `save_feature_knots` wrote."""
    table = read_table(folder / FEATURES, REMEDY)
    return {
        name: np.asarray(knots)
        for name, knots in zip(table["feature"].to_pylist(), table["knots"].to_pylist(), strict=True)
    }
