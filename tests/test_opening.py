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


def test_rows_are_numbered_over_the_files_of_a_set(tmp_path):
    for name, values in (("b", [3]), ("a", [1, 2])):
        pq.write_table(pa.table({"x": values}), tmp_path / f"{name}.parquet")
    con = duckdb.connect()
    raw = open_files(con, str(tmp_path), "key")
    assert raw.num_rows == 3
    assert con.execute(f"SELECT x, file_order FROM ({raw.ordered})").fetchall() == [(1, 0), (2, 1), (3, 2)]


def test_frames_number_their_rows():
    con = duckdb.connect()
    raw = open_frame(con, pa.table({"x": ["b", "a"]}), "frame", "events")
    assert con.execute(raw.ordered).fetchall() == [("b", 0, "the frame"), ("a", 1, "the frame")]


def read(folder, **files):
    """The rows of CSV files, read together."""
    for name, content in files.items():
        (folder / f"{name}.csv").write_text(content)
    con = duckdb.connect()
    return con.execute(f"SELECT * FROM {open_files(con, str(folder), 'key').scan}").fetchall()


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_first_line_tells_the_delimiter_of_csv(tmp_path, delimiter):
    assert read(tmp_path, a=f"x{delimiter}y\n1{delimiter}a\n") == [(1, "a")]


def test_quotes_are_read_wherever_they_come(tmp_path):
    rows = "1,plain\n" * 30_000 + '2,"two, ""quoted""\nlines"\n'  # after the rows that DuckDB would guess from
    assert read(tmp_path, a="x,y\n" + rows)[-1] == (2, 'two, "quoted"\nlines')


def test_csv_files_that_are_written_differently_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"a\.csv and .*b\.csv part their columns by different signs"):
        read(tmp_path, a="x,y\n1,2\n", b="x;y\n1;2\n")


def test_a_broken_row_is_named_even_where_it_hides_the_header(tmp_path):
    with pytest.raises(UserError, match=r"a\.csv is not a readable CSV file: .*Line: 4 .*3 Found: 4; mend the line"):
        read(tmp_path, a="x,y,z\n1,2,3\n1,2,3\n1,2,3,4\n1,2,3\n")
