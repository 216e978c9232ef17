"""Which columns of the events become inputs, how each is read, and how the sorted log keeps it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from types import MappingProxyType
from typing import Any

import duckdb

from supermoe.config import FieldConfig
from supermoe.data.naming import names_something
from supermoe.data.sql import EMPTY, FLOATS, INTEGERS, WIDE_INTEGERS, is_number, quote
from supermoe.typed_yaml import UserError, nearest

OWN_COLUMNS = ("user", "time", "file_order")  # of a source's events; all others are the log's own
NULLS = MappingProxyType({"category": "VARCHAR", "categories": "VARCHAR[]", "number": "DOUBLE"})  # their types
MANY_NAMES, SHARED = 1_000, 1.5  # a name that is seen with fewer users, on the average, is that of a single thing
NOT_IN_PARQUET = re.compile(r"\b(U?HUGEINT|BIGNUM|BIT|INTERVAL|TIME WITH|UNION|VARIANT)\b")


def choose_fields(
    declared: dict[str, FieldConfig | None], types: dict[str, str], num_event_types: int
) -> tuple[dict[str, FieldConfig], list[str]]:
    """The declared fields, or all columns with kinds by their types; `event` joins them where there are several types.

    A column declared as null is not an input. Returns the fields, and notes on columns that were passed over.
    """
    columns = {name: kind for name, kind in types.items() if name not in OWN_COLUMNS}
    for name in declared:
        if name not in columns:
            raise UserError(f"data.fields.{name}: the events have no such column, {nearest(name, columns)}")
    fields = {name: field for name, field in declared.items() if field is not None}
    notes: list[str] = []
    if not fields:
        fields, notes = _infer({name: kind for name, kind in columns.items() if name not in {*declared, "event"}})
    if num_event_types > 1 and "event" not in declared:
        fields = {"event": FieldConfig(kind="category"), **fields}
    for name, field in fields.items():
        check_kind(name, columns[name], field.kind)
        if not (name.isascii() and name.replace("_", "").isalnum()) or name in ("features", "time"):
            raise UserError(
                f"data.fields.{name}: the name of a field becomes a file's, so it may hold letters, digits and _ "
                f"only, and not be 'features'; rename the column under the source's `columns`, or list the other "
                f"columns in data.fields."
            )
    return fields, notes


def names_of_one_user(con: duckdb.DuckDBPyConnection, columns: Iterable[str]) -> list[str]:
    """Which columns of the view `log` hold names that hardly any two users share, such as those of orders or sessions.

    There is nothing to learn from them for others, and much to compute. Counted approximately, in one scan.
    """
    columns = list(columns)
    counts = [
        f"approx_count_distinct({quote(name)}), approx_count_distinct(hash(user_row, {quote(name)})) "
        f"FILTER (WHERE {quote(name)} IS NOT NULL)"
        for name in columns
    ]
    found = con.execute(f"SELECT {', '.join(counts)} FROM log").fetchall()[0] if columns else ()
    pairs = zip(columns, found[::2], found[1::2], strict=True)
    return [name for name, names, owned in pairs if names > MANY_NAMES and owned < SHARED * names]


def whole_names(
    con: duckdb.DuckDBPyConnection,
    events: str,
    declared: dict[str, FieldConfig | None],
    types: dict[str, str],
    wanted: Collection[str],
) -> list[str]:
    """Floating-point columns of whole numbers that are names, such as ids that may be missing and went through pandas.

    Names are the declared categories; where no fields are declared, `wanted` columns and what is called like names.
    """
    names = {name for name, field in declared.items() if field is not None and field.kind == "category"}
    if not any(declared.values()):
        names = {name for name in types if name in wanted or names_something(name)}
    floats = [name for name, kind in types.items() if name in names and kind in FLOATS and name not in OWN_COLUMNS]
    whole = [
        f"bool_and(abs({x}) < 1e15 AND {x} = trunc({x})) FILTER (WHERE NOT isnan({x}))" for x in map(quote, floats)
    ]
    found = con.execute(f"SELECT {', '.join(whole)} FROM {quote(events)}").fetchall()[0] if whole else ()
    return [name for name, is_whole in zip(floats, found, strict=True) if is_whole]


def check_kind(name: str, type_name: str, kind: str) -> None:
    """Refuse a kind that the column's type cannot have."""
    if type_name == EMPTY:
        return
    is_list = type_name.endswith("[]")
    if kind == "number" and not is_number(type_name) and type_name != "BOOLEAN":
        raise UserError(
            f"data.fields.{name}: the column is {type_name}, not a number; use kind category, or write numbers. Of CSV "
            f"the source is told what its numbers look like: decimal: ',' and nulls: [NA]."
        )
    if is_list != (kind == "categories"):
        other = "categories" if is_list else "category"
        raise UserError(f"data.fields.{name}: the column is {type_name}, so kind {kind} does not fit it; use {other}.")


def _infer(columns: dict[str, str]) -> tuple[dict[str, FieldConfig], list[str]]:
    fields, notes = {}, []
    for name, type_name in columns.items():
        kind = _kind_of(type_name)
        if kind is None:
            notes.append(_passed_over(name, type_name))
        else:
            fields[name] = FieldConfig(kind=kind)
    return fields, notes


def _passed_over(name: str, type_name: str) -> str:
    if type_name == EMPTY:
        return f"the column '{name}' holds no value at all, so it is no input"
    return f"the column '{name}' ({type_name}) is no input; labels and features may use it in their SQL"


def _kind_of(type_name: str) -> Any:
    if type_name.endswith("[]"):
        return "categories" if _kind_of(type_name[:-2]) in ("category", "number") else None
    if type_name in FLOATS or type_name.startswith("DECIMAL"):
        return "number"
    if type_name in (*INTEGERS, *WIDE_INTEGERS, "VARCHAR", "BOOLEAN", "UUID") or type_name.startswith("ENUM"):
        return "category"
    return None


def stored_sql(column: str, type_name: str, field: FieldConfig | None) -> str:
    """A column as the log keeps it: categories as BIGINT, DOUBLE, BOOLEAN or VARCHAR, which compare plainly.

    Other columns stay as they are, and as text where Parquet has no such type.
    """
    name = quote(column)
    if type_name == EMPTY:
        return f"CAST({name} AS {NULLS[field.kind if field else 'category']})"
    if field is None or field.kind == "number":
        if type_name in ("HUGEINT", "UHUGEINT"):
            return f"CAST({name} AS DOUBLE)"
        return f"CAST({name} AS VARCHAR)" if NOT_IN_PARQUET.search(type_name) else name
    item, brackets = (type_name[:-2], "[]") if type_name.endswith("[]") else (type_name, "")
    if item not in ("BIGINT", "DOUBLE", "BOOLEAN", "VARCHAR"):
        target = "BIGINT" if item in INTEGERS else "DOUBLE" if item in FLOATS else "VARCHAR"
        name = f"CAST({name} AS {target}{brackets})"
    return f"list_filter({name}, lambda x: x IS NOT NULL)" if brackets else name
