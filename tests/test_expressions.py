"""Users' SQL: what is refused, what an expression over no rows is worth."""

from __future__ import annotations

import duckdb
import pytest

from supermoe.data.expressions import check, check_events, column_names, evaluate, holds, of_types, over_nothing
from supermoe.typed_yaml import UserError

ROWS = "SELECT * FROM (VALUES (4, 'a', 1.0), (4, 'b', 2.0), (6, 'a', NULL)) AS t(_example, kind, amount)"


@pytest.fixture
def con():
    return duckdb.connect()


@pytest.mark.parametrize(
    "sql",
    [
        "count(*)",
        "sum(amount) FILTER (WHERE kind = 'a')",
        "list(DISTINCT kind ORDER BY kind)",
        "count(*) > 1 -- often",
        "CASE WHEN max(amount) > 1 THEN 1 END",
    ],
)
def test_one_expression_is_allowed(con, sql):
    check(con, sql, "key")
    assert evaluate(con, ROWS, {"value": sql}, "key").num_rows == 2


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("(SELECT count(*) FROM log)", "a sub-select"),
        ("max(amount) > (SELECT 1)", "a sub-select"),
        ("EXISTS (SELECT 1 FROM log)", "a sub-select"),
        ("'a' IN (SELECT kind FROM log)", "a sub-select"),
        ("sum(sum(amount)) OVER ()", "a window function"),
        ("1), (2", "not valid SQL"),
        ("1 FROM log", "expected one SQL expression"),
        ("1 UNION SELECT 2", "expected one SQL expression"),
        ("*", "expected one SQL expression"),
        ("*, 1", "expected one SQL expression"),
        ("1; SELECT 2", "expected one SQL expression"),
        ("1) FROM log --", "not valid SQL"),
        ("count(", "not valid SQL"),
        ("", "not valid SQL"),
    ],
)
def test_anything_else_is_refused(con, sql, words):
    with pytest.raises(UserError, match=r"features\.f\.sql\.x") as refused:
        check(con, sql, "features.f.sql.x")
    assert words in str(refused.value)


def test_columns_of_an_expression(con):
    assert column_names(con, "sum(amount) FILTER (WHERE kind = 'amounts') / count(\"odd name\")") == {
        "amount",
        "kind",
        "odd name",
    }


def test_values_per_example(con):
    table = evaluate(con, ROWS, {"n": "count(*)", "total": "sum(amount)"}, "key").sort_by("_example")
    assert table.to_pydict() == {"_example": [4, 6], "n": [2, 1], "total": [3.0, None]}


def test_an_error_names_the_key_and_the_columns(con):
    with pytest.raises(UserError, match=r"^tasks\.t\.label\.sql: .*amuont.*Columns at hand: kind, amount\.$"):
        evaluate(con, ROWS, {"value": "sum(amuont)"}, "tasks.t.label.sql")


def test_over_nothing(con):
    expressions = {"n": "count(*)", "total": "sum(amount)", "always": "true"}
    assert over_nothing(con, ROWS, expressions, "key") == {"n": 0, "total": None, "always": True}


def test_conditions_count_null_as_no_and_cover_examples_without_rows(con):
    assert holds(con, ROWS, "count(*) > 1", 3, 4, "key").tolist() == [False, True, False, False]
    assert holds(con, ROWS, "sum(amount) > 0", 3, 4, "key").tolist() == [False, True, False, False]
    assert holds(con, ROWS, "count(*) < 2", 3, 4, "key").tolist() == [True, False, True, True]
    assert holds(con, ROWS, "true", 3, 4, "key").all()


def test_event_types(con):
    assert of_types(None) == "true"
    kept = con.execute(
        "SELECT count(*) FROM (SELECT unnest(['a', 'it''s', 'c']) AS event) WHERE "
        f"{of_types(['it' + chr(39) + 's', 'c'])}"
    )
    assert kept.fetchall() == [(2,)]
    check_events(["a"], ["a", "b"], "key")
    with pytest.raises(UserError, match=r"^key: the log has no events of type 'purchse', did you mean 'purchase'\?"):
        check_events(["purchse"], ["purchase", "view"], "key")
