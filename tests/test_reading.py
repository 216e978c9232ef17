"""Renaming and conversion of one table; what is refused is in test_sources.py."""

from __future__ import annotations

import datetime as dt

import duckdb
import pyarrow as pa

from supermoe.data.opening import open_frame
from supermoe.data.reading import Columns, TimedColumns, read

DAY = dt.datetime(2020, 1, 1)


def opened(table):
    con = duckdb.connect()
    con.execute("SET TimeZone = 'UTC'")
    return con, open_frame(con, table, "frame", "key")


def test_names_can_be_swapped():
    con, raw = opened(pa.table({"a": [1], "b": [2]}))
    one = read(con, raw, Columns(columns={"a": "b", "b": "a"}), required=())
    assert con.execute(f"SELECT a, b FROM ({one.sql})").fetchall() == [(2, 1)]


def test_types_say_what_the_select_gives():
    table = pa.table(
        {
            "user": pa.array([1], pa.int32()),
            "time": [DAY],
            "kind": [3],
            "x": pa.array([1.5], pa.float32()),
            "l": [["a"]],
        }
    )
    con, raw = opened(table)
    one = read(
        con, raw, TimedColumns(columns={"event": "kind"}), required=("user", "time"), constants={"where": "'here'"}
    )
    described = {row[0]: row[1] for row in con.execute(f"DESCRIBE {one.sql}").fetchall()}
    assert described == {**one.types, "file_order": "BIGINT"}
    assert one.types["user"] == "BIGINT"
    assert con.execute(f'SELECT event, "where" FROM ({one.sql})').fetchall() == [("3", "here")]


def test_ids_beyond_64_bits_and_uuids_are_text():
    con, raw = opened(pa.table({"user": pa.array([2**63 + 1], pa.uint64())}))
    one = read(con, raw, Columns(), required=("user",))
    assert con.execute(f'SELECT "user" FROM ({one.sql})').fetchall() == [(str(2**63 + 1),)]
