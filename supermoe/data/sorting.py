"""The external sort: the log in (user, time, file order), its rows numbered, as one Parquet file.

DuckDB sorts within its memory limit. Users are numbered by rank and the number of events of each is known beforehand,
so the sorted rows are numbered by counting as they stream by: what would have to be joined and sorted along, is not.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from supermoe.data.sql import quote, text

GROUP_ROWS = 122_880  # of the Parquet file: what one of DuckDB's threads reads at a time
BATCH_ROWS = 4 * GROUP_ROWS
SAMPLE_ROWS = 250_000  # in the sample of a longer log; a quantile found there is off by 0.1 % of the rows
DELAY = 2.0  # seconds before a bar shows
NUMBERING = ("user_row", "position", "time", "row")  # columns of the log that are not the source's


def sort_log(
    con: duckdb.DuckDBPyConnection,
    events: str,
    columns: dict[str, str],
    constants: dict[str, str],
    user_type: str,
    folder: Path,
) -> None:
    """Write the sorted log into `folder` and make the views `log` and `log_sample` over it, of the same columns.

    events: SELECT of "user", time, file_order and whatever `columns` (name -> SQL) read. `constants`: texts that stand
    in every row, which need not be sorted. The table people says how many events each user has. `log_sample` has about
    `SAMPLE_ROWS` rows, chosen by a fixed scrambling of the row number.
    """
    key, join = '"user"', ""
    if user_type == "VARCHAR":  # numbers are sorted in a fraction of the time that texts take
        key, join = "_rank", 'JOIN (SELECT user_row::UINTEGER AS _rank, "user" AS _user FROM people) ON "user" = _user'
    listed = ", ".join([f"{key} AS _key", "time", *(f"{sql} AS {quote(name)}" for name, sql in columns.items())])
    names = ", ".join(["time", *map(quote, columns)])
    numbering = _Numbering(con)
    by_user = f"SELECT {listed}, file_order FROM ({events}) {join}"
    sorted_rows = con.sql(f"SELECT {names} FROM ({by_user}) ORDER BY _key, time, file_order")
    with progress("sort the log", numbering.size) as bar:
        _write(sorted_rows.to_arrow_reader(BATCH_ROWS), numbering, bar, folder)
    names = ", ".join([names, *(f"{text(value)} AS {quote(name)}" for name, value in constants.items())])
    for view, row in (("log", "file_row_number"), ("log_sample", "row")):
        con.execute(
            f"CREATE OR REPLACE VIEW {view} AS SELECT user_row::BIGINT AS user_row, position::BIGINT AS position, "
            f"{names}, {row} AS row FROM read_parquet({text(str(folder / f'{view}.parquet'))})"
        )


class _Numbering:
    """Whose are the next rows of the log, and which of their user's are they."""

    def __init__(self, con: duckdb.DuckDBPyConnection):
        people = con.execute("SELECT user_row, num_events FROM people WHERE num_events > 0 ORDER BY user_row")
        found = people.fetchnumpy()
        self._user, self._end = found["user_row"], np.cumsum(found["num_events"].astype(np.int64))
        self.size = int(self._end[-1]) if len(self._end) else 0
        self.dtype = np.uint32 if max(self.size, self._user.max(initial=0)) < 2**32 else np.int64
        self.share = min(1.0, SAMPLE_ROWS / max(self.size, 1))
        self._row = 0

    def take(self, number: int) -> dict[str, np.ndarray]:
        """user_row, position and row of the next `number` rows."""
        first, end = self._row, self._row + number
        self._row = end
        low, high = np.searchsorted(self._end, [first, end - 1], side="right")
        ends = self._end[low : high + 1]
        starts = np.append(self._end[low - 1] if low else 0, ends[:-1])
        lengths = np.minimum(ends, end) - np.maximum(starts, first)
        row = np.arange(first, end)
        return {
            "user_row": np.repeat(self._user[low : high + 1].astype(self.dtype), lengths),
            "position": (row - np.repeat(starts, lengths)).astype(self.dtype),
            "row": row,
        }


def _write(reader: pa.RecordBatchReader, numbering: _Numbering, bar: tqdm, folder: Path) -> None:
    """Write log.parquet and log_sample.parquet; a thread of its own writes while DuckDB merges."""
    number = pa.from_numpy_dtype(numbering.dtype)
    schema = pa.schema([*reader.schema, ("user_row", number), ("position", number)])
    sample_schema = schema.append(pa.field("row", pa.int64()))
    with (
        pq.ParquetWriter(folder / "log.parquet", schema, **_encoding(schema)) as log,
        pq.ParquetWriter(folder / "log_sample.parquet", sample_schema, **_encoding(schema)) as sample,
        ThreadPoolExecutor(1) as thread,
    ):

        def write(table: pa.Table, row: np.ndarray) -> None:
            log.write_table(table, row_group_size=GROUP_ROWS)
            scrambled = row.astype(np.uint32) * np.uint32(2654435761)
            chosen = np.flatnonzero(scrambled < int(numbering.share * 2**32))
            sample.write_table(table.take(chosen).append_column("row", pa.array(row[chosen])))

        writing: Future[Any] = thread.submit(int)
        for table in in_portions(reader, BATCH_ROWS):
            numbers = numbering.take(len(table))
            for name in ("user_row", "position"):
                table = table.append_column(name, pa.array(numbers[name]))
            writing.result()
            writing = thread.submit(write, table, numbers["row"])
            bar.update(len(table))
        writing.result()


def _encoding(schema: pa.Schema) -> dict:
    """For files that live for minutes: nothing is packed but texts."""
    texts = [f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_dictionary(f.type)]
    return {"compression": "none", "use_dictionary": texts, "store_schema": False}


def in_portions(reader: pa.RecordBatchReader, rows: int) -> Iterator[pa.Table]:
    """At least `rows` rows at a time, but for the last ones."""
    batches: list[pa.RecordBatch] = []
    for batch in reader:
        batches.append(batch)
        if sum(map(len, batches)) >= rows:
            yield pa.Table.from_batches(batches)
            batches = []
    if batches:
        yield pa.Table.from_batches(batches)


@contextmanager
def progress(title: str, size: int) -> Iterator[tqdm]:
    """A bar over `size` events; its clock goes on while DuckDB reads, which may be half of the time."""
    done = threading.Event()
    with tqdm(total=size, desc=title, unit="event", unit_scale=True, delay=DELAY) as bar:

        def tick() -> None:
            pause = DELAY
            while not done.wait(pause):
                bar.refresh()
                pause = 0.5

        ticker = threading.Thread(target=tick, daemon=True)
        ticker.start()
        try:
            yield bar
        finally:
            done.set()
            ticker.join()
