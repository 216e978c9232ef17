"""SQL that users write: one aggregate expression, evaluated per example over rows that are all it can see.

Labels, features and eligibility are such expressions. They may not hold sub-selects or window functions, so the only
rows within their reach are those of the relation that they are evaluated on, and an example never sees another one's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from supermoe.data.sql import complaint, quote, text
from supermoe.typed_yaml import UserError, nearest

EXAMPLE = "_example"  # the column that says which example a row belongs to


def of_types(events: list[str] | None) -> str:
    """SQL condition on the column `event`: one of these types, or any for None."""
    if events is None:
        return "true"
    return f"event IN ({', '.join(text(event) for event in events)})"


def check_events(events: list[str] | None, event_types: Iterable[str], key: str) -> None:
    """Refuse event types that the log does not hold."""
    for event in events or []:
        if event not in event_types:
            raise UserError(f"{key}: the log has no events of type '{event}', {nearest(event, event_types)}.")


def check(con: duckdb.DuckDBPyConnection, sql: str, key: str) -> None:
    """Refuse what is not one expression over the rows at hand; `key` names the place in the config."""
    tree = _parse(con, sql)
    if tree["error"]:
        raise UserError(f"{key}: not valid SQL: {tree['error_message']} (in: {sql}).")
    select = tree["statements"][0]["node"]
    one = len(tree["statements"]) == 1 and select["type"] == "SELECT_NODE" and len(select["select_list"]) == 1
    if not one or select["from_table"]["type"] != "EMPTY" or select["select_list"][0]["class"] == "STAR":
        raise UserError(f"{key}: expected one SQL expression such as count(*) or sum(amount), got: {sql}.")
    for node in _nodes(select["select_list"]):
        if node.get("class") in ("SUBQUERY", "WINDOW"):
            what = "a sub-select" if node["class"] == "SUBQUERY" else "a window function"
            raise UserError(
                f"{key}: {what} could look beyond the example's own rows and is not allowed (in: {sql}); write one "
                "aggregate over them, for example count(*) FILTER (WHERE amount > 10)."
            )


def column_names(con: duckdb.DuckDBPyConnection, sql: str) -> set[str]:
    """Columns that a checked expression reads."""
    return {node["column_names"][-1] for node in _nodes(_parse(con, sql)) if node.get("class") == "COLUMN_REF"}


def _parse(con: duckdb.DuckDBPyConnection, sql: str) -> dict[str, Any]:
    return json.loads(con.execute("SELECT json_serialize_sql(?)", [f"SELECT {sql}"]).fetchall()[0][0])


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """All mappings inside a parse tree."""
    if isinstance(tree, dict):
        yield tree
        tree = list(tree.values())
    if isinstance(tree, list):
        for child in tree:
            yield from _nodes(child)


def evaluate(con: duckdb.DuckDBPyConnection, rows: str, expressions: Mapping[str, str], key: str) -> pa.Table:
    """One row per example that has rows, with a column for each expression (name -> SQL); errors are UserErrors.

    `rows` is a SELECT with a column `_example` beside those that expressions may use.
    """
    listed = ", ".join(f"(\n{sql}\n) AS {quote(name)}" for name, sql in expressions.items())
    return run(con, f"SELECT {EXAMPLE}, {listed} FROM ({rows}) AS rows GROUP BY {EXAMPLE}", rows, key)


def run(con: duckdb.DuckDBPyConnection, query: str, rows: str, key: str) -> pa.Table:
    """Run a query that holds a user's SQL over `rows`; an error names the key, DuckDB's message and the columns."""
    try:
        return con.sql(query).to_arrow_table()
    except duckdb.Error as error:
        columns = [row[0] for row in con.execute(f"DESCRIBE SELECT * FROM ({rows})").fetchall() if row[0] != EXAMPLE]
        raise UserError(f"{key}: {complaint(error)}. Columns at hand: {', '.join(columns)}.") from None


def over_nothing(con: duckdb.DuckDBPyConnection, rows: str, expressions: Mapping[str, str], key: str) -> dict[str, Any]:
    """Value of each expression over no rows at all (0 for count, null for sum): what an example without rows gets."""
    values = {}
    for name, sql in expressions.items():
        table = run(
            con,
            f"SELECT (\n{sql}\n) AS value, count(*) FROM ({rows} LIMIT 0) AS rows",
            rows,
            f"{key}.{name}" if name else key,
        )
        values[name] = table["value"][0].as_py()
    return values


def holds(con: duckdb.DuckDBPyConnection, rows: str, sql: str, first: int, size: int, key: str) -> np.ndarray:
    """Bool [size]: does the condition hold for the examples first .. first + size - 1; null counts as no."""
    condition = f"CAST(({sql}) AS BOOLEAN)"
    held = np.full(size, bool(over_nothing(con, rows, {"": condition}, key)[""]))
    table = evaluate(con, rows, {"value": condition}, key)
    held[table[EXAMPLE].to_numpy() - first] = table["value"].fill_null(False).to_numpy()
    return held
