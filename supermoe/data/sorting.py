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
    users: str | None,
    folder: Path,
) -> None:
    """Write the sorted log into `folder`; make the views `log` and `log_sample` over it, and the table `active`.

    events: SELECT of "user", time, file_order and whatever `columns` (name -> SQL) read. `constants`: texts that stand
    in every row, which need not be sorted. `log_sample` has about `SAMPLE_ROWS` rows of the same columns, chosen by a
    fixed scrambling of the row number. `user_row` is the rank among the log's users and those of the view `users`.
    active("user", num_events): users of the log.
    """
    key, of_events, of_users = '"user"', "", ""
    if user_type == "VARCHAR":  # numbers are sorted in a fraction of the time that texts take
        known = f'SELECT "user" FROM ({events})' + (f' UNION ALL SELECT "user" FROM {users}' if users else "")
        con.execute(
            'CREATE OR REPLACE TEMP TABLE ranks AS SELECT "user", CAST(row_number() OVER (ORDER BY "user") AS '
            f"UINTEGER) AS _rank FROM (SELECT DISTINCT * FROM ({known}))"
        )
        key, of_events, of_users = "_rank", 'JOIN ranks USING ("user")', "JOIN ranks ON _rank = _key"
    listed = np.zeros(0, np.int64)
    if users:
        listed = con.execute(f"SELECT {key} AS key FROM {users} {of_events} ORDER BY key").fetchnumpy()["key"]
    selected = ", ".join([f"{key} AS _key", "time", *(f"{sql} AS {quote(name)}" for name, sql in columns.items())])
    names = ", ".join(["time", *map(quote, columns)])
    by_user = f"SELECT {selected}, file_order FROM ({events}) {of_events}"
    sorted_rows = con.sql(f"SELECT _key, {names} FROM ({by_user}) ORDER BY _key, time, file_order")
    con.register("numbered", _write(sorted_rows.to_arrow_reader(GROUP_ROWS), num_events, listed, folder))
    user = '"user"' if of_users else '_key AS "user"'
    counted = f"SELECT {user}, num_events FROM numbered {of_users} ORDER BY _key"
    con.execute(f"CREATE OR REPLACE TEMP TABLE active AS {counted}")
    con.unregister("numbered")
    names = ", ".join([names, *(f"{text(value)} AS {quote(name)}" for name, value in constants.items())])
    for view, row in (("log", "file_row_number"), ("log_sample", "row")):
        con.execute(
            f"CREATE OR REPLACE VIEW {view} AS SELECT user_row::BIGINT AS user_row, position::BIGINT AS position, "
            f"{names}, {row} AS row FROM read_parquet({text(str(folder / f'{view}.parquet'))})"
        )


class _Numbering:
    """Whose are the next rows of the log, and which of their user's are they.

    `listed`: rising keys of the users table, who count whether they have events or not.
    """

    def __init__(self, num_events: int, listed: np.ndarray):
        self.dtype = np.uint32 if num_events + len(listed) < 2**32 else np.int64
        self._listed = listed
        self._keys, self._first_rows = [listed[:0]], [np.zeros(0, np.int64)]  # of users with events, batch by batch
        self._num_rows, self._num_unlisted = 0, 0
        self._last: tuple[Any, int, int] = (None, 0, 0)  # key, user_row and first row of the user whose rows may go on

    def take(self, key: np.ndarray) -> dict[str, np.ndarray]:
        """user_row, position and row of the next rows; a change of `key` is where another user's begin."""
        row = np.arange(self._num_rows, self._num_rows + len(key))
        last_key, last_user, last_first = self._last
        begins = np.flatnonzero(np.append(key[0] != last_key, key[1:] != key[:-1]))
        users = np.append(last_user, self._user_rows(key[begins]))  # the last one so far may go on
        firsts = np.append(last_first, row[begins])
        lengths = np.diff(begins, prepend=0, append=len(key))
        self._keys.append(key[begins])
        self._first_rows.append(row[begins])
        self._num_rows += len(key)
        self._last = key[-1], int(users[-1]), int(firsts[-1])
        position = (row - np.repeat(firsts, lengths)).astype(self.dtype)
        return {"user_row": np.repeat(users.astype(self.dtype), lengths), "position": position, "row": row}

    def _user_rows(self, key: np.ndarray) -> np.ndarray:
        """Ranks of the next users among those with events and those listed."""
        below = np.searchsorted(self._listed, key)
        is_listed = np.searchsorted(self._listed, key, side="right") - below
        unlisted = self._num_unlisted + np.cumsum(1 - is_listed)
        self._num_unlisted += int((1 - is_listed).sum())
        return below + unlisted - (1 - is_listed)

    def users(self) -> pa.Table:
        """_key and num_events of all users with events so far."""
        key, first_row = np.concatenate(self._keys), np.concatenate(self._first_rows)
        return pa.table({"_key": key, "num_events": np.diff(np.append(first_row, self._num_rows))})


def _write(reader: pa.RecordBatchReader, num_events: int, listed: np.ndarray, folder: Path) -> pa.Table:
    """Write log.parquet and log_sample.parquet; returns the users with events, see `_Numbering`.

    A thread of its own numbers and writes while DuckDB merges.
    """
    numbering = _Numbering(num_events, listed)
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

        def write(table: pa.Table) -> None:
            numbers = numbering.take(table["_key"].to_numpy())
            table, row = table.remove_column(0), numbers["row"]
            for name in ("user_row", "position"):
                table = table.append_column(name, pa.array(numbers[name]))
            log.write_table(table, row_group_size=GROUP_ROWS)
            scrambled = row.astype(np.uint32) * np.uint32(2654435761)
            chosen = np.flatnonzero(scrambled < int(share * 2**32))
            sample.write_table(table.take(chosen).append_column("row", pa.array(row[chosen])))

        writing: Future[Any] = thread.submit(int)
        for table in in_portions(reader, GROUP_ROWS):
            writing.result()
            writing = thread.submit(write, table)
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
