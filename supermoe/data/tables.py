"""From the opened tables of a source to its views: one of events with the items joined on, users, label tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate

import duckdb

from supermoe.data.opening import Raw
from supermoe.data.reading import Columns, Readable, TimedColumns, read
from supermoe.data.sql import EMPTY, quote, text
from supermoe.typed_yaml import UserError

SAME_TYPE = "user ids are whole numbers in one table and text in another; all are read as text"


@dataclass(frozen=True)
class SourceTables:
    """Names of the views that a source made.

    events("user" BIGINT or VARCHAR, time TIMESTAMP in UTC, event VARCHAR, <columns>, file_order for ties);
    users("user", <attributes>); tables: name -> view("user", time, <columns>).
    """

    events: str
    users: str | None = None
    tables: dict[str, str] = field(default_factory=dict)
    num_null_users: int = 0  # rows left out because they name no user
    notes: tuple[str, ...] = ()  # what the user should know, printed by prepare


@dataclass(frozen=True)
class EventTable:
    """One opened table of events; `event` is the type of its rows where no column tells it."""

    raw: Raw
    config: TimedColumns
    event: str | None


@dataclass(frozen=True)
class ItemTable:
    """The opened table of items, joined onto the events by the column `key`."""

    raw: Raw
    config: Columns
    key: str


def attach(
    con: duckdb.DuckDBPyConnection,
    events: list[EventTable],
    users: tuple[Raw, Columns] | None,
    items: ItemTable | None,
    tables: Mapping[str, tuple[Raw, TimedColumns]],
    drop_null_users: bool,
) -> SourceTables:
    """Check all tables and make the views of `SourceTables`."""
    logs = [_read_timed(con, one.raw, one.config, drop_null_users, _event_type(one)) for one in events]
    people = read(con, *users, required=("user",), drop_null_users=drop_null_users) if users else None
    others = {name: _read_timed(con, *table, drop_null_users) for name, table in tables.items()}
    _check_types(logs)
    everything = [*logs, *others.values(), *([people] if people else [])]
    as_text = len({one.types["user"] for one in everything}) > 1
    orders = _file_orders([one.raw.num_rows for one in logs])
    numbered = [_select(one, as_text, f"{order} AS file_order") for one, order in zip(logs, orders, strict=True)]
    con.execute(
        f"CREATE OR REPLACE VIEW source_events AS {_with_items(con, ' UNION ALL BY NAME '.join(numbered), logs, items)}"
    )
    if people is not None:
        con.execute(f"CREATE OR REPLACE VIEW source_users AS {_select(people, as_text)}")
        _check_unique(con, people.raw, "source_users", "user")
    for name, table in others.items():
        if not name.isidentifier():
            raise UserError(f"data.source.tables: '{name}' may hold letters, digits and _ only, as label SQL names it.")
        con.execute(f"CREATE OR REPLACE VIEW source_table_{name} AS {_select(table, as_text)}")
    return SourceTables(
        events="source_events",
        users="source_users" if people else None,
        tables={name: f"source_table_{name}" for name in others},
        num_null_users=sum(one.num_null_users for one in everything),
        notes=(SAME_TYPE,) if as_text else (),
    )


def _read_timed(
    con: duckdb.DuckDBPyConnection,
    raw: Raw,
    config: TimedColumns,
    drop_null_users: bool,
    constants: Mapping[str, str] | None = None,
) -> Readable:
    return read(con, raw, config, required=("user", "time"), drop_null_users=drop_null_users, constants=constants)


def _event_type(table: EventTable) -> dict[str, str]:
    """The constant column `event`, where the table has none of its own."""
    raw, columns = table.raw, table.config.columns
    if "event" in columns or ("event" in raw.types and "event" not in columns.values()):
        if table.event is not None:
            raise UserError(f"{raw.key}.event: {raw.place} has a column `event` as well; give only one of the two.")
        return {}
    return {"event": text(table.event or "event")}


def _select(table: Readable, as_text: bool, *more: str) -> str:
    """The table's columns with all user ids as text if asked for, and `more`."""
    user = 'CAST("user" AS VARCHAR) AS "user"' if as_text else '"user"'
    others = [quote(name) for name in table.types if name != "user"]
    return f"SELECT {', '.join([user, *others, *more])} FROM ({table.sql})"


def _file_orders(sizes: list[int | None]) -> list[str]:
    """The file_order of each of several tables behind those before it; of four bytes where that is known to be enough.

    A sort by (user, time, file_order) takes more than twice as long with eight.
    """
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes) or sum(known) > 2**32:
        return [f"({n}::BIGINT << 56) + file_order" for n in range(len(sizes))]
    return [f"CAST({start} + file_order AS UINTEGER)" for start in accumulate(known[:-1], initial=0)]


def _differ(one: str, other: str) -> bool:
    """Whether one type is text and the other is not; a column without values goes with both."""
    return EMPTY not in (one, other) and (one == "VARCHAR") != (other == "VARCHAR")


def _check_types(tables: list[Readable]) -> None:
    """Refuse event tables in which one column is text here and something else there."""
    seen: dict[str, Readable] = {}
    for table in tables:
        for name, type_name in table.types.items():
            if type_name == EMPTY:
                continue
            other = seen.setdefault(name, table)
            if name != "user" and _differ(other.types[name], type_name):
                raise UserError(
                    f"{table.raw.key}: the column '{name}' is {type_name} in {table.raw.place} and "
                    f"{other.types[name]} in {other.raw.place}; rename one of them under `columns`, or write both "
                    f"with one type."
                )


def _check_unique(con: duckdb.DuckDBPyConnection, raw: Raw, view: str, column: str) -> None:
    name = quote(column)
    sql = f"SELECT {name}, count(*) FROM {view} GROUP BY {name} HAVING count(*) > 1 ORDER BY {name} LIMIT 1"
    for value, count in con.execute(sql).fetchall():
        raise UserError(f"{raw.key}: {raw.place} has {count} rows for the {column} {value!r}; keep one row for each.")


def _with_items(con: duckdb.DuckDBPyConnection, events: str, logs: list[Readable], items: ItemTable | None) -> str:
    """The events with the columns of their items beside them."""
    if items is None:
        return events
    raw, key = items.raw, items.key
    table = read(con, raw, items.config, required=(key,))
    types = {name: kind for log in logs for name, kind in log.types.items()}
    if key not in types:
        raise UserError(
            f"{raw.key}.key: the events have no column '{key}' to join items by, only {', '.join(sorted(types))}."
        )
    if _differ(types[key], table.types[key]):
        raise UserError(
            f"{raw.key}.key: '{key}' is {types[key]} in the events and {table.types[key]} in {raw.place}; write both "
            f"with one type."
        )
    for name in table.types:
        if name != key and name in types:
            raise UserError(
                f"{raw.key}: the events and {raw.place} both have a column '{name}'; rename it under {raw.key}.columns."
            )
    con.execute(f"CREATE OR REPLACE VIEW source_items AS SELECT * EXCLUDE (file_order) FROM ({table.sql})")
    _check_unique(con, raw, "source_items", key)
    return f"SELECT * FROM ({events}) LEFT JOIN source_items USING ({quote(key)})"
