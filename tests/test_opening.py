"""Files found, sorted and looked at before anything is read."""

from __future__ import annotations

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from supermoe.data.opening import find_files, open_files, open_frame
from supermoe.typed_yaml import UserError


def test_a_folder_gives_all_its_data_files_sorted(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.csv", "deep/a.csv", "notes.txt"):
        (tmp_path / name).write_text("user\n1\n")
    assert find_files(str(tmp_path), "key") == [str(tmp_path / "b.csv"), str(tmp_path / "deep/a.csv")]
    assert find_files(f"{tmp_path}/*.csv", "key") == [str(tmp_path / "b.csv")]
    assert len(find_files(f"{tmp_path}/**/*.csv", "key")) == 2


def test_time_columns_of_csv_stay_text(tmp_path):
    (tmp_path / "e.csv").write_text("at,n\n2020-01-01,5\n")
    con = duckdb.connect()
    assert open_files(con, str(tmp_path / "e.csv"), "key").types == {"at": "DATE", "n": "BIGINT"}
    raw = open_files(con, str(tmp_path / "e.csv"), "key", time_column="at")
    assert raw.types == {"at": "VARCHAR", "n": "BIGINT"}
    assert con.execute(raw.ordered).fetchall() == [("2020-01-01", 5, 0, str(tmp_path / "e.csv"))]


def test_duplicate_columns_of_parquet_are_seen_past_nested_ones(tmp_path):
    nested = pa.array([{"a": 1, "b": {"a": 2}}])
    pq.write_table(pa.table({"a": [1], "n": nested, "l": [[1]]}), tmp_path / "fine.parquet")
    assert list(open_files(duckdb.connect(), str(tmp_path / "fine.parquet"), "key").types) == ["a", "n", "l"]
    pq.write_table(pa.table([pa.array([1]), nested, pa.array([2])], names=["a", "n", "a"]), tmp_path / "twice.parquet")
    with pytest.raises(UserError, match=r"twice\.parquet has two columns 'a'"):
        open_files(duckdb.connect(), str(tmp_path / "twice.parquet"), "key")


def test_frames_number_their_rows():
    con = duckdb.connect()
    raw = open_frame(con, pa.table({"x": ["b", "a"]}), "frame", "events")
    assert con.execute(raw.ordered).fetchall() == [("b", 0, "the frame"), ("a", 1, "the frame")]
