"""Several opened tables as one source; what is refused is in test_sources.py."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from supermoe.data.opening import open_files, open_frame
from supermoe.data.reading import TimedColumns
from supermoe.data.tables import EventTable, attach

DAY = dt.datetime(2020, 1, 1)


def test_file_order_runs_on_over_the_tables_and_missing_columns_are_null():
    con = duckdb.connect()
    first = open_frame(con, pa.table({"user": [1, 2], "time": [DAY, DAY], "a": [10, 20]}), "f1", "events.x")
    second = open_frame(con, pa.table({"user": [1], "time": [DAY], "b": ["z"]}), "f2", "events.y")
    tables = attach(
        con,
        [EventTable(first, TimedColumns(), "x"), EventTable(second, TimedColumns(), "y")],
        users=None,
        items=None,
        tables={"again": (first, TimedColumns())},
        drop_null_users=False,
    )
    assert tables.users is None
    found = con.execute(f'SELECT "user", event, a, b FROM {tables.events} ORDER BY file_order').fetchall()
    assert found == [(1, "x", 10, None), (2, "x", 20, None), (1, "y", None, "z")]
    assert con.execute(f"SELECT file_order FROM {tables.events} ORDER BY 1").fetchall() == [(0,), (1,), (2,)]
    assert con.execute(f'SELECT "user", a FROM {tables.tables["again"]}').fetchall() == [(1, 10), (2, 20)]


@pytest.mark.parametrize(("second", "kind"), [("rows.parquet", "UINTEGER"), ("rows.csv", "BIGINT")])
def test_file_order_is_short_where_all_sizes_are_known(tmp_path: Path, second: str, kind: str) -> None:
    con, table = duckdb.connect(), pa.table({"user": [1], "time": [DAY]})
    pq.write_table(table, tmp_path / "rows.parquet")
    csv.write_csv(table, tmp_path / "rows.csv")
    raws = [open_frame(con, table, "frame", "events.x"), open_files(con, str(tmp_path / second), "events.y", "time")]
    events = [EventTable(raw, TimedColumns(), name) for raw, name in zip(raws, "xy", strict=True)]
    tables = attach(con, events, users=None, items=None, tables={}, drop_null_users=False)
    found = con.execute(f"SELECT event, typeof(file_order) FROM {tables.events} ORDER BY file_order").fetchall()
    assert found == [("x", kind), ("y", kind)]
