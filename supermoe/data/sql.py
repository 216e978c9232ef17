"""Names and texts inside SQL, and DuckDB's types and messages."""

from __future__ import annotations

INTEGERS = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER")  # that fit into BIGINT
WIDE_INTEGERS = ("UBIGINT", "HUGEINT", "UHUGEINT")
FLOATS = ("FLOAT", "DOUBLE")
EMPTY = '"NULL"'  # of a column without any value


def is_number(type_name: str) -> bool:
    """Whether values of a DuckDB type are numbers, of any width."""
    return type_name in (*INTEGERS, *WIDE_INTEGERS, *FLOATS) or type_name.startswith("DECIMAL")


def quote(name: str) -> str:
    """A column name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def text(value: str) -> str:
    """A string as an SQL literal."""
    return "'" + value.replace("'", "''") + "'"


# where DuckDB's messages go on to options of its own and to our SQL
ADVICE = ("\nPossible ", "\nThe search space", "\n\tCandidate functions", "\nLINE ")


def complaint(error: Exception) -> str:
    """The telling part of a DuckDB message, on one line and without a full stop."""
    message = str(error)
    for advice in ADVICE:
        message = message.split(advice)[0]
    return " ".join(message.split())[:400].rstrip(".")
