"""Text columns that hold numbers: refused with decimal commas, spoken of where a word stands among them."""

from __future__ import annotations

import duckdb
import pytest

from supermoe.data.numerals import suspect
from supermoe.typed_yaml import UserError

LISTS = ("3,50", "1,2,3", "4,5,6", "7,8,9", "12,34,56")


def look_at(*values):
    con = duckdb.connect()
    con.execute("CREATE TABLE log_sample AS SELECT unnest(?::VARCHAR[]) AS x", [values])
    return suspect(con, ["x"])


@pytest.mark.parametrize("values", [("3,50", None), ("-3,5", "4", "12"), ("1.234,50", "1,0")])
def test_decimal_commas_are_refused(values):
    with pytest.raises(UserError, match=r"data\.fields: the column 'x' .* decimal: ',' .* data\.fields, x: category"):
        look_at(*values)


@pytest.mark.parametrize("number", ["7", "-0.5", "1e-3"])
def test_numbers_with_a_word_among_them_are_spoken_of(number):
    (note,) = look_at(*[number] * 19, "NA")
    assert "'x'" in note
    assert "95% of its values are numbers" in note
    assert "nulls: ['NA']" in note


def test_half_of_the_values_may_be_one_word():
    assert "50% of its values are numbers, as it also holds 'NULL'" in look_at("3.5", "NULL", "4", "NULL")[0]


WORDS = ("milk", "bread", "beer", "wine", "7")


@pytest.mark.parametrize(
    "values", [(), (None,), WORDS, LISTS, ("007", "12", "742"), ("7", "8"), ("1_000", "a"), ("a, b",)], ids=str
)
def test_names_are_names(values):
    assert look_at(*values) == []
