"""Fields that were taken for categories because they are text, while their text says numbers."""

from __future__ import annotations

from collections.abc import Iterable

import duckdb

from supermoe.data.sql import quote, text
from supermoe.typed_yaml import UserError

MOSTLY, FEW = 0.9, 3  # share of numbers, or different words among numbers, that make a text column spoken of
PLAIN = r"[+-]?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?"
CODE = r"0[0-9]+"  # where one value is such a name, the others are names too
WITH_COMMA = r"[+-]?[0-9][0-9.]*,[0-9]+"


def suspect(con: duckdb.DuckDBPyConnection, names: Iterable[str]) -> list[str]:
    """Look at text columns in the view `log_sample`; returns notes on those that are mostly numbers.

    A column of decimal commas is a `UserError`: what was written as numbers would be learnt as names.
    """
    notes = []
    for name in names:
        column, has_comma, is_code = quote(name), _matches(name, WITH_COMMA), _matches(name, CODE)
        is_number = f"({_matches(name, PLAIN)} OR {has_comma})"
        size, numbers, commas, codes, words, comma, word = con.execute(
            f"SELECT count({column}), count(*) FILTER (WHERE {is_number}), count(*) FILTER (WHERE {has_comma}), "
            f"count(*) FILTER (WHERE {is_code}), count(DISTINCT {column}) FILTER (WHERE NOT {is_number}), "
            f"min({column}) FILTER (WHERE {has_comma}), mode({column}) FILTER (WHERE NOT {is_number}) FROM log_sample"
        ).fetchall()[0]
        if commas and numbers == size:
            raise UserError(
                f"data.fields: the column '{name}' would be a category, but holds numbers with decimal commas, such as "
                f"'{comma}'; give decimal: ',' beside the path of the CSV files. If they are none, list all inputs "
                f"under data.fields, {name}: category among them."
            )
        if numbers and words and not codes and (numbers >= MOSTLY * size or words <= FEW):
            notes.append(
                f"the column '{name}' is read as a category, though {numbers / size:.0%} of its values are numbers, as "
                f"it also holds '{word}'; if that stands for nothing, give nulls: ['{word}'] beside the path of CSV"
            )
    return notes


def _matches(name: str, pattern: str) -> str:
    return f"regexp_full_match({quote(name)}, {text(pattern)})"
