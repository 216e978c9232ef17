"""One opened table -> one checked SELECT with our column names: `user`, `time` in UTC, the rest under the names given.

Every complaint names the config key, the file, the row and the column, and says what to do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import duckdb
from pydantic import Field

from supermoe.data.opening import Raw
from supermoe.data.sql import EMPTY, FLOATS, INTEGERS, WIDE_INTEGERS, complaint, quote
from supermoe.data.times import (
    EARLIEST,
    LATEST,
    TimeReading,
    has_zone_sql,
    likely_unit,
    may_mix_zones,
    number_sql,
    of_our_days_sql,
    time_sql,
    unread_remedy,
)
from supermoe.typed_yaml import Config, UserError, nearest

# names that the log's views, the examples and the store use for themselves
RESERVED = {"user_row", "position", "row", "file_order", "file_name", "cut", "visible", "split"}
RESERVED |= {"first_row", "num_events", "offset", "length", "gap_days", "age_days", "ahead_days", "_example"}


class Columns(Config):
    """How to read one table: `columns` maps our names to theirs; columns not mentioned keep their names."""

    columns: dict[str, str] = Field(default_factory=dict)


class TimedColumns(Columns, TimeReading):
    """How to read one table whose rows carry a user and a time."""

    where: str | None = None  # SQL condition on the table's own columns


@dataclass(frozen=True)
class Readable:
    """A checked table: a SELECT of its columns under our names and of file_order; `types` of these columns."""

    raw: Raw
    sql: str
    types: dict[str, str]
    num_null_users: int  # rows left out


def read(
    con: duckdb.DuckDBPyConnection,
    raw: Raw,
    config: Columns,
    *,
    required: tuple[str, ...],
    drop_null_users: bool = False,
    constants: Mapping[str, str] | None = None,
) -> Readable:
    """Rename, convert and check one table.

    `required` columns: `user`, `time`, or the key of an items table; `constants`: further text columns, name -> SQL. A
    float that is NaN is missing; an infinite one, a row without a user and a time that cannot be read are refused.
    """
    names = _names(raw, config, required)
    types = {ours: raw.types[theirs] for ours, theirs in names.items()}
    columns = {ours: _column_sql(theirs, raw.types[theirs]) for ours, theirs in names.items()}
    if "user" in required:
        columns["user"], types["user"] = _user_sql(raw, names["user"])
    if isinstance(config, TimedColumns):
        place = f"{raw.key}: the time column '{names['time']}' of {raw.place}"
        columns["time"], types["time"] = time_sql(names["time"], types["time"], config, place), "TIMESTAMP"
    if "event" in names:
        columns["event"], types["event"] = f"CAST({columns['event']} AS VARCHAR)", "VARCHAR"
    where = f"({config.where})" if isinstance(config, TimedColumns) and config.where else "true"
    num_null_users = _Checks(con, raw, config, names, columns, where).run(drop_null_users)
    if num_null_users:
        where += f" AND {columns['user']} IS NOT NULL"
    columns |= constants or {}
    types |= dict.fromkeys(constants or {}, "VARCHAR")
    listed = ", ".join(f"{sql} AS {quote(name)}" for name, sql in columns.items())
    return Readable(raw, f"SELECT {listed}, file_order FROM ({raw.ordered}) WHERE {where}", types, num_null_users)


def _names(raw: Raw, config: Columns, required: tuple[str, ...]) -> dict[str, str]:
    """Our name -> theirs, for all columns."""
    names = dict(config.columns)
    for ours, theirs in names.items():
        if theirs not in raw.types:
            raise UserError(
                f"{raw.key}.columns.{ours}: {raw.place} has no column '{theirs}', {nearest(theirs, raw.types)}"
            )
    for theirs in raw.types:
        if theirs in config.columns.values():
            continue
        if theirs in names:
            raise UserError(
                f"{raw.key}.columns: '{theirs}' stands for the column '{names[theirs]}', but {raw.place} has a column "
                f"'{theirs}' too; give that one another name, such as {theirs}_2: {theirs}."
            )
        names[theirs] = theirs
    for name in required:
        if name not in names:
            raise UserError(
                f"{raw.key}: {raw.place} has no column '{name}'; name it under {raw.key}.columns.{name}, one of: "
                f"{', '.join(raw.types)}."
            )
    for name in names:
        if name.lower() in RESERVED:
            raise UserError(
                f"{raw.key}: '{name}' is a name used inside; rename the column, columns: {{my_{name}: {name}}}."
            )
    return names


def _column_sql(column: str, type_name: str) -> str:
    name = quote(column)
    if type_name == EMPTY:  # so that the column has the type that other tables give it
        return "NULL"
    return f"CASE WHEN isnan({name}) THEN NULL ELSE {name} END" if type_name in FLOATS else name


def _user_sql(raw: Raw, column: str) -> tuple[str, str]:
    """(expression, type) of user ids: BIGINT or VARCHAR."""
    type_name, name = raw.types[column], _column_sql(column, raw.types[column])
    if type_name in (*INTEGERS, *FLOATS):  # floats are what pandas makes of whole numbers with gaps
        return f"TRY_CAST({name} AS BIGINT)", "BIGINT"
    whole = re.fullmatch(r"DECIMAL\((\d+),0\)", type_name)
    if whole and int(whole[1]) <= 18:
        return f"CAST({name} AS BIGINT)", "BIGINT"
    if whole or type_name in ("VARCHAR", "UUID", *WIDE_INTEGERS, EMPTY) or type_name.startswith("ENUM"):
        return f"CAST({name} AS VARCHAR)", "VARCHAR"
    raise UserError(
        f"{raw.key}: the user column '{column}' of {raw.place} is {type_name}; ids are whole numbers or text."
    )


# --- checks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Check:
    """Rows for which `condition` holds are wrong.

    There are none where `proof` holds, an aggregate that DuckDB answers from the statistics of a Parquet file.
    """

    column: str  # theirs
    condition: str
    remedy: str
    kind: str = ""
    proof: str = "false"


@dataclass(frozen=True)
class _Checks:
    """All checks of one table, counted in one scan; the first that finds something complains."""

    con: duckdb.DuckDBPyConnection
    raw: Raw
    config: Columns
    names: dict[str, str]
    columns: dict[str, str]
    where: str

    def run(self, drop_null_users: bool) -> int:
        """Raise a `UserError` about the first bad row; returns how many rows without a user are dropped."""
        checks = [check for ours, theirs in self.names.items() for check in self._of_column(ours, theirs)]
        if self.raw.has_statistics and self.where == "true" and self._proven(checks):
            return 0
        counts = ", ".join(["count(*)", *(f"count(*) FILTER (WHERE {check.condition})" for check in checks)])
        found = self._count(f"SELECT {counts} FROM {self.raw.scan} WHERE {self.where}")
        num_null_users = 0
        for check, count in zip(checks, found[1:], strict=True):
            if check.kind == "null" and drop_null_users:
                num_null_users = count
            elif check.kind == "zone":
                self._compare_zones(check.column, check.condition, count)
            elif check.kind == "unit":
                if count == found[0]:
                    self._suggest_unit(check.column, check.condition)
            elif count:
                file, row, value = self._first(check.column, check.condition)
                more = f" ({count} such rows in all)" if count > 1 else ""
                place = f"{self.raw.key}: {file}, row {row}, column '{check.column}'"
                raise UserError(f"{place}: the value {value!r} {check.remedy}{more}.")
        return num_null_users

    def _proven(self, checks: list[_Check]) -> bool:
        proofs = " AND ".join(["true", *(check.proof for check in checks)])
        return bool(self._count(f"SELECT {proofs} FROM {self.raw.scan}")[0])

    def _of_column(self, ours: str, theirs: str) -> list[_Check]:
        name, type_name, checks = quote(theirs), self.raw.types[theirs], []
        if type_name in FLOATS:
            infinite = "is infinite; write a number, or nothing where it is missing"
            finite = f"coalesce(min({name}) > '-inf' AND max({name}) < 'inf', true)"
            checks.append(_Check(theirs, f"isinf({name})", infinite, proof=finite))
        if ours == "user":
            if type_name in FLOATS:
                fraction = f"{name} <> floor({name})"
                checks.append(
                    _Check(theirs, fraction, "is no whole number, so no user id; write whole numbers or text")
                )
            dropping = "names no user; mend the row, or give drop_null_users: true to leave such rows out"
            all_named = f"count({name}) = count(*)" if type_name not in FLOATS else "false"
            checks.append(_Check(theirs, f"({self.columns['user']}) IS NULL", dropping, "null", all_named))
        if ours == "time" and isinstance(self.config, TimedColumns):
            time = self.columns["time"]
            if self.config.time_unit is not None:
                number = number_sql(theirs, type_name, self.config, self.raw.place)
                checks.append(_Check(theirs, f"NOT {of_our_days_sql(number, self.config.time_unit)}", "", "unit"))
            unread = f"coalesce({time} NOT BETWEEN TIMESTAMP '{EARLIEST}' AND TIMESTAMP '{LATEST}', true)"
            inside = f"min({name}) > TIMESTAMP '{EARLIEST}' AND max({name}) < TIMESTAMP '{LATEST}'"
            is_instant = type_name.startswith("TIMESTAMP") and self.config.time_zone is None
            all_read = f"count({name}) = count(*) AND {inside}" if is_instant else "false"
            checks.append(_Check(theirs, unread, unread_remedy(self.config), proof=all_read))
            if may_mix_zones(type_name, self.config):
                checks.append(_Check(theirs, has_zone_sql(theirs), "", "zone"))
        return checks

    def _count(self, sql: str) -> tuple[int, ...]:
        """Run the one scan; what fails is the file's content, the `where` condition, or how times are to be read."""
        try:
            return self.con.execute(sql).fetchall()[0]
        except duckdb.Error as error:
            where, zone = getattr(self.config, "where", None), getattr(self.config, "time_zone", None)
            time_format = getattr(self.config, "time_format", None)
            place = f"{self.raw.key}: {self.raw.place} cannot be read"
            if where and isinstance(error, duckdb.BinderException | duckdb.ParserException | duckdb.CatalogException):
                place = f"{self.raw.key}.where: the condition '{where}' does not fit {self.raw.place}"
            elif zone and zone in str(error):
                place = f"{self.raw.key}.time_zone"
            elif time_format and "format specifier" in str(error):
                place = f"{self.raw.key}.time_format: '{time_format}'"
            raise UserError(f"{place}: {complaint(error)}") from None

    def _suggest_unit(self, column: str, condition: str) -> None:
        """Refuse numbers none of which is a time of our days in the declared unit, where another unit makes it one."""
        assert isinstance(self.config, TimedColumns)
        file, row, value = self._first(column, condition)
        unit = likely_unit(float(value or 0))
        if unit is not None:
            raise UserError(
                f"{self.raw.key}: {file}, row {row}, column '{column}': the value {value} counts {unit} since 1970 and "
                f"not {self.config.time_unit}, as do all others; set time_unit: {unit}."
            )

    def _compare_zones(self, column: str, zoned: str, num_zoned: int) -> None:
        """Refuse text times of which some carry a zone and some do not."""
        plain = f"NOT {zoned}"
        if num_zoned == 0 or not self._count(f"SELECT count(*) FROM {self.raw.scan} WHERE {self.where} AND {plain}")[0]:
            return
        file, row, value = self._first(column, plain)
        _, other_row, other = self._first(column, zoned)
        raise UserError(
            f"{self.raw.key}: {file}, row {row}, column '{column}': the time {value!r} carries no zone, but {other!r} "
            f"in row {other_row} does; write all times of a table with a zone, or all without one and set time_zone."
        )

    def _first(self, column: str, condition: str) -> tuple[str, int, Any]:
        """(file, row counted from 1, value as text) of the first row for which the condition holds."""
        numbered = "file_order - min(file_order) OVER (PARTITION BY file_name) + 1 AS row_in_file"
        return self.con.execute(
            f"SELECT file_name, row_in_file, CAST({quote(column)} AS VARCHAR) "
            f"FROM (SELECT *, {numbered} FROM ({self.raw.ordered})) "
            f"WHERE {self.where} AND {condition} ORDER BY file_order LIMIT 1"
        ).fetchall()[0]
