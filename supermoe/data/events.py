"""The events of a store: the sorted log streamed from DuckDB, encoded batch by batch, appended to the columns."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from supermoe.config import FieldConfig
from supermoe.data.sorting import in_portions
from supermoe.data.sql import quote
from supermoe.data.staging import Staged
from supermoe.data.store import StoreWriter
from supermoe.data.vocab import Vocabularies, Vocabulary, normalise

BATCH_ROWS = 500_000


def write_events(staged: Staged, vocabularies: Vocabularies, writer: StoreWriter) -> int:
    """Write events/; returns the number of rows that repeat another row of their user and time in every column."""
    duplicates = _Duplicates()
    time = writer.column("events/time", np.int64)
    encoders = [_encoder(name, field, vocabularies, writer) for name, field in staged.fields.items()]
    with ThreadPoolExecutor() as pool:  # Arrow and numpy let go of the interpreter while they encode
        for batch in _stream(staged, vocabularies):
            encoded = pool.map(lambda encoder, batch=batch: encoder.append(batch[encoder.name]), encoders)
            seconds = batch["time"].to_numpy()
            time.append(seconds)
            duplicates.add(batch["user_row"].to_numpy(), seconds, batch["fingerprint"].to_numpy())
            list(encoded)  # raises what a thread raised
    for column in (time, *(column for encoder in encoders for column in encoder.columns)):
        column.close()
    return duplicates.count


def write_users(staged: Staged, writer: StoreWriter) -> None:
    """Write users.parquet in user_row order: user, offset and length of the history, attributes."""
    attributes = "".join(f", {quote(name)}" for name in staged.attributes)
    sql = f'SELECT "user", first_row AS "offset", num_events AS length{attributes} FROM people ORDER BY user_row'
    reader = staged.con.sql(sql).to_arrow_reader(BATCH_ROWS)
    with pq.ParquetWriter(writer.folder / "users.parquet", reader.schema) as file:
        for batch in reader:
            file.write_batch(batch)


def _stream(staged: Staged, vocabularies: Vocabularies) -> Iterator[pa.Table]:
    """The log in its order, at least `BATCH_ROWS` rows at a time.

    Columns: user_row, time in whole seconds, a hash of the whole row, and every field as its encoder reads it.
    """
    hashed = ", ".join(map(quote, ["time", *staged.column_types]))
    selected = ["user_row", "CAST(floor(epoch(time)) AS BIGINT) AS time", f"hash({hashed}) AS fingerprint"]
    for name, field in staged.fields.items():
        column = f"CAST({quote(name)} AS DOUBLE)"
        if field.kind != "number":
            column = vocabularies.categories[name].encode_sql(quote(name), staged.column_types[name])
        selected.append(f"{column} AS {quote(name)}")
    reader = staged.con.sql(f"SELECT {', '.join(selected)} FROM log").to_arrow_reader(BATCH_ROWS)
    with tqdm(total=staged.num_events, desc="encode events", unit="event", unit_scale=True, delay=2) as bar:
        for table in in_portions(reader, BATCH_ROWS):
            yield table
            bar.update(len(table))


# --- encoders: one batch of an Arrow column -> the store's files ------------------------------------------------------


class _Ids:
    def __init__(self, name: str, vocabulary: Vocabulary, writer: StoreWriter):
        self.name, self.vocabulary = name, vocabulary
        self.columns = [writer.column(f"events/{name}", np.int32)]

    def append(self, values: pa.ChunkedArray) -> None:
        self.columns[0].append(self.vocabulary.encode(values))


class _Numbers:
    def __init__(self, name: str, knots: np.ndarray, writer: StoreWriter):
        self.name, self.knots = name, knots
        self.columns = [writer.column(f"events/{name}", np.float32)]

    def append(self, values: pa.ChunkedArray) -> None:
        self.columns[0].append(normalise(values.to_numpy(), self.knots))


class _IdLists:
    def __init__(self, name: str, vocabulary: Vocabulary, writer: StoreWriter):
        self.name, self.vocabulary, self.end = name, vocabulary, 0
        self.columns = [writer.column(f"events/{name}", np.int32), writer.column(f"events/{name}.offsets", np.int64)]
        self.columns[1].append(np.zeros(1, np.int64))

    def append(self, values: pa.ChunkedArray) -> None:
        lengths = pc.fill_null(pc.list_value_length(values), 0).to_numpy().astype(np.int64)
        self.columns[0].append(self.vocabulary.encode(pc.list_flatten(values)))
        self.columns[1].append(self.end + np.cumsum(lengths))
        self.end += int(lengths.sum())


def _encoder(
    name: str, field: FieldConfig, vocabularies: Vocabularies, writer: StoreWriter
) -> _Ids | _Numbers | _IdLists:
    """The encoder of one field, with its columns opened."""
    if field.kind == "number":
        return _Numbers(name, vocabularies.knots[name], writer)
    kind = _Ids if field.kind == "category" else _IdLists
    return kind(name, vocabularies.categories[name], writer)


class _Duplicates:
    """Counts rows that repeat another row among those with the same user and time, batch by batch."""

    def __init__(self) -> None:
        self.count = 0
        self._rest = [np.array([-1]), np.zeros(1, np.int64), np.zeros(1, np.uint64)]  # nobody

    def add(self, user: np.ndarray, time: np.ndarray, marks: np.ndarray) -> None:
        """Take the next rows; `marks` are hashes of whole rows. The last tie is kept, as it may go on in the next."""
        if (user[0], time[0]) == (self._rest[0][0], self._rest[1][0]):
            user, time, marks = (np.concatenate(pair) for pair in zip(self._rest, (user, time, marks), strict=True))
        begins = np.append(True, (user[1:] != user[:-1]) | (time[1:] != time[:-1]))  # a tie, of one row or more
        tied = np.flatnonzero(~begins | np.append(~begins[1:], False))
        tie = np.cumsum(begins[tied])
        order = np.lexsort((marks[tied], tie))
        tie, sorted_marks = tie[order], marks[tied][order]
        self.count += int(((tie[1:] == tie[:-1]) & (sorted_marks[1:] == sorted_marks[:-1])).sum())
        last = len(begins) - 1 - int(np.argmax(begins[::-1]))
        kept = np.unique(marks[last:])
        self._rest = [np.full(len(kept), user[last]), np.full(len(kept), time[last]), kept]
