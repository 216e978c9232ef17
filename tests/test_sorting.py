"""The sorted log in its file: numbering over the edges of batches, the sample, and types that Parquet has not."""

from __future__ import annotations

import duckdb
import numpy as np
import pytest

from supermoe.data import sorting
from supermoe.data.fields import stored_sql
from supermoe.data.sorting import sort_log


def sorted_log(tmp_path, rows, user_type="BIGINT", users=None, **columns):
    """A connection with the views; `rows` is a SELECT of user, time and what the columns read."""
    con = duckdb.connect()
    con.execute(f"CREATE TABLE events AS SELECT *, row_number() OVER () AS file_order FROM ({rows})")
    if users:
        con.execute(f"CREATE VIEW users AS {users}")
    (num_events,) = con.execute("SELECT count(*) FROM events").fetchall()[0]
    view = "users" if users else None
    sort_log(con, "FROM events", columns, {"event": "it's"}, user_type, num_events, view, tmp_path)
    return con


RANDOM = "SELECT {user} AS user, make_timestamp((hash(i) % 50 * 1000000)::BIGINT) AS time, i AS n FROM range(3000) t(i)"
LISTED = "SELECT {user} AS user FROM range(90) t(i)"


@pytest.mark.parametrize(
    ("user", "user_type", "users"),
    [
        ("(hash(i, 1) % 400)::BIGINT", "BIGINT", None),
        ("(i % 40)::VARCHAR", "VARCHAR", None),
        ("(hash(i, 1) % 400)::BIGINT", "BIGINT", "i * 9 - 100"),
        ("(i % 40)::VARCHAR", "VARCHAR", "(i * 3)::VARCHAR"),
    ],
)
@pytest.mark.parametrize("batch_rows", [1, 7, 10_000])
def test_rows_are_numbered_by_user_and_position(tmp_path, monkeypatch, user, user_type, users, batch_rows):
    monkeypatch.setattr(sorting, "GROUP_ROWS", batch_rows)
    listed = users and LISTED.format(user=users)
    con = sorted_log(tmp_path, RANDOM.format(user=user), user_type, listed, n="n")
    everyone = 'SELECT DISTINCT "user" FROM events' + (f" UNION {listed}" if listed else "")
    con.execute(f'CREATE TABLE ranked AS SELECT "user", row_number() OVER (ORDER BY "user") - 1 AS r FROM ({everyone})')
    wanted = (
        'SELECT r, row_number() OVER (PARTITION BY "user" ORDER BY time, n) - 1, '
        "time, n, 'it''s', "
        'row_number() OVER (ORDER BY "user", time, n) - 1 FROM events JOIN ranked USING ("user") ORDER BY r, time, n'
    )
    assert con.execute("FROM log ORDER BY row").fetchall() == con.execute(wanted).fetchall()
    assert con.execute("FROM log_sample ORDER BY row").fetchall() == con.execute(wanted).fetchall()
    counted = 'SELECT "user", count(*) FROM events GROUP BY "user" ORDER BY "user"'
    assert con.execute("FROM active").fetchall() == con.execute(counted).fetchall()


def test_the_sample_of_a_long_log_is_spread_over_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sorting, "SAMPLE_ROWS", 2_000)
    rows = "SELECT 1 AS user, TIMESTAMP '2020-01-01' AS time, i AS n FROM range(20_000) t(i)"
    con = sorted_log(tmp_path, rows, n="n")
    sample = con.execute("SELECT n, row FROM log_sample").fetchnumpy()
    assert sample["n"].tolist() == sample["row"].tolist()
    assert len(sample["n"]) == pytest.approx(2_000, abs=140)  # 3 standard errors of a binomial count
    quantiles = np.quantile(sample["n"], np.linspace(0, 1, 65))
    assert quantiles == pytest.approx(np.linspace(0, 20_000, 65), abs=700)  # of a quantile of 2,000 rows


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("170141183460469231731687303715884105727::HUGEINT", "DOUBLE"),
        ("INTERVAL 3 DAY", "VARCHAR"),
        ("[INTERVAL 3 DAY]", "VARCHAR"),
        ("TIMETZ '10:00:00+01'", "VARCHAR"),
        ("'101'::BIT", "VARCHAR"),
        ("TIMESTAMPTZ '2020-01-01 00:00:00+01'", "TIMESTAMP WITH TIME ZONE"),
        ("1.25::DECIMAL(38, 2)", "DECIMAL(38,2)"),
        ("'x'::BLOB", "BLOB"),
        ("{'a': 1, 'b': ['x']}", "STRUCT(a INTEGER, b VARCHAR[])"),
        ("MAP {'a': DATE '2020-01-01'}", "MAP(VARCHAR, DATE)"),
        ("uuid()", "VARCHAR"),
        ("NULL", '"NULL"'),
    ],
)
def test_columns_of_every_type_are_kept(tmp_path, value, kept):
    rows = f"SELECT 1 AS user, TIMESTAMP '2020-01-01' AS time, {value} AS x"
    type_name = duckdb.sql(f"SELECT {value} AS x").types[0]
    con = sorted_log(tmp_path, rows, x=stored_sql("x", str(type_name), None))
    types = {row[0]: row[1] for row in con.execute("DESCRIBE log").fetchall()}
    assert types["x"] == kept or str(type_name) == '"NULL"'
    assert con.execute("SELECT count(*) FROM log").fetchall() == [(1,)]
