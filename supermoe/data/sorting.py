"""The external sort: the log in (user, time, file order), its rows numbered, as one Parquet file.

DuckDB sorts within its memory limit. Users and their events are numbered by counting as the sorted rows stream by: what
would have to be grouped before, joined and sorted along, is not.
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
SAMPLE_ROWS = 250_000  # in the sample of a longer log; a quantile found there is off by 0.1 % of the rows
DELAY = 2.0  # seconds before a bar shows
NUMBERING = ("user_row", "position", "time", "row")  # columns of the log that are not the source's


def sort_log(
    con: duckdb.DuckDBPyConnection,
    events: str,
    columns: dict[str, str],
    constants: dict[str, str],
    user_type: str,
    num_events: int,
    folder: Path,
) -> None:
    """Write the sorted log into `folder`; make the views `log` and `log_sample` over it, and the table `active`.

    events: SELECT of "user", time, file_order and whatever `columns` (name -> SQL) read. `constants`: texts that stand
    in every row, which need not be sorted. `log_sample` has about `SAMPLE_ROWS` rows of the same columns, chosen by a
    fixed scrambling of the row number. active(user_row, "user", first_row, num_events): users of the log in order.
    """
    key, join = '"user"', ""
    if user_type == "VARCHAR":  # numbers are sorted in a fraction of the time that texts take
        con.execute(
            'CREATE OR REPLACE TEMP TABLE ranks AS SELECT "user" AS _user, CAST(row_number() OVER (ORDER BY "user") AS '
            f'UINTEGER) AS _rank FROM (SELECT DISTINCT "user" FROM ({events}))'
        )
        key, join = "_rank", 'JOIN ranks ON "user" = _user'
    listed = ", ".join([f"{key} AS _key", "time", *(f"{sql} AS {quote(name)}" for name, sql in columns.items())])
    names = ", ".join(["time", *map(quote, columns)])
    by_user = f"SELECT {listed}, file_order FROM ({events}) {join}"
    sorted_rows = con.sql(f"SELECT _key, {names} FROM ({by_user}) ORDER BY _key, time, file_order")
    con.register("numbered", _write(sorted_rows.to_arrow_reader(GROUP_ROWS), num_events, folder))
    users = 'SELECT user_row, _key AS "user", first_row, num_events FROM numbered'
    if user_type == "VARCHAR":
        users = 'SELECT user_row, _user AS "user", first_row, num_events FROM numbered JOIN ranks ON _key = _rank'
    con.execute(f"CREATE OR REPLACE TEMP TABLE active AS {users} ORDER BY user_row")
    con.unregister("numbered")
    names = ", ".join([names, *(f"{text(value)} AS {quote(name)}" for name, value in constants.items())])
    for view, row in (("log", "file_row_number"), ("log_sample", "row")):
        con.execute(
            f"CREATE OR REPLACE VIEW {view} AS SELECT user_row::BIGINT AS user_row, position::BIGINT AS position, "
            f"{names}, {row} AS row FROM read_parquet({text(str(folder / f'{view}.parquet'))})"
        )


class _Numbering:
    """Whose are the next rows of the log, and which of their user's are they."""

    def __init__(self, num_events: int):
        self.dtype = np.uint32 if num_events < 2**32 else np.int64
        self._keys, self._first_rows = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]  # of users, batch by batch
        self._num_rows, self._num_users = 0, 0
        self._key: Any = None  # of the last user so far, whose rows may go on
        self._first_row = 0

    def take(self, key: np.ndarray) -> dict[str, np.ndarray]:
        """user_row, position and row of the next rows; a change of `key` is where another user's begin."""
        row = np.arange(self._num_rows, self._num_rows + len(key))
        begins = np.append(key[0] != self._key, key[1:] != key[:-1])
        new = np.cumsum(begins)  # users up to each row; 0: the last one so far
        first_rows = np.append(self._first_row, row[begins])
        user_row = self._num_users - 1 + new
        self._keys.append(key[begins])
        self._first_rows.append(row[begins])
        self._num_rows, self._num_users = self._num_rows + len(key), self._num_users + int(new[-1])
        self._key, self._first_row = key[-1], int(first_rows[-1])
        position = row - first_rows[new]
        return {"user_row": user_row.astype(self.dtype), "position": position.astype(self.dtype), "row": row}

    def users(self) -> pa.Table:
        """user_row, _key, first_row and num_events of all users so far."""
        key, first_row = np.concatenate(self._keys), np.concatenate(self._first_rows)
        num_events = np.diff(np.append(first_row, self._num_rows))
        columns = {"user_row": np.arange(len(key)), "_key": key, "first_row": first_row, "num_events": num_events}
        return pa.table(columns)


def _write(reader: pa.RecordBatchReader, num_events: int, folder: Path) -> pa.Table:
    """Write log.parquet and log_sample.parquet; returns the users that were met, see `_Numbering.users`.

    A thread of its own writes while DuckDB merges.
    """
    numbering = _Numbering(num_events)
    number = pa.from_numpy_dtype(numbering.dtype)
    schema = pa.schema([*list(reader.schema)[1:], ("user_row", number), ("position", number)])
    sample_schema = schema.append(pa.field("row", pa.int64()))
    share = min(1.0, SAMPLE_ROWS / max(num_events, 1))
    with (
        pq.ParquetWriter(folder / "log.parquet", schema, **_encoding(schema)) as log,
        pq.ParquetWriter(folder / "log_sample.parquet", sample_schema, **_encoding(schema)) as sample,
        ThreadPoolExecutor(1) as thread,
        progress("sort the log", num_events) as bar,
    ):

        def write(table: pa.Table, row: np.ndarray) -> None:
            log.write_table(table, row_group_size=GROUP_ROWS)
            scrambled = row.astype(np.uint32) * np.uint32(2654435761)
            chosen = np.flatnonzero(scrambled < int(share * 2**32))
            sample.write_table(table.take(chosen).append_column("row", pa.array(row[chosen])))

        writing: Future[Any] = thread.submit(int)
        for table in in_portions(reader, GROUP_ROWS):
            numbers = numbering.take(table["_key"].to_numpy())
            table = table.remove_column(0)
            for name in ("user_row", "position"):
                table = table.append_column(name, pa.array(numbers[name]))
            writing.result()
            writing = thread.submit(write, table, numbers["row"])
            bar.update(len(table))
        writing.result()
    return numbering.users()


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
