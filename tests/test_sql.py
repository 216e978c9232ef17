"""Quoting survives DuckDB's parser; messages come out on one line."""

from __future__ import annotations

import duckdb
import pytest

from supermoe.data.sql import complaint, quote, text


@pytest.mark.parametrize("name", ["plain", 'with "quotes"', "it's", "select", "a b"])
def test_names_and_texts_come_back_as_they_were(name):
    con = duckdb.connect()
    assert con.execute(f"SELECT 1 AS {quote(name)}").description[0][0] == name
    assert con.execute(f"SELECT {text(name)}").fetchall() == [(name,)]


def test_complaint_is_one_line_without_the_query():
    with pytest.raises(duckdb.Error) as error:
        duckdb.connect().execute("SELECT nothing FROM nowhere")
    assert "nowhere" in complaint(error.value)
    assert "LINE" not in complaint(error.value)
    assert "\n" not in complaint(error.value)


def test_complaint_leaves_out_what_duckdb_suggests():
    with pytest.raises(duckdb.Error) as error:
        duckdb.connect().execute("SELECT sum('a'::BLOB)")
    assert complaint(error.value).endswith("You might need to add explicit type casts")
